"""Run a study: let workers evaluate candidates, then decode the test split for those that count."""

from pathlib import Path
from typing import Any

from prunesearch.commands.local import run_workers
from prunesearch.search.study_progress import is_settled
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.importance import Scan
from prunesearch.study.interrupt import Interrupt, locked
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.study.record import read_records
from prunesearch.workers.artifacts import open_shelf
from prunesearch.workers.optuna_study import join_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.worker import Worker, open_context


def launch(
    source: str | Path,
    workers: int = 1,
    trials: int | None = None,
    storage: str | None = None,
    listener: ProgressListener | None = None,
    adopt: bool = False,
) -> StudyConfig:
    """Run the study file's study, or go on with it, until `trials` candidates have an outcome, whoever evaluated them.

    One worker is this process; more are processes of their own, which share the processor's threads (or take one GPU
    each). At the end the front and the baselines are decoded on test. `adopt` goes on with other code or data than the study
    began with. Raises StudyError for the user's mistakes, and Interrupted after a signal that asks for it.
    """
    config = load_study(source)
    listener = listener or NullListener()
    stop = Interrupt()
    with stop.on_signals(listener.note):
        if workers <= 1:
            worker = Worker.open(config, storage, listener, stop, adopt, trials=trials)
            worker.run()
            if worker.context.team.leads:
                _test_those_that_count(config, worker.context, listener, stop, storage)
            worker.leave()
        else:
            run_workers(config, workers, trials, storage, listener, stop, adopt)
            _test_those_that_count(config, None, listener, stop, storage)
    return config


def join(
    source: str | Path, storage: str | None = None, listener: ProgressListener | None = None, adopt: bool = False
) -> StudyConfig:
    """One more worker for a study that was launched, from anywhere: until the study's budget is used.

    Raises StudyError for the user's mistakes (such as other data than the study's), and Interrupted after a signal.
    """
    config = load_study(source)
    listener = listener or NullListener()
    stop = Interrupt()
    with stop.on_signals(listener.note):
        worker = Worker.open(config, storage, listener, stop, adopt, creates=False)
        worker.run()
        if worker.context.team.leads:
            _test_those_that_count(config, worker.context, listener, stop, storage)
        worker.leave()
    return config


def scan(
    source: str | Path,
    most: int = 2,
    utterances: int = 64,
    loss_sets: int = 128,
    with_wer: bool = False,
    check: bool = False,
    storage: str | None = None,
    listener: ProgressListener | None = None,
) -> Scan:
    """Measure what the study's layers are worth before any training, and write the scan and its report to `run/scan/`.

    The anchor is trained if it is not there yet. See `training.scan.scan` for the settings. Raises StudyError for the
    user's mistakes.
    """
    from prunesearch.report.scan import write_scan_report
    from prunesearch.training.importance_scan import scan as run_scan

    config = load_study(source)
    listener = listener or NullListener()
    stop = Interrupt()
    with stop.on_signals(listener.note):
        context = Worker.open(config, storage, listener, stop, scans=True).context
        found = run_scan(context, most, utterances, loss_sets, with_wer, check)
    write_scan_report(config.run_folder / "scan", found)
    return found


def collect(config: StudyConfig, storage: str | None = None) -> None:
    """Fetch the records that other workers have made, where workers share no run folder."""
    if (shelf := open_shelf(config)) is None:
        return
    study = join_study(config, open_storage(storage or config.storage.url, config.run_folder))
    shelf.fetch_records(t.user_attrs["candidate"] for t in study.get_trials(deepcopy=False) if is_settled(t))


def _test_those_that_count(
    config: StudyConfig, context: Any, listener: ProgressListener, stop: Interrupt, storage: str | None
) -> None:
    """Decode the test split for the baselines and the front, where that was not done before; one worker does."""
    from prunesearch.study.front import pareto_front, pooled_by_system
    from prunesearch.training.recipe import decode_test

    collect(config, storage)
    with locked(config.run_folder / "test.lock", stop.check):
        records = read_records(config.run_folder / "records")
        complete = [r for r in records if r.state == "complete"]
        systems = pooled_by_system(complete)
        front = pareto_front(systems, config.search.params_objective, config.search.max_worst_group_wer)
        wanted = {r.candidate for r in (*front, *(s for s in systems if s.name))}
        due = [r for r in complete if r.candidate.system in wanted and r.test is None]
        if not due:
            return
        context = context or open_context(config, listener, stop.check)
        shelf = open_shelf(config)
        for done, record in enumerate(due):
            listener.progress("decoding test", done, len(due))
            decode_test(context, record)
            if shelf:
                shelf.put_record(record.candidate.key)
