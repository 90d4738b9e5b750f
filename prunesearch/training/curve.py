"""The learning curve of a fine-tune, beside its record and, if the study says so, in TensorBoard, Trackio or W&B."""

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from prunesearch.training.context import TrainingContext
from prunesearch.training.finetune import CurvePoint
from prunesearch.training.tracker import tracker_for


class LearningCurve:
    """Appends points to `curve.jsonl` in the record's folder, and reports them as progress; in the main process of a group
    only.

    `label`: the candidate's name in progress messages.
    """

    def __init__(self, folder: Path, context: TrainingContext, label: str, steps: int):
        writes = context.group.is_main_process
        self._path = folder / "curve.jsonl" if writes else None
        self._tracker = tracker_for(context.config, folder.name) if writes else None
        self._context, self._label, self._steps = context, label, steps

    def __enter__(self) -> "LearningCurve":
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._tracker:
            self._tracker.start()
        return self

    def add(self, point: CurvePoint) -> None:
        """A run that was killed and continues from a checkpoint may append some points twice: the last one counts."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        pace = f"{point.tokens_per_second:,.0f} tokens/s"
        self._context.main_progress(f"{self._label}, loss {point.loss:.2f}, {pace}", point.step, self._steps)
        if self._tracker:
            self._tracker.log({name: value for name, value in asdict(point).items() if name != "step"}, step=point.step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tracker:
            self._tracker.finish()
