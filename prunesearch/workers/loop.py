"""The worker's loop: claim a candidate, evaluate it, store the outcome. Any number of workers run it on one study."""

import errno
import traceback
from collections.abc import Callable
from typing import Protocol

from optuna.exceptions import UpdateFinishedTrialError

from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.errors import StudyError, user_error_lines
from prunesearch.study.interrupt import Interrupt, Interrupted, LeaseLost
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.study.record import RunRecord
from prunesearch.workers.artifacts import ArtifactStoreUnavailable
from prunesearch.workers.claim import claim, sleep
from prunesearch.workers.lease import LeaseMonitor, release_stale
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.trial import StudyRules, WorkerTrial
from prunesearch.workers.urls import redacted

FULL_DISK_SECONDS = 30.0


class Evaluate(Protocol):
    """Trains and scores a trial's candidate. Confirms the lease before it writes what others read."""

    def __call__(self, trial: WorkerTrial) -> RunRecord: ...


def run_loop(
    stored: StoredStudy,
    rules: StudyRules,
    evaluate: Evaluate,
    interrupt: Interrupt | None = None,
    listener: ProgressListener | None = None,
    duty: Callable[[], object] = lambda: None,
) -> None:
    """Evaluate candidates until the study's budget is used, by all workers together, or no candidate is left.

    When an interrupt is requested, the candidate is released for another worker. `duty` is called every few seconds while a
    candidate is evaluated. Raises Interrupted.
    """
    interrupt, listener, monitor = interrupt or Interrupt(), listener or NullListener(), LeaseMonitor()
    stored.trials()  # the first read of a large study takes long: not under the claim's lock

    def look_around() -> None:
        release_stale(stored, monitor)
        duty()
        if stored.attrs.get("aborted"):
            interrupt.request()

    while (trial := claim(stored, rules, monitor, interrupt)) is not None:
        try:
            with trial.keep_lease(look_around, listener.note):
                record = evaluate(trial)
            trial.tell(record)
        except (LeaseLost, UpdateFinishedTrialError):
            listener.note(f"{trial.key} was given to another worker in the meantime")
        except (Interrupted, KeyboardInterrupt):
            trial.hand_back()
            raise
        except StudyError as error:  # such as a damaged file of the study: not the candidate's fault
            trial.hand_back(str(error))
            raise
        except OSError as error:
            if not _is_temporary(error):
                end = trial.crash if user_error_lines(error) is None else trial.hand_back
                end(str(error))
                raise
            trial.hand_back(str(error))
            what = "the disk is full" if _is_full(error) else "files cannot be read or written"
            told = redacted(str(error.filename or error.strerror))
            listener.note(f"{what} ({told}); trying again in {FULL_DISK_SECONDS:.0f} s")
            sleep(FULL_DISK_SECONDS, interrupt)
        except Exception:
            trial.crash(traceback.format_exc(limit=-1).strip().splitlines()[-1])
            raise
        else:
            finished = StudyProgress.of(stored.trials()).finished
            listener.finished(record, finished, stored.attrs.get("trials", rules.trials))


def _is_temporary(error: OSError) -> bool:
    """Whether the error has nothing to do with the candidate."""
    return _is_full(error) or isinstance(error, ArtifactStoreUnavailable)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
