"""Experiment trackers: where learning curves can go besides their file."""

from importlib.util import find_spec
from typing import Any

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError


def tracker_for(config: StudyConfig, run: str) -> Any | None:
    """The accelerate tracker that the study names, not started yet. Raises StudyError when its package is not installed."""
    kind = config.training.tracker
    if kind is None:
        return None
    if find_spec(kind) is None:
        raise StudyError([f"training.tracker: the package {kind} is not installed: pip install {kind}"])
    if kind == "tensorboard":
        return TensorBoardTracker(run, config.run_folder / "tensorboard")
    return (TrackioTracker if kind == "trackio" else WandBTracker)(config.name, name=run)
