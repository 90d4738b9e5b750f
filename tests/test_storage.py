"""Storages: how a URL is opened and shown, what happens while a storage is away, and who may not read a password."""

import contextlib
import errno
import json
import random
import signal
import sqlite3
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote, quote_plus

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from sqlalchemy.engine import make_url

from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord, read_records
from prunesearch.workers import lease as leases
from prunesearch.workers import loop, retry, urls
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import check_writable, load_stored_study
from prunesearch.workers.registration import create_study
from prunesearch.workers.retry import RetryingStorage, is_away
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import WorkerTrial
from prunesearch.workers.urls import filled_in, holds_secret, redacted, shown
from tests.conftest import started_postgres, write_study
from tests.servers import GrpcProxy, Postgres, free_port, until
from tests.test_launch import ROOT, cli
from tests.test_search import landscape, rules
from tests.workers_helpers import Notes, command, complete, finished, labour, opened, started


def test_several_workers_create_a_study_at_once(config: StudyConfig, postgres: Postgres) -> None:
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


def test_calls_are_repeated_while_the_storage_is_away_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_locks_that_killed_workers_left_block_no_other_worker(config: StudyConfig) -> None:
    opened(config, None)
    for name in ("journal.log.lock", "journal.log.turn", "claim.lock", "test.lock"):
        (config.run_folder / name).touch()
    labour(config.source, None, 4, 0.0)


def test_a_password_is_neither_printed_nor_written(
    toy: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 1, "init": "scratch"}, search={"sampler": "random"})
    monkeypatch.setenv("STUDY_URL", postgres.url)
    done = cli("launch", file, "--storage", "${STUDY_URL}", "--trials", "2", "--workers", "2")
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    for words in (["status", file, "--storage", "${STUDY_URL}"], ["report", file], ["validate", file]):
        shown_to_user = command(*words)
        assert shown_to_user.code == 0
        told += shown_to_user.out + shown_to_user.err
    told += command("status", file, "--storage", postgres.url.replace(Postgres.PASSWORD, Postgres.PASSWORD + "x")).error
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
def test_a_storage_that_cannot_be_opened_is_one_line(url: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=rule) as caught:
        open_storage(url, tmp_path)
    assert len(caught.value.lines) == 1
    assert "secret" not in str(caught.value)


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


def test_a_secret_in_a_url_is_recognised_however_it_is_written() -> None:
    for url in (
        "postgresql://u:s@h/d",
        "postgresql://u:s@${HOST}/d",
        "mysql+pymysql://u@h/d?password=s",
        "mysql://h/d?passwd=s",
    ):
        assert holds_secret(url), url
    for url in ("postgresql://u:${P}@h/d", "postgresql://u@h/d", "journal:///x/y", "grpc://h:1", "sqlite:///x.db?timeout=3"):
        assert not holds_secret(url), url


def test_a_proxy_serves_only_databases(toy: Path, tmp_path: Path) -> None:
    done = cli("storage", "proxy", write_study(tmp_path / "s", toy))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "a proxy serves a database" in done.stderr


