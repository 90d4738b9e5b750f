"""Workers that come, go, stall and die, on every kind of storage: nothing twice, nothing lost, nothing left hanging."""

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from sqlalchemy.engine import make_url

from prunesearch.commands import status as control
from prunesearch.commands.launch import launch
from prunesearch.commands.slurm import submit
from prunesearch.search.samplers import CandidateSampler
from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Interrupt, Interrupted
from prunesearch.study.progress import NullListener
from prunesearch.study.record import RunRecord, read_records
from prunesearch.workers import lease as leases
from prunesearch.workers import loop, retry
from prunesearch.workers.artifacts import ArtifactMirror
from prunesearch.workers.claim import claim
from prunesearch.workers.exclusive import ExclusiveTask, run_exclusively
from prunesearch.workers.lease import ATTEMPTS, LEASE_SECONDS, Lease, LeaseMonitor, release_stale
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import check_writable, load_stored_study, lock_provenance, open_study
from prunesearch.workers.registration import create_study
from prunesearch.workers.retry import RetryingStorage, is_away
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import WorkerTrial
from prunesearch.workers.urls import filled_in, holds_secret, shown
from tests.conftest import write_study
from tests.servers import GrpcProxy, Postgres, until
from tests.test_launch import ROOT, cli, outcomes
from tests.test_search import landscape, rules, space

FORK = multiprocessing.get_context("fork")


