"""Optuna storage from a URL; by default a journal file that survives killed writers."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from os.path import expandvars
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import NoSuchModuleError

from prunesearch.study.errors import StudyError
from prunesearch.study.progress import print_note
from prunesearch.workers.journal import open_journal
from prunesearch.workers.optuna_internals import StoredStudy, cached
from prunesearch.workers.retry import MEND, RetryingStorage, bounded, is_damaged
from prunesearch.workers.urls import filled_in, first_line, shown

logging.getLogger("filelock").setLevel(logging.WARNING)

LOCK_SECONDS = 30.0  # a worker that has the advisory lock for longer has stalled: the others continue without it
CREATE_ATTEMPTS = 8  # when several workers create the tables of a new database at once, all but one fail


def open_storage(
    url: str | None,
    run_folder: Path,
    note: Callable[[str], None] = print_note,
    leaving: Callable[[], bool] = lambda: False,
) -> RetryingStorage:
    """The storage at the URL; without one, `journal.log` in the run folder.

    A URL may hold ${VARIABLES}; a password may also come from where the driver looks for it (PGPASSWORD). If the storage
    becomes unavailable later, its calls wait for it, and `note` gets a message. `leaving`: see `RetryPolicy`. A file that
    can be read but not written is opened, too; its first change then fails. Raises StudyError, without the password, if the
    storage cannot be opened or is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # `note` tells when a storage is unavailable
    if url is None or url.startswith("journal://"):
        journal = run_folder / "journal.log" if url is None else Path(expandvars(url).removeprefix("journal://"))
        return RetryingStorage(open_journal(journal), note, leaving, lambda name: _file_lock(Path(f"{journal}.turn")))
    url = filled_in(url)
    try:
        if url.startswith("grpc://"):
            return RetryingStorage(_grpc(url), note, leaving, place=shown(url))
        database = _database(url)
    except StudyError:
        raise
    except Exception as error:
        fix = f": {MEND}" if is_damaged(error) else ""
        raise StudyError([f"storage.url: {shown(url)} cannot be opened ({first_line(error)}){fix}"]) from None
    return RetryingStorage(cached(database), note, leaving, _lock_of(database.engine, run_folder), shown(url))


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
    storage.get_all_studies()  # fails if the server is there and its database is not
    return storage


def _database(url: str) -> RDBStorage:
    options = _engine_options(url)
    create = bounded(
        CREATE_ATTEMPTS,
        lambda error: not isinstance(error, StudyError) and not is_damaged(error) and _answers(url, options),
        longest_wait=2,
    )
    return create(_database_once, url, options)


def _database_once(url: str, options: dict[str, Any]) -> RDBStorage:
    """Raises StudyError where another attempt would change nothing, and what the driver raises where it may."""
    try:
        return RDBStorage(url, engine_kwargs=options)
    except (ImportError, NoSuchModuleError) as error:
        backend = make_url(url).get_backend_name()
        extra = {"postgresql": "pip install 'prunesearch[postgresql]'", "mysql": "pip install 'prunesearch[mysql]'"}
        fix = extra.get(backend, f"install the driver that {backend} needs")
        raise StudyError([f"storage.url: {shown(url)} needs a driver that is not installed: {fix}"]) from error
    except RuntimeError as error:  # Optuna raises this for tables of another version
        if "compatible" not in str(error):
            raise
        fix = "run `prunesearch storage upgrade STUDY`"
        raise StudyError([f"storage.url: the tables at {shown(url)} belong to another version of Optuna: {fix}"]) from None


def _engine_options(url: str) -> dict[str, Any]:
    """Options of SQLAlchemy's engine, so that a broken connection or a vanished worker is noticed within a minute."""
    backend, given = make_url(url).get_backend_name(), make_url(url).query
    if backend == "sqlite":
        return {}
    # a dead connection is noticed by its next call, which is repeated; asking before each call would double the calls
    options: dict[str, Any] = {"pool_pre_ping": False, "pool_recycle": 1800}
    if backend == "postgresql":
        # a cut cable sends nothing: without these settings, the kernel waits for a quarter of an hour
        alive = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
        options["connect_args"] = {"connect_timeout": 10} | {k: v for k, v in alive.items() if k not in given}
        if "options" not in given:  # the server, too, would keep the locks of a machine without power for hours
            server = "tcp_keepalives_idle=30 tcp_keepalives_interval=10 tcp_keepalives_count=3".split()
            server += ["idle_in_transaction_session_timeout=60s", "lock_timeout=30s"]
            options["connect_args"]["options"] = " ".join(f"-c {setting}" for setting in server)
    if backend == "mysql":
        options["connect_args"] = {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60}
    return options


def _answers(url: str, options: dict[str, Any]) -> bool:
    engine = create_engine(url, **options)
    try:
        engine.connect().close()
    except Exception:
        return False
    finally:
        engine.dispose()
    return True


def upgrade_storage(url: str) -> str:
    """Bring a database's tables to the version of the installed Optuna; returns that version. Raises StudyError."""
    url = filled_in(url)
    try:
        storage = RDBStorage(url, skip_compatibility_check=True, skip_table_creation=True)
        storage.upgrade()
    except Exception as error:
        raise StudyError([f"storage.url: {shown(url)} cannot be upgraded ({first_line(error)})"]) from None
    return storage.get_current_version()


# The advisory lock: one worker proposes at a time, so that workers do not propose the same candidate at once. The lock is
# not what keeps a candidate from being evaluated twice: `claim` does that without it.


def advisory_lock(stored: StoredStudy) -> AbstractContextManager[None]:
    """The lock that the study's storage has for proposals; through gRPC there is none."""
    storage = stored.storage
    return storage.advisory_lock(stored.name) if isinstance(storage, RetryingStorage) else nullcontext()


def _lock_of(engine: Engine, run_folder: Path) -> Callable[[str], AbstractContextManager[None]]:
    statements = {
        "postgresql": ("SELECT pg_advisory_lock(hashtext(:n))", "SELECT pg_advisory_unlock(hashtext(:n))"),
        "mysql": ("SELECT GET_LOCK(:n, 30)", "SELECT RELEASE_LOCK(:n)"),
    }
    if engine.dialect.name == "sqlite":
        return lambda name: _file_lock(run_folder / "claim.lock")
    if engine.dialect.name in statements:
        return partial(_database_lock, engine, *statements[engine.dialect.name])
    return lambda name: nullcontext()


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _database_lock(engine: Engine, take: str, leave: str, study_name: str) -> Iterator[None]:
    """The database releases the lock when its holder's connection ends."""
    name = {"n": f"prunesearch {study_name}"[:64]}
    connection = None
    with suppress(Exception):  # the database is away: the next call waits for it
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
