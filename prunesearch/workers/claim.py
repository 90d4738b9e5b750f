"""Which candidate is whose: any number of workers, on any storage, and none is trained twice.

A trial is created and its candidate declared, then the trials with lower numbers are looked at. Whoever finds the same
candidate among them, or the budget used up by them, withdraws. Of one that has not declared yet (Optuna's own samplers
need the trial first), the declaration is awaited (Lamport's bakery). So it needs no lock, and survives what locks do not: a
database that restarts, a proxy. `turn` only spares workers from proposing the same.
"""

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from prunesearch.search.samplers import CandidateSampler, SpaceExhausted
from prunesearch.search.space import SearchSpace
from prunesearch.search.study_progress import StudyProgress, is_settled
from prunesearch.study.candidate import BASELINE_NAMES, Candidate
from prunesearch.study.interrupt import Interrupt
from prunesearch.workers.lease import Lease, LeaseHolder, LeaseMonitor, end_lost, give_up
from prunesearch.workers.storage import turn

FIRST_POLL, LONGEST_POLL = 0.2, 2.0  # seconds
DECLARATION_POLL = 0.05


@dataclass(frozen=True)
class Claim:
    """A trial that is this worker's to evaluate."""

    trial: optuna.Trial
    candidate: Candidate
    name: str | None  # a baseline's
    held: LeaseHolder
    unwritten: dict[str, tuple[float, BaseDistribution]]  # parameters that the storage has not been told yet
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def write_params(self, storage: BaseStorage) -> None:
        """Tell the storage the parameters: some ten milliseconds for each layer in a database, so not while others wait."""
        with self._writing:
            while self.unwritten:
                name, (value, distribution) = next(iter(self.unwritten.items()))
                try:
                    storage.set_trial_param(self.trial._trial_id, name, value, distribution)
                except KeyError:  # a proxy that was restarted knows a trial once it has read the study's
                    storage.get_all_trials(self.trial.study._study_id, deepcopy=False)
                    storage.set_trial_param(self.trial._trial_id, name, value, distribution)
                del self.unwritten[name]


def claim(
    study: optuna.Study, space: SearchSpace, trials: int, watch: LeaseMonitor, stop: Interrupt, run_folder: Path
) -> Claim | None:
    """The next trial; None when the study's budget of candidates with an outcome is used, or the space. Waits while others
    may still lose theirs. `trials` is the budget where the study has none. Raises Interrupted, also where it was aborted."""
    exhausted, poll, default = False, FIRST_POLL, trials
    while True:
        made = None
        with turn(study._storage, study.study_name, run_folder):
            attrs = study.user_attrs
            if attrs.get("aborted"):
                stop.request()
            stop.check()
            trials = attrs.get("trials", default)  # it may have been widened
            found = study.get_trials(deepcopy=False)
            if end_lost(study, watch, found):
                found = study.get_trials(deepcopy=False)
            stands = StudyProgress.of(found)
            due = stands.due(space)
            if stands.settled >= trials or (exhausted and not due and not stands.running):
                return None
            if stands.settled + stands.running < trials and (due or not exhausted):
                try:
                    made = _ask(study, space, stands)
                except SpaceExhausted:  # for now: what others are at may be lost yet
                    exhausted = True
                except UpdateFinishedTrialError:  # it took so long to propose that the trial was taken for lost
                    continue
        if made is not None:
            if _is_mine(study, made, found, trials, watch, stop):
                return made
            give_up(study, study._storage.get_trial(made.trial._trial_id), "duplicate")
            poll = min(2 * poll, LONGEST_POLL)  # others propose the same: not all again at once
        sleep(random.uniform(0.2, 1.8) * poll, stop)
        poll = min(1.5 * poll, LONGEST_POLL)


def sleep(seconds: float, stop: Interrupt) -> None:
    """Raises Interrupted as soon as that is asked for."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        stop.check()
        time.sleep(min(left, 0.2))


def _ask(study: optuna.Study, space: SearchSpace, stands: StudyProgress) -> Claim:
    """A trial with its candidate declared; whether it stands, `_is_mine` says. Raises SpaceExhausted."""
    sampler = study.sampler
    if isinstance(sampler, CandidateSampler) and not sampler.needs_trial and not stands.waiting:
        return _born_whole(study, space, sampler.choose(study, None, stands))
    return _step_by_step(study, space)


def _born_whole(study: optuna.Study, space: SearchSpace, candidate: Candidate) -> Claim:
    """A trial that has its candidate and mark from the beginning; its parameters follow while it is evaluated."""
    mark, name = Lease.mine(), _name(space, candidate)
    attrs = {"candidate": candidate.key, "lease": asdict(mark)} | ({"name": name} if name else {})
    template = create_trial(state=TrialState.RUNNING, user_attrs=attrs)
    number = study._storage.create_new_trial(study._study_id, template_trial=template)
    held = LeaseHolder(study._storage, number, mark)
    held.key = candidate.key
    kinds = space.distributions
    unwritten = {n: (kinds[n].to_internal_repr(v), kinds[n]) for n, v in space.params(candidate).items()}
    return Claim(optuna.Trial(study, number), candidate, name, held, unwritten)


def _step_by_step(study: optuna.Study, space: SearchSpace) -> Claim:
    """As Optuna does it: a trial, then its parameters. It may be one that somebody has enqueued."""
    trial = study.ask()
    held = LeaseHolder(study._storage, trial._trial_id)
    held.renew()
    try:
        candidate = space.candidate({n: trial._suggest(n, d) for n, d in space.distributions.items()})
    except SpaceExhausted:
        give_up(study, study._storage.get_trial(trial._trial_id), "space exhausted")
        raise
    if name := _name(space, candidate):
        trial.set_user_attr("name", name)
    trial.set_user_attr("candidate", candidate.key)  # the declaration
    held.key = candidate.key
    return Claim(trial, candidate, name, held, {})


def _name(space: SearchSpace, candidate: Candidate) -> str | None:
    return next((n for n in BASELINE_NAMES if space.named.get(n) == candidate), None)


def _is_mine(
    study: optuna.Study, made: Claim, found: Sequence[FrozenTrial], budget: int, watch: LeaseMonitor, stop: Interrupt
) -> bool:
    """Whether nobody with a lower number has the candidate, or the budget.

    Numbers count from 0. Where a trial was born whole and `found`, read just before, holds as many trials as its number says,
    nobody came in between, nor was there an enqueued one that somebody could have begun: nothing need be read again.
    """
    number, key = made.trial.number, made.candidate.key
    trials = found if made.unwritten and len(found) == number else study.get_trials(deepcopy=False)
    while True:
        stop.check()
        retry = any(t.number == number and t.user_attrs.get("retry") for t in trials)
        others = StudyProgress.of(t for t in trials if t.number != number)
        before = [t for t in trials if t.state == TrialState.RUNNING and t.number < number]
        outcome = key in others.latest and is_settled(others.latest[key])
        if outcome and not retry:
            return False
        if any(t.user_attrs.get("candidate") == key for t in before):
            return False
        if others.settled - outcome + len(before) >= budget:  # what is tried again has its place already
            return False
        if all("candidate" in t.user_attrs for t in before):
            return True
        made.held.renew()
        end_lost(study, watch, trials)
        time.sleep(DECLARATION_POLL)
        trials = study.get_trials(deepcopy=False)
