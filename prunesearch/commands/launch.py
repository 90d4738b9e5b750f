"""Run a study: workers evaluate candidates, then the test split is decoded for those that count."""

from pathlib import Path

from prunesearch.commands.local import run_workers
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.interrupt import Interrupt
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.study.record import read_records
from prunesearch.workers.final_test import decode_final_test
from prunesearch.workers.worker import Worker, WorkerOptions


def launch(
    source: str | Path,
    workers: int = 1,
    trials: int | None = None,
    storage: str | None = None,
    listener: ProgressListener | None = None,
    allow_changes: bool = False,
) -> StudyConfig:
    """Run the study of a study file, or continue it, until `trials` candidates have an outcome, no matter which worker
    evaluated them.

    One worker is this process. Several workers are processes of their own, which share the processor's threads or take one GPU
    each. At the end, test is decoded for the front and the baselines. `allow_changes`: continue even though code, data, models
    or anchor differ from when the study started. Raises StudyError for errors in the user's input, and Interrupted after a
    signal.
    """
    config, options = load_study(source), WorkerOptions(storage, allow_changes, trials=trials)
    listener, interrupt = listener or NullListener(), Interrupt()
    read_records(config.run_folder / "records", config.name)  # a damaged one is reported now, and not after a training
    with interrupt.on_signals(listener.note):
        if workers > 1:
            run_workers(config, workers, options, listener, interrupt)
            decode_final_test(config, listener, interrupt, storage=storage)
        else:
            run_worker(config, options, listener, interrupt)
    return config


def run_worker(config: StudyConfig, options: WorkerOptions, listener: ProgressListener, interrupt: Interrupt) -> None:
    """One worker, in this process, from opening the study to decoding test. Raises StudyError and Interrupted."""
    worker = Worker.open(config, options, listener, interrupt)
    worker.run()
    if worker.context.group.is_main_process:
        decode_final_test(config, listener, interrupt, worker.context, options.storage)
    worker.close()
