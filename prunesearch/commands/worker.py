"""Join a study that was launched, from any machine that reaches its storage."""

from pathlib import Path

from prunesearch.commands.launch import run_worker
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.interrupt import Interrupt
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.workers.worker import WorkerOptions


def join(
    source: str | Path, storage: str | None = None, listener: ProgressListener | None = None, allow_changes: bool = False
) -> StudyConfig:
    """Add a worker to a study that was launched, until the study's budget is used.

    Raises StudyError for errors in the user's input (for example other data than the study's), and Interrupted after a signal.
    """
    config, options = load_study(source), WorkerOptions(storage, allow_changes, creates=False)
    listener, interrupt = listener or NullListener(), Interrupt()
    with interrupt.on_signals(listener.note):
        run_worker(config, options, listener, interrupt)
    return config
