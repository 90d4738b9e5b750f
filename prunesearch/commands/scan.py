"""Measure how important each of a study's layers is, before any candidate is trained."""

from pathlib import Path

from prunesearch.search.screening_choice import next_to_screen
from prunesearch.study.config import load_study
from prunesearch.study.importance import Scan
from prunesearch.study.interrupt import Interrupt
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.workers.worker import Worker, WorkerOptions


def scan(
    source: str | Path,
    most: int = 2,
    utterances: int = 64,
    loss_sets: int = 128,
    with_wer: bool = False,
    check: bool = False,
    screened: int | None = None,
    storage: str | None = None,
    listener: ProgressListener | None = None,
) -> Scan:
    """Scan the study's layers, and write the scan and its report to `run/scan/`. The anchor is trained first, if it is missing.

    Nine parameters, since a notebook calls this with keywords; `training.importance_scan.ScanSettings` explains the settings.
    Raises StudyError for errors in the user's input, and Interrupted after a signal.
    """
    from prunesearch.report.scan import write_scan_report
    from prunesearch.training.importance_scan import ScanSettings, importance_scan

    config, settings = load_study(source), ScanSettings(most, utterances, loss_sets, with_wer, check, screened)
    listener, interrupt = listener or NullListener(), Interrupt()
    with interrupt.on_signals(listener.note):
        worker = Worker.open(config, WorkerOptions(storage, scan_only=True), listener, interrupt)
        found = importance_scan(worker.context, settings, next_to_screen)
        worker.close()
    write_scan_report(config.run_folder / "scan", found)
    return found
