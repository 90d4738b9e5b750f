"""A storage whose server may go away for a while: calls wait, are made again, and somebody is told."""

import errno
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError, TimeoutError

from prunesearch.study.errors import StudyError

PATIENCE_SECONDS = 3600.0
LEAVING_SECONDS = 10.0  # of a worker that has been asked to stop
SERVERS_FAULT_SECONDS = 120.0  # a proxy's UNKNOWN may mean that its database is away, or that it has a bug
REFUSED = {1044, 1045, 1142, 1143, 1227}  # MySQL's words for what an account may not do
FIRST_WAIT, LONGEST_WAIT = 0.2, 15.0


def is_away(error: BaseException | None) -> bool:
    """Whether an error says that the storage cannot be reached, or is full, just now."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO):
        return True
    if isinstance(error, OperationalError) and _is_refusal(error):
        return False
    if isinstance(error, (OperationalError, InterfaceError, TimeoutError, PendingRollbackError)):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    if isinstance(error, StorageInternalError):
        return is_away(error.__cause__)
    if type(error).__module__.startswith("grpc"):
        code = getattr(error, "code", None)
        # a server whose database is away answers UNKNOWN
        return callable(code) and code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "CANCELLED", "INTERNAL")
    # Optuna's gRPC client stumbles over its own handling of an error
    return isinstance(error, UnboundLocalError) and type(error.__context__).__module__.startswith("grpc")


def _is_refusal(error: OperationalError) -> bool:
    """Whether a database says that it will not, rather than that it cannot: waiting changes nothing."""
    if "readonly" in str(error):  # SQLite, of a file that cannot be written
        return True
    if str(getattr(error.orig, "sqlstate", None) or "").startswith("28"):  # PostgreSQL, of a password
        return True
    return next(iter(getattr(error.orig, "args", ())), None) in REFUSED


def _patience(error: BaseException, leaving: bool) -> float:
    if leaving:
        return LEAVING_SECONDS
    code = getattr(error, "code", None)
    proxied = type(error).__module__.startswith("grpc") and callable(code) and code().name in ("UNKNOWN", "INTERNAL")
    return SERVERS_FAULT_SECONDS if proxied else PATIENCE_SECONDS


class _Insistence:
    """Makes calls again while the storage is away; tells once when it goes, and once when it is back."""

    def __init__(self, note: Callable[[str], None], afresh: Callable[[], None], leaving: Callable[[], bool]):
        self._note = note
        self._leaving = leaving
        self._afresh = afresh  # lets go of a connection that is broken
        self._lock = threading.Lock()
        self._since: float | None = None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wait, begin, failed = FIRST_WAIT, time.monotonic(), False
        while True:
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                if not is_away(error):
                    raise
                if time.monotonic() - begin > (limit := _patience(error, self._leaving())):
                    cause = type(error.__cause__ or error).__name__
                    raise StudyError([f"the storage has been away for {limit:.0f} s ({cause}); launch again later"]) from None
                with suppress(Exception):
                    self._afresh()
                if not failed:  # an old connection, perhaps: a new one will do
                    failed = True
                    continue
                self._gone(error)
            else:
                self._back()
                return result
            time.sleep(min(wait * random.uniform(0.5, 1.5), 1.0 if self._leaving() else LONGEST_WAIT))
            wait = min(2 * wait, LONGEST_WAIT)

    def _gone(self, error: Exception) -> None:
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
                cause = error.__cause__ or error
                self._note(f"the storage is away ({type(cause).__name__}); waiting for it")

    def _back(self) -> None:
        if self._since is not None:
            with self._lock:
                if self._since is not None:
                    self._note(f"the storage is back after {time.monotonic() - self._since:.0f} s")
                    self._since = None


def patient(inner: BaseStorage, note: Callable[[str], None], leaving: Callable[[], bool] = lambda: False) -> BaseStorage:
    """The same storage, waited for while it is away; not for long by one who is `leaving`."""
    insistence = _Insistence(note, inner.remove_session, leaving)

    def patiently(name: str) -> Callable[..., Any]:
        def call(self: BaseStorage, *args: Any, **kwargs: Any) -> Any:
            return insistence.call(getattr(inner, name), *args, **kwargs)

        return call

    def set_trial_state_values(self: BaseStorage, trial_id: int, state: Any, values: Any = None) -> bool:
        """An answer may be lost after the change was made: then the trial is finished as it should be."""
        tried = 0

        def once() -> bool:
            nonlocal tried
            tried += 1
            try:
                return inner.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if tried == 1:
                    raise
                trial = inner.get_trial(trial_id)
                if trial.state != state or (values is not None and list(trial.values or ()) != list(values)):
                    raise
                return True

        return bool(insistence.call(once))

    names = [n for n in dir(BaseStorage) if not n.startswith("_") and callable(getattr(BaseStorage, n))]
    methods: dict[str, Any] = {name: patiently(name) for name in names}
    methods |= {"set_trial_state_values": set_trial_state_values, "inner": inner}
    made = type("PatientStorage", (BaseStorage,), methods)()
    assert isinstance(made, BaseStorage)
    return made
