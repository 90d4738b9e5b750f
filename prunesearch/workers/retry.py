"""One policy for storages and artifact stores that may be unavailable for a while: a call is repeated until it succeeds."""

import errno
import sqlite3
import threading
import time
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError, TimeoutError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from prunesearch.study.errors import StudyError
from prunesearch.workers.urls import first_line

R = TypeVar("R")

UNAVAILABLE_SECONDS = 3600.0  # a storage that is away for longer ends the worker
LEAVING_SECONDS = 10.0  # the same, for a worker that has been asked to stop
PROXY_FAULT_SECONDS = 120.0  # a proxy's UNKNOWN may mean that its database is away, or that the proxy has a bug
REFUSED = {1044, 1045, 1142, 1143, 1227}  # MySQL's error codes for what an account may not do
DAMAGED = ("malformed", "not a database", "no such table", "no such column")  # SQLite, for a damaged file
MEND = "restore the file from a copy; or move it away and launch the study again: candidates that have a record are kept"
FIRST_WAIT, LONGEST_WAIT = 0.2, 15.0  # seconds


def is_away(error: BaseException | None) -> bool:
    """Whether an error says that the storage cannot be reached at the moment, or has no space left."""
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
        # a proxy whose database is away answers UNKNOWN
        return _grpc_code(error) in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "CANCELLED", "INTERNAL")
    # Optuna's gRPC client raises this while it handles an error of the connection
    return isinstance(error, UnboundLocalError) and type(error.__context__).__module__.startswith("grpc")


class StorageRefused(StudyError):
    """The storage refuses a call for good: its account or its file may be read only, or its content is damaged."""


def is_damaged(error: BaseException | None) -> bool:
    """Whether an error says that the content of a SQLite file is damaged, or is no database."""
    if isinstance(error, DBAPIError):
        return isinstance(error.orig, sqlite3.DatabaseError) and any(text in str(error.orig) for text in DAMAGED)
    return error is not None and is_damaged(error.__cause__)


def _is_refusal(error: OperationalError) -> bool:
    """Whether the database refuses the call for good: repeating it would change nothing."""
    if "readonly" in str(error) or is_damaged(error):  # SQLite, for a file that cannot be written
        return True
    if str(getattr(error.orig, "sqlstate", None) or "").startswith("28"):  # PostgreSQL, for a wrong password
        return True
    return next(iter(getattr(error.orig, "args", ())), None) in REFUSED


def _grpc_code(error: BaseException | None) -> str:
    code = getattr(error, "code", None)
    return str(code().name) if callable(code) else ""


