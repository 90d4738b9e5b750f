"""The one seam to Optuna: everything that needs more than Optuna's public interface lies here.

Workers claim trials, tell outcomes and end trials of dead workers by calls that `optuna.Study` does not offer: it can neither
create a trial that is already running, nor set an attribute of a trial that another process asked for, nor end a trial without
calling the sampler. `BaseStorage` can. It is the interface that custom storages implement, and all of its methods used here are
public; what it needs and Optuna keeps private are the ids of studies and trials. Optuna has no public accessor for them (the
request for one, optuna/optuna issue 1163, was closed), so they are read here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

AnyTrial = Trial | FrozenTrial


def cached(database: RDBStorage) -> BaseStorage:
    """The database behind Optuna's cache of finished trials.

    Optuna adds this cache itself to every `RDBStorage` that a study is given; ours is inside a storage that repeats calls,
    where Optuna does not look.
    """
    return _CachedStorage(database)


@dataclass(frozen=True)
class StoredStudy:
    """An Optuna study and the storage that it lies in."""

    study: optuna.Study
    storage: BaseStorage

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def attrs(self) -> dict[str, Any]:
        """The study's user attributes, read from the storage."""
        return self.study.user_attrs

    def set_attr(self, name: str, value: Any) -> None:
        self.study.set_user_attr(name, value)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in some states, in the order of their numbers. They are not copied: do not change them."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def trial(self, trial: AnyTrial) -> FrozenTrial:
        """The trial as it is stored now."""
        return self.storage.get_trial(trial._trial_id)

    def create_running_trial(self, attrs: Mapping[str, Any]) -> Trial:
        """A trial that has its user attributes from the moment when others can see it."""
        template = create_trial(state=TrialState.RUNNING, user_attrs=dict(attrs))
        return Trial(self.study, self.storage.create_new_trial(self.study._study_id, template_trial=template))

    def set_trial_attr(self, trial: AnyTrial, name: str, value: Any) -> None:
        """Raises optuna.exceptions.UpdateFinishedTrialError for a trial that has ended."""
        self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def set_trial_param(
        self, trial: AnyTrial, name: str, value: Any, distribution: optuna.distributions.BaseDistribution
    ) -> None:
        """Raises optuna.exceptions.UpdateFinishedTrialError for a trial that has ended."""
        internal = distribution.to_internal_repr(value)
        try:
            self.storage.set_trial_param(trial._trial_id, name, internal, distribution)
        except KeyError:  # a restarted gRPC proxy knows a trial only after it has read the study's trials
            self.storage.get_all_trials(self.study._study_id, deepcopy=False)
            self.storage.set_trial_param(trial._trial_id, name, internal, distribution)

    def end_trial(self, trial: AnyTrial, state: TrialState, values: Sequence[float] | None = None) -> None:
        """End a running trial, without a call to the sampler. Raises UpdateFinishedTrialError for a trial that has ended."""
        self.storage.set_trial_state_values(trial._trial_id, state, values)

    def write_mark(self, name: str, value: str) -> None:
        """Set a system attribute of the study: not for people, such as a test whether the storage can be written."""
        self.storage.set_study_system_attr(self.study._study_id, name, value)
