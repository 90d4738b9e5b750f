"""Optuna storage from a URL; by default a journal file that a kill cannot spoil."""

import logging
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from prunesearch.study.errors import StudyError
from prunesearch.workers.retry import patient

logging.getLogger("filelock").setLevel(logging.WARNING)

FORMS = (
    "postgresql+psycopg://user@host/db, mysql+pymysql://…, grpc://host:port, journal:///path/journal.log or sqlite:///study.db"
)
VARIABLE = re.compile(r"\$\{?\w+\}?")
TURN_SECONDS = 30.0
CREATE_ATTEMPTS = 8  # of workers that make the tables of a new database at once, all but one fail


class _MendingLock(JournalFileOpenLock):
    """The journal's lock. The operating system releases it when its holder is killed; Optuna's own lock files stay.

    A kill in the middle of a write leaves half a line, after which Optuna cannot read the journal any more once somebody
    has appended to it. So whoever takes the lock first cuts the file back to its last whole line.
    """

    def __init__(self, journal: Path):
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        try:
            with self._journal.open("rb+") as file:
                end = file.seek(0, 2)
                file.seek(max(0, end - 1))
                if end and file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except OSError:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        self._lock.release()


def open_storage(
    url: str | None,
    run_folder: Path,
    note: Callable[[str], None] = print,
    leaving: Callable[[], bool] = lambda: False,
) -> BaseStorage:
    """The storage at the URL; without one, `journal.log` in the run folder.

    A URL may hold ${VARIABLES}; a password may also come from where the driver looks for it (PGPASSWORD). A storage that
    goes away later is waited for, and `note` is told. Raises StudyError, without the password, when it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # of a storage that is away, `note` tells
    if url is None:
        return patient(_journal(run_folder / "journal.log"), note, leaving)
    if url.startswith("journal://"):
        return patient(_journal(Path(os.path.expandvars(url).removeprefix("journal://"))), note, leaving)
    url = filled_in(url)
    try:
        return patient(_grpc(url) if url.startswith("grpc://") else _database(url), note, leaving)
    except StudyError:
        raise
    except Exception as error:
        raise StudyError([f"storage.url: {shown(url)} cannot be opened ({_reason(error, url)})"]) from None


def _journal(journal: Path) -> BaseStorage:
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.touch()
        lock = _MendingLock(journal)
        lock.acquire()
        lock.release()
    except OSError as error:
        raise StudyError([f"storage.url: {journal} cannot be written ({error.strerror})"]) from None
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))


def _grpc(url: str) -> BaseStorage:
    if not (match := re.fullmatch(r"grpc://([^:/]+):(\d+)/?", url)):
        raise StudyError([f"storage.url: must look like grpc://host:port, got {shown(url)}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            storage = GrpcStorageProxy(host=match[1], port=int(match[2]))
        except ImportError:
            raise StudyError(["storage.url: gRPC is not installed: pip install 'prunesearch[grpc]'"]) from None
    storage.wait_server_ready(timeout=10)
    storage.get_all_studies()  # the server may be there, and its database not
    return storage


def _database(url: str) -> BaseStorage:
    backend = make_url(url).get_backend_name()
    # a connection that has died is noticed by its first call, which is made again: asking before each costs as much again
    options: dict[str, Any] = {} if backend == "sqlite" else {"pool_pre_ping": False, "pool_recycle": 1800}
    if backend == "postgresql":
        # a wire that is cut says nothing: the kernel alone would wait for a quarter of an hour
        alive = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
        given = make_url(url).query
        options["connect_args"] = {"connect_timeout": 10} | {k: v for k, v in alive.items() if k not in given}
        if "options" not in given:  # and of a worker whose machine has lost power, the server would keep its locks for hours
            theirs = "tcp_keepalives_idle=30 tcp_keepalives_interval=10 tcp_keepalives_count=3".split()
            theirs += ["idle_in_transaction_session_timeout=60s", "lock_timeout=30s"]
            options["connect_args"]["options"] = " ".join(f"-c {setting}" for setting in theirs)
    if backend == "mysql":
        options["connect_args"] = {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60}
    for attempt in range(CREATE_ATTEMPTS):
        try:
            return _CachedStorage(RDBStorage(url, engine_kwargs=options))
        except (ImportError, NoSuchModuleError) as error:
            extra = {"postgresql": "pip install 'prunesearch[postgresql]'", "mysql": "pip install 'prunesearch[mysql]'"}
            fix = extra.get(backend, f"install the driver that {backend} needs")
            raise StudyError([f"storage.url: {shown(url)} needs a driver that is not installed: {fix}"]) from error
        except RuntimeError as error:  # Optuna's word for tables of another version
            if "compatible" not in str(error):
                raise
            raise StudyError(
                [f"storage.url: the tables at {shown(url)} are of another Optuna's making: `prunesearch storage upgrade STUDY`"]
            ) from None
        except Exception:
            if attempt + 1 == CREATE_ATTEMPTS or not _is_there(url, options):
                raise
            time.sleep(random.uniform(0.05, 0.4) * (attempt + 1))  # another worker is making the tables
    raise AssertionError("unreachable")


def _is_there(url: str, options: dict[str, Any]) -> bool:
    from sqlalchemy import create_engine

    engine = create_engine(url, **options)
    try:
        engine.connect().close()
    except Exception:
        return False
    finally:
        engine.dispose()
    return True


def upgrade_storage(url: str) -> str:
    """Bring the tables of a database to what the installed Optuna needs; returns the schema's version. Raises StudyError."""
    url = filled_in(url)
    try:
        storage = RDBStorage(url, skip_compatibility_check=True, skip_table_creation=True)
        storage.upgrade()
    except Exception as error:
        raise StudyError([f"storage.url: {shown(url)} cannot be upgraded ({_reason(error, url)})"]) from None
    return storage.get_current_version()