class RetryPolicy:
    """Repeats calls while a storage is away. `note` gets one message when it becomes unavailable, and one when it is back.

    `reset` drops a broken connection before a call is repeated. `leaving`: whether the worker has been asked to stop; then
    it waits for a few seconds only. `place`: how messages name the storage.
    """

    def __init__(
        self,
        note: Callable[[str], None],
        reset: Callable[[], None],
        leaving: Callable[[], bool] = lambda: False,
        place: str = "the storage",
    ):
        self._place = place
        self._note, self._reset, self._leaving = note, reset, leaving
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._backoff = wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)

    def call(self, function: Callable[..., R], *args: Any) -> R:
        """The function's result. Raises StudyError when the storage stays away for too long, and StorageRefused."""
        retrying = Retrying(
            retry=retry_if_exception(is_away),
            stop=self._has_waited_long_enough,
            wait=self._wait,
            before_sleep=self._before_sleep,
            retry_error_callback=self._give_up,
        )
        try:
            result: R = retrying(function, *args)
        except (DBAPIError, StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            if is_damaged(cause):
                raise StorageRefused([f"storage.url: {self._place} is damaged ({first_line(error)}): {MEND}"]) from error
            if isinstance(cause, OperationalError) and _is_refusal(cause):
                refusal = f"{self._place} refuses the access ({first_line(error)})"
                raise StorageRefused([f"storage.url: {refusal}: get the right to write it"]) from error
            raise
        self._tell_back()
        return result

    def _limit(self, error: BaseException | None) -> float:
        if self._leaving():
            return LEAVING_SECONDS
        return PROXY_FAULT_SECONDS if _grpc_code(error) in ("UNKNOWN", "INTERNAL") else UNAVAILABLE_SECONDS

    def _has_waited_long_enough(self, state: RetryCallState) -> bool:
        return (state.seconds_since_start or 0.0) > self._limit(_error_of(state))

    def _wait(self, state: RetryCallState) -> float:
        """No wait before the second attempt: only the connection may have been stale."""
        wait = 0.0 if state.attempt_number == 1 else self._backoff(state)
        return min(wait, 1.0) if self._leaving() else wait

    def _before_sleep(self, state: RetryCallState) -> None:
        with suppress(Exception):  # the storage is unavailable; the repeated call will show whether it still is
            self._reset()
        if state.attempt_number > 1:
            self._tell_away(_error_of(state))

    def _give_up(self, state: RetryCallState) -> Any:
        error = _error_of(state)
        cause = type((error and error.__cause__) or error).__name__
        waited = f"{self._limit(error):.0f} s"
        raise StudyError([f"the storage has been unavailable for {waited} ({cause}); launch the study again later"]) from error

    def _tell_away(self, error: BaseException | None) -> None:
        with self._lock:
            if self._away_since is None:
                self._away_since = time.monotonic()
                cause = (error and error.__cause__) or error
                self._note(f"the storage is unavailable ({type(cause).__name__}); waiting for it")

    def _tell_back(self) -> None:
        if self._away_since is None:
            return
        with self._lock:
            if self._away_since is not None:
                self._note(f"the storage is available again after {time.monotonic() - self._away_since:.0f} s")
                self._away_since = None


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


class RetryingStorage(BaseStorage):
    """A storage whose every call follows the retry policy.

    `advisory_lock(study_name)` is the lock under which workers propose candidates one at a time, where the storage has one.
    """

    def __init__(
        self,
        inner: BaseStorage,
        note: Callable[[str], None],
        leaving: Callable[[], bool] = lambda: False,
        advisory_lock: Callable[[str], AbstractContextManager[None]] = lambda study_name: nullcontext(),
        place: str = "the storage",
    ):
        self.inner = inner
        self.advisory_lock = advisory_lock
        self._call = RetryPolicy(note, inner.remove_session, leaving, place).call

    # Studies

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self._call(self.inner.create_new_study, directions, study_name)

    def delete_study(self, study_id: int) -> None:
        self._call(self.inner.delete_study, study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._call(self.inner.set_study_user_attr, study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._call(self.inner.set_study_system_attr, study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._call(self.inner.get_study_id_from_name, study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._call(self.inner.get_study_name_from_id, study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._call(self.inner.get_study_directions, study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._call(self.inner.get_study_user_attrs, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._call(self.inner.get_study_system_attrs, study_id)

    def get_all_studies(self) -> list[Any]:
        return self._call(self.inner.get_all_studies)

    # Trials

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        return self._call(self.inner.create_new_trial, study_id, template_trial)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self._call(self.inner.set_trial_param, trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """The storage may have made the change although its answer was lost; then the repeated call finds the trial as it
        should be.
        """
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                return self.inner.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                trial = self.inner.get_trial(trial_id) if attempts > 1 else None
                if trial is None or trial.state != state or (values is not None and list(trial.values or ()) != list(values)):
                    raise
                return True

        return self._call(attempt)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._call(self.inner.set_trial_intermediate_value, trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._call(self.inner.set_trial_user_attr, trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._call(self.inner.set_trial_system_attr, trial_id, key, value)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._call(self.inner.get_trial, trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._call(self.inner.get_all_trials, study_id, deepcopy, states)

    def get_n_trials(self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None) -> int:
        return self._call(self.inner.get_n_trials, study_id, state)

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        return self._call(self.inner.get_best_trial, study_id)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return self._call(self.inner.get_trial_id_from_study_id_trial_number, study_id, trial_number)

    def get_trial_number_from_id(self, trial_id: int) -> int:
        return self._call(self.inner.get_trial_number_from_id, trial_id)

    def get_trial_param(self, trial_id: int, param_name: str) -> float:
        return self._call(self.inner.get_trial_param, trial_id, param_name)

    def get_trial_params(self, trial_id: int) -> dict[str, Any]:
        return self._call(self.inner.get_trial_params, trial_id)

    def get_trial_user_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._call(self.inner.get_trial_user_attrs, trial_id)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._call(self.inner.get_trial_system_attrs, trial_id)

    def check_trial_is_updatable(self, trial_id: int, trial_state: TrialState) -> None:
        self._call(self.inner.check_trial_is_updatable, trial_id, trial_state)

    def remove_session(self) -> None:
        self.inner.remove_session()


def bounded(attempts: int, retryable: Callable[[BaseException], bool], longest_wait: float) -> Retrying:
    """Repeats a call at most so many times while its error is `retryable`, then raises it. `longest_wait`: seconds."""
    return Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(multiplier=FIRST_WAIT, max=longest_wait),
        retry=retry_if_exception(retryable),
        reraise=True,
    )
