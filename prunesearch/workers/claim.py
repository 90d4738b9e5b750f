"""Claims: each candidate is evaluated by one worker, with any number of workers, on any storage.

A worker creates a trial and declares its candidate; then it looks at the trials with lower numbers. If one of them has the same
candidate, or if they use up the budget, the worker withdraws its trial. If one of them has not declared its candidate yet
(Optuna's own samplers need a trial before they can propose), the worker waits for the declaration. This is Lamport's bakery
algorithm. It needs no lock, so it survives what locks do not: a database that restarts, a proxy. The storage's advisory lock
only keeps workers from proposing the same candidate at the same time.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from prunesearch.search.samplers import CandidateSampler, SpaceExhausted
from prunesearch.search.study_progress import StudyProgress, is_finished, is_foreign
from prunesearch.study.candidate import Candidate
from prunesearch.study.interrupt import Interrupt
from prunesearch.workers.lease import Lease, LeasedTrial, LeaseMonitor, release_stale
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.storage import advisory_lock
from prunesearch.workers.trial import StudyRules, WorkerTrial

FIRST_POLL, LONGEST_POLL = 0.2, 2.0  # seconds
DECLARATION_POLL = 0.05


def claim(stored: StoredStudy, rules: StudyRules, monitor: LeaseMonitor, interrupt: Interrupt) -> WorkerTrial | None:
    """The next trial for this worker; None once the study's budget or its space is used up.

    Waits while other workers may still release candidates. Raises Interrupted, also when the study was aborted.
    """
    exhausted, poll = False, FIRST_POLL
    while True:
        made = None
        with advisory_lock(stored):
            attrs = stored.attrs
            if attrs.get("aborted"):
                interrupt.request()
            interrupt.check()
            budget = attrs.get("trials", rules.trials)  # a person may have raised it
            found = stored.trials()
            if release_stale(stored, monitor, found):
                found = stored.trials()
            progress = StudyProgress.of(found)
            pending = progress.pending(rules.space)
            if progress.finished >= budget or (exhausted and not pending and not progress.running):
                return None
            if progress.finished + progress.running < budget and (pending or not exhausted):
                try:
                    made = _propose(stored, rules, progress)
                except SpaceExhausted:  # for now: a running candidate may still be released
                    exhausted = True
                except UpdateFinishedTrialError:  # the proposal took so long that another worker released the trial
                    continue
        if made is not None:
            if _is_ours(made, found, budget, monitor, interrupt):
                return made
            made.release("duplicate")
            poll = min(2 * poll, LONGEST_POLL)  # other workers propose the same: spread the next attempts
        sleep(random.uniform(0.2, 1.8) * poll, interrupt)
        poll = min(1.5 * poll, LONGEST_POLL)


def sleep(seconds: float, interrupt: Interrupt) -> None:
    """Sleep. Raises Interrupted as soon as an interrupt is requested."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        interrupt.check()
        time.sleep(min(left, 0.2))


def _propose(stored: StoredStudy, rules: StudyRules, progress: StudyProgress) -> WorkerTrial:
    """A trial with a declared candidate; `_is_ours` decides whether this worker keeps it. Raises SpaceExhausted."""
    sampler = stored.study.sampler
    if isinstance(sampler, CandidateSampler) and not sampler.needs_trial and not progress.waiting:
        return _declared_at_once(stored, rules, sampler.choose(stored.study, None, progress))
    return _declared_after_asking(stored, rules)


def _declared_at_once(stored: StoredStudy, rules: StudyRules, candidate: Candidate) -> WorkerTrial:
    """A trial that has its candidate and its lease from the beginning. Its parameters are written during the evaluation."""
    lease, name = Lease.mine(), rules.name_of(candidate)
    attrs = {"candidate": candidate.key, "lease": asdict(lease)} | ({"name": name} if name else {})
    return WorkerTrial(stored, rules, stored.create_running_trial(attrs), candidate, lease, unwritten=True)


def _declared_after_asking(stored: StoredStudy, rules: StudyRules) -> WorkerTrial:
    """As Optuna does it: first a trial (a new one, or one that a person has enqueued), then its parameters."""
    trial = stored.study.ask()
    leased = LeasedTrial(stored, trial)
    leased.renew()
    try:
        candidate = rules.space.suggest(trial)
    except SpaceExhausted:
        leased.release("space exhausted")
        raise
    if name := rules.name_of(candidate):
        trial.set_user_attr("name", name)
    trial.set_user_attr("candidate", candidate.key)  # the declaration
    return WorkerTrial(stored, rules, trial, candidate)


def _is_ours(made: WorkerTrial, found: Sequence[FrozenTrial], budget: int, monitor: LeaseMonitor, interrupt: Interrupt) -> bool:
    """Whether no trial of a lower number has the candidate, and those trials leave room in the budget.

    `found`: the trials as they were read just before `made` was created. Trial numbers count from 0: if the number of `made`
    equals the length of `found`, no trial was created in between. If `made` was also declared at once, no trial was enqueued
    that another worker could have started. Then the trials need not be read again.
    """
    stored, number, key = made.stored, made.number, made.key
    trials = found if made.unwritten and len(found) == number else stored.trials()
    while True:
        interrupt.check()
        retry = any(t.number == number and t.user_attrs.get("retry") for t in trials)
        # a running trial of a higher number will withdraw; it must not hide an outcome that the candidate has already
        others = StudyProgress.of(t for t in trials if t.number < number or (t.number > number and is_finished(t)))
        before = [t for t in trials if t.state == TrialState.RUNNING and t.number < number and not is_foreign(t)]
        has_outcome = key in others.latest and is_finished(others.latest[key])
        if has_outcome and not retry:
            return False
        if any(t.user_attrs.get("candidate") == key for t in before):
            return False
        if others.finished - has_outcome + len(before) >= budget:  # a candidate that is retried has its place already
            return False
        if all("candidate" in t.user_attrs for t in before):
            return True
        made.renew()
        release_stale(stored, monitor, trials)
        time.sleep(DECLARATION_POLL)
        trials = stored.trials()
