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

from prunesearch.mistakes import StudyError

PATIENCE_SECONDS = 3600.0
FIRST_WAIT, LONGEST_WAIT = 0.2, 15.0


def is_away(error: BaseException | None) -> bool:
    """Whether an error says that the storage cannot be reached, or is full, just now."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO):
        return True
    if isinstance(error, OperationalError) and "readonly" in str(error):  # SQLite's word for a file that cannot be written
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


class _Insistence:
    """Makes calls again while the storage is away; tells once when it goes, and once when it is back."""

    def __init__(self, note: Callable[[str], None], afresh: Callable[[], None]):
        self._note = note
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
                if time.monotonic() - begin > PATIENCE_SECONDS:
                    raise StudyError(
                        [f"the storage has been away for {PATIENCE_SECONDS / 60:.0f} minutes; launch again later"]
                    ) from None
                with suppress(Exception):
                    self._afresh()
                if not failed:  # an old connection, perhaps: a new one will do
                    failed = True
                    continue
                self._gone(error)
            else:
                self._back()
                return result
            time.sleep(wait * random.uniform(0.5, 1.5))
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


def patient(inner: BaseStorage, note: Callable[[str], None]) -> BaseStorage:
    """The same storage, waited for while it is away."""
    insistence = _Insistence(note, inner.remove_session)

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
