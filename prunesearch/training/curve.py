"""The learning curve of a fine-tune, beside its record and, where the study says so, in TensorBoard."""

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from prunesearch.mistakes import StudyError
from prunesearch.training.finetune import CurvePoint


class LearningCurve:
    """Appends points to `curve.jsonl` in the record's folder; the leader's of a team only."""

    def __init__(self, folder: Path, run_folder: Path, tensorboard: bool, writes: bool):
        self._path = folder / "curve.jsonl" if writes else None
        self._board = _board(run_folder / "tensorboard" / folder.name) if tensorboard and writes else None

    def __enter__(self) -> "LearningCurve":
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, point: CurvePoint) -> None:
        """A run that was killed and goes on from a checkpoint may write some of its points twice: the last one counts."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        if self._board:
            for name, value in asdict(point).items():
                if name != "step":
                    self._board.add_scalar(name, value, point.step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._board:
            self._board.close()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise StudyError(
            ["training.tensorboard: the package tensorboard is not installed: pip install 'prunesearch[tensorboard]'"]
        ) from None
    return SummaryWriter(str(folder))
