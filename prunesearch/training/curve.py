"""The learning curve of a fine-tune, beside its record and, where the study says so, in TensorBoard, Trackio or W&B."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.training.finetune import CurvePoint


class LearningCurve:
    """Appends points to `curve.jsonl` in the record's folder; the leader's of a team only."""

    def __init__(self, folder: Path, config: StudyConfig, writes: bool):
        self._path = folder / "curve.jsonl" if writes else None
        self._tracker = tracker_for(config, folder.name) if writes else None

    def __enter__(self) -> "LearningCurve":
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._tracker:
            self._tracker.start()
        return self

    def add(self, point: CurvePoint) -> None:
        """A run that was killed and goes on from a checkpoint may write some of its points twice: the last one counts."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        if self._tracker:
            self._tracker.log({name: value for name, value in asdict(point).items() if name != "step"}, step=point.step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tracker:
            self._tracker.finish()


def tracker_for(config: StudyConfig, run: str) -> Any | None:
    """accelerate's tracker of the kind that the study names, not started yet. Raises StudyError when it is not installed."""
    kind = config.training.tracker
    if kind is None:
        return None
    if find_spec(kind) is None:
        raise StudyError([f"training.tracker: the package {kind} is not installed: pip install {kind}"])
    if kind == "tensorboard":
        return TensorBoardTracker(run, config.run_folder / "tensorboard")
    return (TrackioTracker if kind == "trackio" else WandBTracker)(config.name, name=run)