def test_a_proxy_serves_the_study_until_it_is_interrupted(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 1, "init": "scratch"}, search={"sampler": "random"})
    database, port = f"sqlite:///{tmp_path}/study.db", free_port()
    create_study(load_study(file), open_storage(database, tmp_path))
    arguments = ["storage", "proxy", str(file), "--storage", database, "--port", str(port)]
    proxy = subprocess.Popen([sys.executable, "cli.py", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert proxy.stderr is not None
        url = proxy.stderr.readline().removeprefix("workers can use --storage ").strip()
        assert url == f"grpc://localhost:{port}"
        done = command("launch", file, "--storage", url, "--trials", 2)
        assert done.code == 0, done.err
        found = json.loads(command("status", file, "--storage", url, "--json").out)
        assert (found["settled"], found["trials"]) == (2, 2)
        assert found == json.loads(command("status", file, "--storage", database, "--json").out), "the database has it"
        proxy.send_signal(signal.SIGINT)
        assert proxy.wait(30) == 128 + signal.SIGINT
    finally:
        proxy.kill()
        proxy.communicate()


# Secrets in what drivers say

PASSWORD = "p@ss:w/o r#d'\\\"%&;="
SPECIAL = "@:/?#%&=+;,'\"\\$!*()[]{}|~^`<> äß"


def test_what_a_crash_says_is_stored_and_told_without_the_password(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of a URL that was opened nor that of any other URL."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(loop, "FULL_DISK_SECONDS", 0.01)
    filled_in(f"postgresql+psycopg://me:{quote(PASSWORD, safe='')}@host/db")
    saying = f"connection to postgresql://you:other-secret@host/db failed; before that, with {PASSWORD}"
    study, heard = opened(config, None), Notes()
    errors: list[Exception] = [RuntimeError(saying), OSError(errno.EPERM, saying), OSError(errno.ENOSPC, saying)]

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if errors:
            raise errors.pop()
        until(lambda: any("beside a trial" in note for note in heard.notes), "a failed duty")
        return landscape(trial.candidate)

    def upload() -> None:
        raise ConnectionError(saying)

    for error in (PermissionError, RuntimeError, None):
        with pytest.raises(error) if error else contextlib.nullcontext():
            run_loop(study, rules(config, 2), evaluate, listener=heard, duty=upload)
    reasons = [t.user_attrs["reason"] for t in study.trials() if "reason" in t.user_attrs]
    assert len(reasons) == 3
    notes = [note for note in heard.notes if "***" in note]
    assert any("disk is full" in note for note in notes)
    assert any("beside a trial" in note for note in notes)
    for text in (*reasons, *notes):
        assert "postgresql://you:***@host/db" in text
    for text in (*reasons, *heard.notes, (config.run_folder / "journal.log").read_text()):
        assert PASSWORD not in text
        assert json.dumps(PASSWORD)[1:-1] not in text
        assert "other-secret" not in text


def messages_with(password: str) -> list[str]:
    """How drivers and libraries repeat a password that they were given."""
    in_quotes = password.replace("\\", "\\\\").replace("'", "\\'")  # as libpq's connection strings have it
    return [
        f"cannot connect to postgresql+psycopg://me:{quote(password, safe='')}@host:1/db?x=1 (refused)",
        f"cannot connect to mysql://me@host/db?user=me&password={quote_plus(password)}&x=1",
        f"connection string: host=h password='{in_quotes}' user=me",
        f"connection string: host=h user=me PASSWORD='{in_quotes}'",
    ]


def messages_with_a_known(password: str) -> list[str]:
    """The same, where only the password itself tells that it is one."""
    return [
        f"wrong password {password} for me",
        f"('host', 'me', {password!r})",
        f"connected with {quote(password, safe='')}",
        f"connected with {quote_plus(password)}",
        json.dumps({"secret": password}),
        make_url("mysql://me@host/db").set(password=password).render_as_string(hide_password=False),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_no_password_survives_redaction(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "_known_secrets", set())
    rng = random.Random(seed)
    alphabet = string.ascii_letters + string.digits + 3 * SPECIAL
    password = "Q9" + "".join(rng.choice(alphabet) for _ in range(rng.randint(4, 16))) + "Z7"

    def survives(text: str) -> bool:
        forms = (password, repr(password)[1:-1], json.dumps(password)[1:-1], quote(password, safe=""), quote_plus(password))
        return any(form in text for form in forms) or "Z7" in text or "Q9" in text

    for message in messages_with(password):
        assert survives(message)
        assert not survives(redacted(message)), (password, redacted(message))
    assert survives(redacted(messages_with_a_known(password)[0])), "no one could know"
    filled_in(f"postgresql+psycopg://me:{quote(password, safe='')}@host/db")
    for message in (*messages_with(password), *messages_with_a_known(password)):
        assert not survives(redacted(message)), (password, redacted(message))
    harmless = "no secret: a@b.c, http://host/x, key=value, passed=3"
    assert redacted(harmless) == harmless


def test_a_password_from_the_environment_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert redacted(f"wrong password {PASSWORD} for me") == "wrong password *** for me"
    monkeypatch.setenv("PGPASSWORD", "")
    assert redacted("nothing") == "nothing"