class Notes(NullListener):
    """A listener that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def started_postgres() -> Postgres:
    """A laptop without PostgreSQL skips what needs it."""
    try:
        return Postgres()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = started_postgres()
    yield server
    server.remove()


@pytest.fixture
def config(toy: Path, tmp_path: Path) -> StudyConfig:
    return load_study(write_study(tmp_path / f"study-{random.getrandbits(40):x}", toy))


def opened(config: StudyConfig, url: str | None, notes: list[str] | None = None) -> StoredStudy:
    storage = open_storage(url, config.run_folder, (notes if notes is not None else []).append)
    return open_study(config, storage, space(), CandidateSampler(space(), 0))


def finished(stored: StoredStudy) -> int:
    return StudyProgress.of(stored.trials()).finished


def complete(stored: StoredStudy) -> list[str]:
    return [t.user_attrs["candidate"] for t in stored.trials(TrialState.COMPLETE)]


def labour(source: Path, url: str | None, trials: int, seconds: float, locked: bool = True) -> None:
    """A worker process: every candidate takes a while, and is written down."""
    config = load_study(source)

    def evaluate(trial: WorkerTrial) -> RunRecord:
        with (source.parent / "evaluated.txt").open("a") as log:
            log.write(trial.key + "\n")
        time.sleep(seconds * random.random())
        return landscape(trial.candidate)

    storage = open_storage(url, config.run_folder, lambda text: None)
    if not locked:
        storage.advisory_lock = lambda study_name: contextlib.nullcontext()
    study = open_study(config, storage, space(), CandidateSampler(space(), 0))
    run_loop(study, rules(config, trials), evaluate)


def started(config: StudyConfig, url: str | None, count: int, *arguments: object) -> list[multiprocessing.process.BaseProcess]:
    processes = [FORK.Process(target=labour, args=(config.source, url, *arguments)) for _ in range(count)]
    for process in processes:
        process.start()
    return list(processes)


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


def test_killed_workers_candidates_go_to_the_others_and_nothing_is_evaluated_twice(
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


def test_several_create_a_study_at_once(config: StudyConfig, postgres: Postgres) -> None:
    import psycopg

    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS fresh")
        connection.execute("CREATE DATABASE fresh")
    workers = started(config, postgres.url.replace("/postgres", "/fresh"), 6, 6, 0.01)
    for process in workers:
        process.join(60)
    assert [p.exitcode for p in workers] == [0] * 6


def test_a_database_that_restarts_is_waited_for(config: StudyConfig) -> None:
    server = started_postgres()
    try:
        study = opened(config, server.url)
        workers = started(config, server.url, 3, 24, 0.2)
        for count in (4, 9):
            until(lambda count=count: finished(study) >= count, "progress")  # type: ignore[misc]
            server.stop()
            time.sleep(1)
            server.start()
        for process in workers:
            process.join(90)
        assert [p.exitcode for p in workers] == [0] * 3
        assert len(set(complete(study))) == len(complete(study)) == 24
        begun = Counter((config.folder / "evaluated.txt").read_text().split())
        assert set(begun.values()) == {1}
    finally:
        server.remove()


def test_a_proxy_that_restarts_is_waited_for(config: StudyConfig, postgres: Postgres) -> None:
    proxy = GrpcProxy(postgres.url)
    notes: list[str] = []
    study = opened(config, proxy.url, notes)
    workers = started(config, proxy.url, 2, 12, 0.2)
    until(lambda: finished(study) >= 4, "progress")
    proxy.stop()
    back = threading.Timer(1.0, proxy.start)
    back.start()
    assert finished(study) >= 4
    back.join()
    for process in workers:
        process.join(90)
    proxy.stop()
    assert [p.exitcode for p in workers] == [0, 0]
    assert [note.split(" (")[0].split(" after")[0] for note in notes] == [
        "the storage is unavailable",
        "the storage is available again",
    ]


def frozen(study: optuna.Study, lease: Lease | None) -> optuna.trial.FrozenTrial:
    trial = study.ask()
    if lease:
        trial.set_user_attr("lease", vars(lease))
    return study.get_trials(deepcopy=False)[trial.number]


def test_a_mark_that_stays_the_same_for_a_minute_of_ones_own_clock_is_a_lost_workers() -> None:
    study = optuna.create_study(directions=["minimize"] * 2)
    elsewhere = Lease("there", "another machine", 1, 0.0, renewed=time.time() + 9999)  # its clock is hours off
    trial = frozen(study, elsewhere)
    now = [0.0]
    watch = LeaseMonitor(lambda: now[0])

    def look(after: float) -> list[int]:
        now[0] += after
        return [t.number for t in watch.stale([trial])]

    assert look(0) == []
    assert look(LEASE_SECONDS / 3) == look(LEASE_SECONDS / 3) == []
    trial.user_attrs["lease"] = vars(replace(elsewhere, beat=1))
    assert look(LEASE_SECONDS / 3) == look(LEASE_SECONDS / 3) == look(LEASE_SECONDS / 3) == []
    assert look(LEASE_SECONDS / 3) == [0]


def test_who_could_not_look_for_a_while_begins_anew() -> None:
    study = optuna.create_study(directions=["minimize"] * 2)
    trial = frozen(study, Lease("there", "another machine", 1, 0.0))
    now = [0.0]
    watch = LeaseMonitor(lambda: now[0])
    watch.stale([trial])
    now[0] = 10 * LEASE_SECONDS  # asleep, or the storage was away and nobody could leave a mark
    assert watch.stale([trial]) == []


def test_a_process_of_this_machine_that_has_ended_is_lost_at_once_one_elsewhere_is_not() -> None:
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
        if trial.key == "full" and times["full"] == 1:  # asleep for long: somebody takes it for lost
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


def test_a_candidate_that_workers_crash_over_has_failed_after_a_few_times(config: StudyConfig) -> None:
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


def test_calls_are_made_again_while_the_storage_is_away_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    notes: list[str] = []

    class Shaky(InMemoryStorage):
        broken = 0
        lost_answers = 0

        def create_new_trial(self, *args: object, **kwargs: object) -> int:
            if self.broken:
                self.broken -= 1
                raise OSError(errno.ENOSPC, "full")
            return super().create_new_trial(*args, **kwargs)  # type: ignore[arg-type]

        def set_trial_state_values(self, *args: object, **kwargs: object) -> bool:
            done = super().set_trial_state_values(*args, **kwargs)  # type: ignore[arg-type]
            if self.lost_answers:
                self.lost_answers -= 1
                raise OSError(errno.EIO, "the answer is lost")
            return done

    shaky = Shaky()
    storage = RetryingStorage(shaky, notes.append)
    study = StoredStudy(optuna.create_study(storage=storage), storage)
    shaky.broken = 3
    trial = study.study.ask()
    assert len(notes) == 2
    shaky.lost_answers = 1
    study.end_trial(trial, TrialState.COMPLETE, [1.0])
    assert study.study.best_value == 1.0
    shaky.broken = 1
    study.study.ask()
    assert len(notes) == 2, "one failure is no news"
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        study.end_trial(trial, TrialState.COMPLETE, [1.0])
    assert not is_away(ValueError())
    assert not is_away(FileNotFoundError(errno.ENOENT, "gone"))


def test_locks_that_killed_workers_left_hold_nobody_up(config: StudyConfig) -> None:
    opened(config, None)
    for name in ("journal.log.lock", "journal.log.turn", "claim.lock", "test.lock"):
        (config.run_folder / name).touch()
    begin = time.monotonic()
    labour(config.source, None, 4, 0.0)
    assert time.monotonic() - begin < 20


def test_a_stop_hands_the_candidate_back_and_aborting_stops_everybody(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    study, stop = opened(config, None), Interrupt()

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full+lora8":
            assert control.abort(config.source) == 1
            until(lambda: stop.requested, "word of it")
            stop.check()
        return landscape(trial.candidate)

    with pytest.raises(Interrupted):
        run_loop(study, rules(config, 9), evaluate, stop)
    assert control.status(config.source)["aborted"]
    assert finished(study) == 1
    with pytest.raises(Interrupted):  # until it is launched again, nobody goes on
        run_loop(study, rules(config, 9), evaluate)
    assert finished(study) == 1


def test_what_failed_can_be_tried_again(config: StudyConfig) -> None:
    study, good = opened(config, None), []

    def evaluate(trial: WorkerTrial) -> RunRecord:
        state = "complete" if good or trial.key != "full" else "failed"
        return landscape(trial.candidate).model_copy(update={"state": state, "reason": "because"})

    def go() -> None:
        run_loop(study, rules(config, 5), evaluate)

    go()
    assert control.retry(config.source) == ["full"]
    assert control.retry(config.source) == [], "it waits already"
    assert finished(study) == 4
    good.append(True)
    go()
    assert finished(study) == 5
    assert complete(study).count("full") == 1


def test_other_code_and_other_data_are_refused_unless_they_are_adopted(config: StudyConfig) -> None:
    study = opened(config, None)
    lock_provenance(study, "data", {"dev": {"utterances": 4, "digest": "a"}})
    lock_provenance(study, "data", {"dev": {"utterances": 4, "digest": "a"}})
    with pytest.raises(StudyError) as caught:
        lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}})
    assert caught.value.lines[:2] == [
        "data.dev.digest: the study has 'a', this worker 'b'",
        "data.dev.utterances: the study has 4, this worker 5",
    ]
    lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}}, allow_changes=True)
    lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}})


def test_a_worker_with_other_texts_may_not_join(toy: Path, tmp_path: Path) -> None:
    manifest = (toy / "dev.jsonl").read_text().replace('"dev/', f'"{toy}/dev/')
    (tmp_path / "dev.jsonl").write_text(manifest)
    file = write_study(tmp_path / "s", toy, data={"dev": str(tmp_path / "dev.jsonl")})
    launch(file, trials=1)
    (tmp_path / "dev.jsonl").write_text(manifest.replace('"text": "low', '"text": "mid', 1))
    told = cli("worker", file)
    assert told.returncode == 2
    assert [line.split(":")[0] for line in told.stderr.splitlines()][:1] == ["data.dev.digest"]
    assert cli("worker", file, "--allow-changes").returncode == 0


def test_nobody_joins_what_nobody_launched(toy: Path, tmp_path: Path) -> None:
    done = cli("worker", write_study(tmp_path / "s", toy))
    assert done.returncode == 2
    assert "`prunesearch launch" in done.stderr


def test_sigterm_leaves_a_checkpoint_and_the_study_ends_as_if_nothing_had_been(toy: Path, tmp_path: Path) -> None:
    settings = {"training": {"steps": 60}, "search": {"trials": 5}}
    calm, stopped = (write_study(tmp_path / name / "s", toy, **settings) for name in ("calm", "stopped"))
    launch(calm)
    command = [sys.executable, "cli.py", "launch", str(stopped)]
    records = stopped.parent / "run" / "records"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list(records.glob("*/curve.jsonl")), "a training")
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert time.monotonic() - begin < 20
    assert "stopping" in told
    assert control.status(stopped)["running"] == []
    assert control.status(stopped)["ended"] == {"handed back": 1}
    assert list(records.glob("*/checkpoint.pt"))
    launch(stopped)
    assert outcomes(stopped) == outcomes(calm)


def test_secrets_are_shown_to_nobody(toy: Path, tmp_path: Path, postgres: Postgres) -> None:
    file = write_study(tmp_path / "s", toy)
    env = {**os.environ, "STUDY_URL": postgres.url}
    done = cli("launch", file, "--storage", "${STUDY_URL}", "--trials", "2", "--workers", "2", env=env)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    for command in ("status", "report", "validate"):
        arguments = ["--storage", "${STUDY_URL}"] if command == "status" else []
        told += "".join(cli(command, file, *arguments, env=env).__dict__[out] for out in ("stdout", "stderr"))
    wrong = postgres.url.replace(Postgres.PASSWORD, Postgres.PASSWORD + "x")
    refused = cli("status", file, "--storage", wrong)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    told += refused.stderr
    written = b"".join(p.read_bytes() for p in file.parent.rglob("*") if p.is_file())
    assert Postgres.PASSWORD not in told
    assert Postgres.PASSWORD.encode() not in written
    assert len(read_records(file.parent / "run" / "records")) == 2


def test_a_password_may_come_from_the_environment(tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match="cannot be opened"):
        open_storage(postgres.url_without_password, tmp_path)
    monkeypatch.setenv("PGPASSWORD", Postgres.PASSWORD)
    open_storage(postgres.url_without_password, tmp_path).get_all_studies()
    assert shown("mysql+pymysql://me:secret@host/db?ssl_key=x") == "mysql+pymysql://me:***@host/db"


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("study.db", "must be a URL"),
        ("grpc://nowhere", "grpc://host:port"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/db", "cannot be opened"),
        ("grpc://127.0.0.1:1", "cannot be opened"),
        ("oracle+nodriver://me:secret@host/db", "driver"),
        ("journal:///proc/nowhere/journal.log", "cannot be written"),
    ],
)
def test_a_storage_that_cannot_be_had_is_one_line(url: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=rule) as caught:
        open_storage(url, tmp_path)
    assert len(caught.value.lines) == 1
    assert "secret" not in str(caught.value)


def test_end_lost_ends_what_has_no_mark_at_all_after_a_minute(config: StudyConfig) -> None:
    study = opened(config, None)
    study.study.ask()
    now = [0.0]
    watch = LeaseMonitor(lambda: now[0])
    for _ in range(3):
        assert release_stale(study, watch) == []
        now[0] += LEASE_SECONDS / 3
    assert release_stale(study, watch) == [""]
    assert not study.trials(TrialState.RUNNING)


def test_workers_without_a_common_folder_share_anchor_checkpoints_and_records(toy: Path, tmp_path: Path) -> None:
    storage = {"url": f"journal://{tmp_path}/journal.log", "artifacts": str(tmp_path / "shelf")}
    settings = {"search": {"trials": 7}, "training": {"steps": 30}}
    here, there = (write_study(tmp_path / name / "s", toy, storage=storage, **settings) for name in ("here", "there"))
    alone = write_study(tmp_path / "alone" / "s", toy, **settings)
    launch(here, trials=1)
    optuna.load_study(study_name="s", storage=open_storage(storage["url"], tmp_path)).set_user_attr("trials", 7)
    command = [sys.executable, "cli.py", "worker", str(there)]
    elsewhere = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list((there.parent / "run" / "records").glob("*/checkpoint.pt")) or elsewhere.poll() is not None, "work")
    launch(here)
    _, told = elsewhere.communicate(timeout=120)
    assert elsewhere.returncode == 0, told
    launch(alone, trials=7)
    found, theirs, expected = ({k: {**v, "test": 0} for k, v in outcomes(f).items()} for f in (here, there, alone))
    assert len(found) == 7
    assert found == theirs
    both = found.keys() & expected.keys()  # together, they propose otherwise than one alone
    assert len(both) >= 4
    assert all(found[key] == expected[key] for key in both)
    anchors = [(f.parent / "run" / "anchor" / "projector.safetensors").stat().st_mtime_ns for f in (here, there)]
    assert anchors[0] < anchors[1], "the second one was fetched"


def test_half_a_file_on_the_shelf_is_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    mine, theirs = (ArtifactMirror.open(str(tmp_path / "shelf"), "s", tmp_path / name) for name in ("a", "b"))
    (tmp_path / "a" / "x.bin").write_bytes(b"0123456789")
    mine.put("x.bin")
    (stored,) = (tmp_path / "shelf").iterdir()
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1])
    assert not theirs.fetch("x.bin")
    stored.write_bytes(whole)
    assert theirs.fetch("x.bin")
    assert (tmp_path / "b" / "x.bin").read_bytes() == b"0123456789"


def test_of_many_one_does_it_and_if_it_dies_another(tmp_path: Path) -> None:
    url, log, done = f"journal://{tmp_path}/journal.log", tmp_path / "log", tmp_path / "done"

    def act() -> None:
        with log.open("a") as file:
            file.write("x")
        if len(log.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        done.touch()

    def one() -> None:
        task = ExclusiveTask("s (anchor)", done.exists, lambda confirm: act())
        run_exclusively(open_storage(url, tmp_path), task, Interrupt())

    processes = [FORK.Process(target=one) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(p.exitcode or 0 for p in processes) == [-signal.SIGKILL, 0, 0, 0]
    assert log.read_text() == "xx"


def test_tables_of_an_older_optuna_are_named_and_can_be_upgraded(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy)
    url = f"sqlite:///{tmp_path}/study.db"
    open_storage(url, tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    with pytest.raises(StudyError, match=r"`prunesearch storage upgrade STUDY`"):
        open_storage(url, tmp_path)
    done = cli("storage", "upgrade", file, "--storage", url)
    assert done.returncode == 0, done.stderr
    open_storage(url, tmp_path)


def test_a_storage_that_may_only_be_read_is_told_before_anything_is_trained(config: StudyConfig, postgres: Postgres) -> None:
    import psycopg

    opened(config, postgres.url)
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN PASSWORD 'x' IN ROLE pg_read_all_data")
    storage = open_storage(postgres.url.replace(f"study:{Postgres.PASSWORD}", "reader:x"), config.run_folder)
    with pytest.raises(StudyError, match="can be read, but not written"):
        check_writable(load_stored_study(config, storage))


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


def test_a_retry_that_is_interrupted_is_still_due(config: StudyConfig) -> None:
    study, state = opened(config, None), ["fail"]

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full" and state[0] == "stop":
            state[0] = "good"
            raise Interrupted
        bad = trial.key == "full" and state[0] == "fail"
        return landscape(trial.candidate).model_copy(update={"state": "failed" if bad else "complete", "reason": "because"})

    def go() -> None:
        run_loop(study, rules(config, 5), evaluate)

    go()
    control.retry(config.source)
    state[0] = "stop"
    with pytest.raises(Interrupted):
        go()
    go()
    assert complete(study).count("full") == 1
    assert finished(study) == 5


def test_a_budget_that_is_widened_meanwhile_is_seen_and_never_shrinks_unasked(config: StudyConfig) -> None:
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


def test_something_that_goes_wrong_beside_a_trial_does_not_cost_it(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("password", ["p@ss:w/o?r#d", "plain", "%41${X}"])
def test_a_password_may_hold_any_character(password: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", password)
    url = "postgresql+psycopg://me:${SECRET}@127.0.0.1:1/db"
    assert make_url(filled_in(url)).password == password
    assert not holds_secret(url)
    assert holds_secret(url.replace("${SECRET}", "x"))
    with pytest.raises(StudyError) as caught:
        open_storage(url, tmp_path)
    assert len(caught.value.lines) == 1
    assert password not in str(caught.value)


def test_a_secret_is_known_for_one_however_it_is_written() -> None:
    for url in (
        "postgresql://u:s@h/d",
        "postgresql://u:s@${HOST}/d",
        "mysql+pymysql://u@h/d?password=s",
        "mysql://h/d?passwd=s",
    ):
        assert holds_secret(url), url
    for url in ("postgresql://u:${P}@h/d", "postgresql://u@h/d", "journal:///x/y", "grpc://h:1", "sqlite:///x.db?timeout=3"):
        assert not holds_secret(url), url


def test_a_second_ctrl_c_stops_at_once(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 4000}, search={"trials": 5})
    process = subprocess.Popen([sys.executable, "cli.py", "launch", str(file)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list((file.parent / "run" / "records").glob("*/curve.jsonl")), "a training")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode in (130, 128 + signal.SIGUSR1), told
    assert "Traceback" not in told
    assert time.monotonic() - begin < 20
    assert control.status(file)["running"] == [] or not control.status(file)["running"][0]["alive"]


def test_an_arrays_jobs_work_on_the_study_and_hold_no_password(toy: Path, tmp_path: Path) -> None:
    """As SLURM would run them: submitit's local executor starts the same jobs here."""
    file = write_study(tmp_path / "s", toy)
    with pytest.raises(StudyError, match="would hold the password"):
        submit(file, 2, storage="postgresql://me:secret@host/db", cluster="local")
    jobs = submit(file, 2, trials=5, cluster="local")
    assert len(jobs) == 2
    until(lambda: control.status(file)["settled"] == 5, "five candidates", 120)
    assert {r.state for r in read_records(file.parent / "run" / "records")} == {"complete"}


def test_a_proxy_serves_databases_alone(toy: Path, tmp_path: Path) -> None:
    done = cli("storage", "proxy", write_study(tmp_path / "s", toy))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "a proxy serves a database" in done.stderr
