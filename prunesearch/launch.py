"""Run a study: let workers evaluate candidates, then decode the test split for those that count."""

from pathlib import Path
from typing import Any

from prunesearch.config import StudyConfig, load_study
from prunesearch.processes import run_workers
from prunesearch.record import read_records
from prunesearch.scan import Scan
from prunesearch.search.shelf import open_shelf
from prunesearch.search.standing import is_settled
from prunesearch.search.storage import open_storage
from prunesearch.search.study import join_study
from prunesearch.stopping import Stop, locked
from prunesearch.watcher import Nobody, Watcher
from prunesearch.work import Worker, open_workshop


def launch(
    source: str | Path,
    workers: int = 1,
    trials: int | None = None,
    storage: str | None = None,
    watcher: Watcher | None = None,
    adopt: bool = False,
) -> StudyConfig:
    """Run the study file's study, or go on with it, until `trials` candidates have an outcome, whoever evaluated them.

    One worker is this process; more are processes of their own, which share the processor's threads (or take one GPU
    each). At the end the front and the baselines are decoded on test. `adopt` goes on with other code or data than the study
    began with. Raises StudyError for the user's mistakes, and Stopped after a signal that asks for it.
    """
    config = load_study(source)
    watcher = watcher or Nobody()
    stop = Stop()
    with stop.on_signals(watcher.note):
        if workers <= 1:
            worker = Worker.open(config, storage, watcher, stop, adopt, trials=trials)
            worker.run()
            if worker.workshop.team.leads:
                _test_those_that_count(config, worker.workshop, watcher, stop, storage)
            worker.leave()
        else:
            run_workers(config, workers, trials, storage, watcher, stop, adopt)
            _test_those_that_count(config, None, watcher, stop, storage)
    return config


def join(source: str | Path, storage: str | None = None, watcher: Watcher | None = None, adopt: bool = False) -> StudyConfig:
    """One more worker for a study that was launched, from anywhere: until the study's budget is used.

    Raises StudyError for the user's mistakes (such as other data than the study's), and Stopped after a signal.
    """
    config = load_study(source)
    watcher = watcher or Nobody()
    stop = Stop()
    with stop.on_signals(watcher.note):
        worker = Worker.open(config, storage, watcher, stop, adopt, creates=False)
        worker.run()
        if worker.workshop.team.leads:
            _test_those_that_count(config, worker.workshop, watcher, stop, storage)
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
    watcher: Watcher | None = None,
) -> Scan:
    """Measure what the study's layers are worth before any training, and write the scan and its report to `run/scan/`.

    The anchor is trained if it is not there yet. See `training.scan.scan` for the settings. Raises StudyError for the
    user's mistakes.
    """
    from prunesearch.report.scan import write_scan_report
    from prunesearch.training.scan import scan as run_scan

    config = load_study(source)
    watcher = watcher or Nobody()
    stop = Stop()
    with stop.on_signals(watcher.note):
        workshop = Worker.open(config, storage, watcher, stop, scans=True).workshop
        found = run_scan(workshop, most, utterances, loss_sets, with_wer, check)
    write_scan_report(config.run_folder / "scan", found)
    return found


def collect(config: StudyConfig, storage: str | None = None) -> None:
    """Fetch the records that other workers have made, where workers share no run folder."""
    if (shelf := open_shelf(config)) is None:
        return
    study = join_study(config, open_storage(storage or config.storage.url, config.run_folder))
    shelf.fetch_records(t.user_attrs["candidate"] for t in study.get_trials(deepcopy=False) if is_settled(t))


def _test_those_that_count(config: StudyConfig, workshop: Any, watcher: Watcher, stop: Stop, storage: str | None) -> None:
    """Decode the test split for the baselines and the front, where that was not done before; one worker does."""
    from prunesearch.report.front import pareto_front, pooled_by_system
    from prunesearch.training.evaluate import decode_test

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
        workshop = workshop or open_workshop(config, watcher, stop.check)
        shelf = open_shelf(config)
        for done, record in enumerate(due):
            watcher.progress("decoding test", done, len(due))
            decode_test(workshop, record)
            if shelf:
                shelf.put_record(record.candidate.key)
