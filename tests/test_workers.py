"""Workers that come, go, stall and die, on every kind of storage: nothing twice, nothing lost, nothing left hanging."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from prunesearch.commands import status as control
from prunesearch.commands.launch import launch
from prunesearch.search.samplers import CandidateSampler
from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.interrupt import Interrupt
from prunesearch.study.record import RunRecord
from prunesearch.workers import lease as leases
from prunesearch.workers import loop
from prunesearch.workers.claim import claim
from prunesearch.workers.lease import ATTEMPTS, LEASE_SECONDS, Lease, LeaseMonitor, release_stale
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import load_stored_study, open_study
from prunesearch.workers.registration import create_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import WorkerTrial
from tests.conftest import write_study
from tests.servers import GrpcProxy, Postgres, until
from tests.test_launch import ROOT, outcomes
from tests.test_search import landscape, rules, space
from tests.workers_helpers import Notes, complete, finished, opened, started


@pytest.fixture(params=["journal", "postgres", "grpc"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "journal":
        yield None
        return
    postgres = request.getfixturevalue("postgres")
    if request.param == "postgres":
        yield postgres.url
        return
    proxy = GrpcProxy(postgres.url)
    yield proxy.url
    proxy.stop()


def test_candidates_of_killed_workers_go_to_the_others_and_none_is_evaluated_twice(
    config: StudyConfig, url: str | None
) -> None:
    workers = started(config, url, 4, 20, 0.1)
    study = opened(config, url)
    until(lambda: finished(study) >= 5, "five candidates")
    for process in workers[:2]:
        os.kill(process.pid or 0, signal.SIGKILL)
    for process in workers[2:]:
        process.join(60)
    assert [p.exitcode for p in workers[2:]] == [0, 0]
    assert len(set(complete(study))) == len(complete(study)) == 20
    assert not study.trials(TrialState.RUNNING, TrialState.WAITING)
    begun = Counter((config.folder / "evaluated.txt").read_text().split())
    assert sum(begun.values()) <= 22, "only what the killed workers were at is evaluated again"


def test_workers_without_any_lock_still_take_each_candidate_once(config: StudyConfig, postgres: Postgres) -> None:
    opened(config, postgres.url)
    workers = started(config, postgres.url, 6, 17, 0.02, False)
    for process in workers:
        process.join(90)
    assert [p.exitcode for p in workers] == [0] * 6
    study = opened(config, postgres.url)
    assert len(complete(study)) == len(set(complete(study))) == 17, "not one more than the budget"
    begun = Counter((config.folder / "evaluated.txt").read_text().split())
    assert set(begun.values()) == {1}


def test_a_trial_that_came_in_between_is_seen(config: StudyConfig, url: str | None) -> None:
    """Somebody without the lock takes the candidate while it is being proposed."""

    class Overtaken(CandidateSampler):
        rival = ""

        def choose(self, study: optuna.Study, trial: optuna.trial.FrozenTrial | None, others: StudyProgress) -> Candidate:
            candidate = super().choose(study, trial, others)
            if not self.rival:
                self.rival = candidate.key
                elsewhere = asdict(replace(Lease.mine(), place="elsewhere"))
                attrs = {"candidate": candidate.key, "lease": elsewhere}
                load_stored_study(config, open_storage(url, config.run_folder)).create_running_trial(attrs)
            return candidate

    study = opened(config, url)
    study.study.sampler = sampler = Overtaken(space(), 0)
    claimed = claim(study, rules(config, 5), LeaseMonitor(), Interrupt())
    assert claimed is not None
    assert sampler.rival == "full" != claimed.candidate.key
    trials = study.trials()
    assert [t.user_attrs.get("ended") for t in trials] == [None, "duplicate", None]


@pytest.mark.parametrize("ended", ["lost", "crashed", "handed back"])
def test_a_duplicate_whose_worker_was_killed_does_not_hide_the_outcome(ended: str) -> None:
    complete = optuna.trial.create_trial(values=[0.1, 5.0], user_attrs={"candidate": "minus-2"})
    lost = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"candidate": "minus-2", "ended": ended})
    retried = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={**lost.user_attrs, "retry": True})
    for number, trial in ((7, complete), (8, lost), (8, retried)):
        trial.number = number
    for trials in ([complete, lost], [lost, complete]):
        progress = StudyProgress.of(trials)
        assert (progress.finished, progress.released) == (1, [])
    progress = StudyProgress.of([complete, retried])
    assert (progress.finished, progress.released) == (0, ["minus-2"])


def test_a_later_trial_does_not_hide_an_outcome(config: StudyConfig) -> None:
    """While a candidate is proposed, a rival completes it; before this worker looks again, another rival begins it."""
    elsewhere = asdict(replace(Lease.mine(), place="elsewhere"))

    class Crowded(StoredStudy):
        def create_running_trial(self, attrs: Mapping[str, Any]) -> optuna.Trial:
            if attrs["candidate"] != "full":
                return super().create_running_trial(attrs)
            for_others = {**attrs, "lease": elsewhere}
            self.end_trial(super().create_running_trial(for_others), TrialState.COMPLETE, [0.5, 100.0])
            ours = super().create_running_trial(attrs)
            super().create_running_trial(for_others)
            return ours

    stored = opened(config, None)
    claimed = claim(Crowded(stored.study, stored.storage), rules(config, 5), LeaseMonitor(), Interrupt())
    assert claimed is not None
    assert claimed.key != "full"
    assert [t.user_attrs.get("ended") for t in stored.trials()] == [None, "duplicate", None, None]


def frozen(study: optuna.Study, lease: Lease | None) -> optuna.trial.FrozenTrial:
    trial = study.ask()
    if lease:
        trial.set_user_attr("lease", vars(lease))
    return study.get_trials(deepcopy=False)[trial.number]


def test_a_heartbeat_that_is_unchanged_for_a_minute_of_the_observers_clock_is_stale() -> None:
    study = optuna.create_study(directions=["minimize"] * 2)
    elsewhere = Lease("there", "another machine", 1, 0.0, renewed=time.time() + 9999)  # its clock is hours off
    trial = frozen(study, elsewhere)
    now = [0.0]
    monitor = LeaseMonitor(lambda: now[0])

    def look(after: float) -> list[int]:
        now[0] += after
        return [t.number for t in monitor.stale([trial])]

    assert look(0) == []
    assert look(LEASE_SECONDS / 3) == look(LEASE_SECONDS / 3) == []
    trial.user_attrs["lease"] = vars(replace(elsewhere, beat=1))
    assert look(LEASE_SECONDS / 3) == look(LEASE_SECONDS / 3) == look(LEASE_SECONDS / 3) == []
    assert look(LEASE_SECONDS / 3) == [0]


def test_an_observer_that_was_suspended_starts_anew() -> None:
    study = optuna.create_study(directions=["minimize"] * 2)
    trial = frozen(study, Lease("there", "another machine", 1, 0.0))
    now = [0.0]
    monitor = LeaseMonitor(lambda: now[0])
    monitor.stale([trial])
    now[0] = 10 * LEASE_SECONDS  # suspended, or the storage was away and no worker could write a heartbeat
    assert monitor.stale([trial]) == []


def test_a_process_that_has_ended_is_noticed_at_once_on_its_own_machine_only() -> None:
    mine = Lease.mine()
    assert not mine.has_ended()
    assert replace(mine, pid=2**22 + 1).has_ended()
    assert replace(mine, started=mine.started - 60).has_ended(), "the same number, another process"
    assert not replace(mine, place="another container", pid=2**22 + 1).has_ended()


def test_a_slow_worker_that_comes_back_overwrites_nothing(config: StudyConfig) -> None:
    heard = Notes()
    study = opened(config, None)
    times = Counter[str]()

    def evaluate(trial: WorkerTrial) -> RunRecord:
        times[trial.key] += 1
        if trial.key == "full" and times["full"] == 1:  # suspended for long: another worker treats it as dead
            (running,) = study.trials(TrialState.RUNNING)
            assert leases.release(study, running, "lost")
            assert not leases.release(study, running, "lost"), "of two that notice, one ends it"
            trial.confirm()
            raise AssertionError("the trial is not this worker's any more")
        return landscape(trial.candidate)

    run_loop(study, rules(config, 4), evaluate, listener=heard)
    assert heard.notes == ["full was given to another worker in the meantime"]
    assert times["full"] == 2
    assert complete(study).count("full") == 1
    assert finished(study) == 4


def test_an_outcome_that_comes_too_late_is_not_told(config: StudyConfig) -> None:
    study = opened(config, None)
    late: list[str] = []

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if not late:
            late.append(trial.key)
            (running,) = study.trials(TrialState.RUNNING)
            leases.release(study, running, "lost")
        return landscape(trial.candidate)

    run_loop(study, rules(config, 4), evaluate)
    assert len(complete(study)) == 4
    assert Counter(t.user_attrs.get("ended") for t in study.trials())["lost"] == 1


def test_a_candidate_that_crashes_its_workers_has_failed_after_three_times(config: StudyConfig) -> None:
    study = opened(config, None)

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full":
            raise ZeroDivisionError("in the middle of it")
        return landscape(trial.candidate)

    def go() -> None:
        run_loop(study, rules(config, 6), evaluate)

    for _ in range(ATTEMPTS["crashed"]):
        with pytest.raises(ZeroDivisionError):
            go()
    go()
    assert finished(study) == 6
    assert "full" not in complete(study)
    failed = [t for t in study.trials() if t.user_attrs.get("ended") == "failed"]
    assert [t.user_attrs["reason"] for t in failed] == ["crashed 3 times: ZeroDivisionError: in the middle of it"]


def test_a_full_disk_is_waited_for(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FULL_DISK_SECONDS", 0.1)
    study, heard = opened(config, None), Notes()
    full = [True, True]

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device", "record.json")
        return landscape(trial.candidate)

    run_loop(study, rules(config, 4), evaluate, listener=heard)
    assert finished(study) == 4
    assert len(heard.notes) == 2
    assert "disk is full (record.json)" in heard.notes[0]


def test_sigterm_leaves_a_checkpoint_and_the_resumed_study_has_the_same_outcomes(toy: Path, tmp_path: Path) -> None:
    settings = {"training": {"steps": 60}, "search": {"trials": 5}}
    calm, stopped = (write_study(tmp_path / name / "s", toy, **settings) for name in ("calm", "stopped"))
    launch(calm)
    command = [sys.executable, "cli.py", "launch", str(stopped)]
    records = stopped.parent / "run" / "records"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list(records.glob("*/curve.jsonl")), "a training")
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "stopping" in told
    assert control.status(stopped)["running"] == []
    assert control.status(stopped)["ended"] == {"handed back": 1}
    assert list(records.glob("*/checkpoint.pt"))
    launch(stopped)
    assert outcomes(stopped) == outcomes(calm)


def test_a_trial_without_any_heartbeat_is_released_after_a_minute(config: StudyConfig) -> None:
    study = opened(config, None)
    study.study.ask()
    now = [0.0]
    monitor = LeaseMonitor(lambda: now[0])
    for _ in range(3):
        assert release_stale(study, monitor) == []
        now[0] += LEASE_SECONDS / 3
    assert release_stale(study, monitor) == [""]
    assert not study.trials(TrialState.RUNNING)


def test_a_fixed_candidate_of_another_rank_may_be_added_to_a_study(config: StudyConfig) -> None:
    study = opened(config, None)

    def evaluate(trial: WorkerTrial) -> RunRecord:
        return landscape(trial.candidate)

    run_loop(study, rules(config, 6), evaluate)
    extra = Candidate((1, 3), 64)
    wider = space(named={**space().named, extra.key: extra})
    study = open_study(config, open_storage(None, config.run_folder), wider, CandidateSampler(wider, 0))
    run_loop(study, rules(config, 8, wider), evaluate)
    assert extra.key in complete(study)
    assert finished(study) == 8


def test_a_budget_that_was_raised_is_noticed_and_never_shrinks_unasked(config: StudyConfig) -> None:
    study = opened(config, None)
    create_study(config, study.storage, 5)

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full":
            study.set_attr("trials", 9)
        return landscape(trial.candidate)

    run_loop(study, rules(config, 5), evaluate)
    assert finished(study) == 9
    create_study(config, study.storage)  # launched again without --trials
    assert study.attrs["trials"] == 9
    create_study(config, study.storage, 4)
    assert study.attrs["trials"] == 4


def test_an_error_of_a_duty_does_not_end_the_trial(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.02)
    study, heard = opened(config, None), Notes()

    def evaluate(trial: WorkerTrial) -> RunRecord:
        def beats() -> int:
            return int(study.trial(trial.trial).user_attrs["lease"]["beat"])

        before = beats()
        until(lambda: heard.notes and beats() > before + 2, "some heartbeats")
        return landscape(trial.candidate)

    def upload() -> None:
        raise ConnectionError("no bucket")

    run_loop(study, rules(config, 1), evaluate, listener=heard, duty=upload)
    assert finished(study) == 1
    assert "ConnectionError: no bucket" in heard.notes[0]


def test_a_second_ctrl_c_stops_at_once(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 4000}, search={"trials": 5})
    process = subprocess.Popen([sys.executable, "cli.py", "launch", str(file)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list((file.parent / "run" / "records").glob("*/curve.jsonl")), "a training")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (130, 128 + signal.SIGUSR1), told
    assert "Traceback" not in told
    assert control.status(file)["running"] == [] or not control.status(file)["running"][0]["alive"]