def filled_in(url: str) -> str:
    """The URL with its ${VARIABLES}: a password may hold any character. Raises StudyError for what is no URL."""
    url = os.path.expandvars(url) if VARIABLE.fullmatch(url) else url
    try:
        if "://" not in url:
            raise ArgumentError
        parsed = make_url(url)
        expand = os.path.expandvars
        return parsed.set(
            username=parsed.username and expand(parsed.username),
            password=parsed.password and expand(str(parsed.password)),
            host=parsed.host and expand(parsed.host),
            database=parsed.database and expand(parsed.database),
        ).render_as_string(hide_password=False)
    except (ArgumentError, ValueError):
        raise StudyError([f"storage.url: must be a URL, such as {FORMS}, got {shown(url)}"]) from None


def holds_secret(url: str) -> bool:
    """Whether a password is written in the URL itself, not as a ${VARIABLE} of the environment."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return "@" in url
    written = [str(v) for v in (parsed.password, *parsed.query.values()) if v]
    names = {k.lower() for k in parsed.query}
    secret = parsed.password is not None and not VARIABLE.fullmatch(str(parsed.password))
    return bool(written) and (secret or bool(names & {"password", "passwd", "pass"}))


def shown(url: str) -> str:
    """The URL as it may be printed: without password and options."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url.split("://")[0] + "://…" if "@" in url or "://" in url else repr(url)
    return parsed.set(query={}).render_as_string(hide_password=True)


def _reason(error: Exception, url: str) -> str:
    """The first line of what a driver says, secrets left out."""
    cause = error.__cause__ or error
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else ""
    first = first.replace(url, shown(url))
    with suppress(ArgumentError, ValueError):
        parsed = make_url(url)
        for secret in (parsed.password, *(v for v in parsed.query.values() if isinstance(v, str))):
            first = first.replace(str(secret), "***") if secret else first
    return f"{type(cause).__name__}: {first}".removesuffix(": ")


@contextmanager
def _for_a_while(path: Path) -> Iterator[None]:
    """A lock on a file; who holds it for long has stalled, and is not waited for."""
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=TURN_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def turn(storage: BaseStorage, study_name: str, run_folder: Path) -> Iterator[None]:
    """One worker at a time, as far as the storage can see to that: so that workers do not propose the same at once.

    A courtesy: that no candidate is trained twice rests on `claims`. A database's own lock goes when its holder does, and so
    does a lock on a file; through gRPC there is none.
    """
    inner = getattr(storage, "inner", storage)
    if isinstance(inner, JournalStorage):
        backend = inner._backend
        assert isinstance(backend, JournalFileBackend)
        with _for_a_while(Path(f"{backend._file_path}.turn")):
            yield
        return
    engine = inner._backend.engine if isinstance(inner, _CachedStorage) and isinstance(inner._backend, RDBStorage) else None
    dialect = engine.dialect.name if engine is not None else ""
    if dialect == "sqlite":
        with _for_a_while(run_folder / "claim.lock"):
            yield
        return
    locks = {
        "postgresql": ("SELECT pg_advisory_lock(hashtext(:n))", "SELECT pg_advisory_unlock(hashtext(:n))"),
        "mysql": ("SELECT GET_LOCK(:n, 30)", "SELECT RELEASE_LOCK(:n)"),
    }
    if engine is None or dialect not in locks:
        yield
        return
    take, leave = locks[dialect]
    name = {"n": f"prunesearch {study_name}"[:64]}
    connection = None
    with suppress(Exception):  # away: whatever comes next waits for it
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text(take), name)
    try:
        yield
    finally:
        if connection is not None:
            with suppress(Exception):
                connection.execute(text(leave), name)
            with suppress(Exception):
                connection.close()
