"""The Optuna study: created once, its definition pinned, lost trials ended, the baselines and the lost evaluated first."""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
import psutil
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from prunesearch.candidate import BASELINE_NAMES, Candidate
from prunesearch.config import StudyConfig
from prunesearch.mistakes import StudyError
from prunesearch.record import write_atomically
from prunesearch.scan import Scan
from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.sampler import CandidateSampler, is_settled, is_taken, optuna_sampler
from prunesearch.search.space import SearchSpace

LEASE_SECONDS = 60.0  # a running trial whose lease is older than this is lost


def sampler_of(
    config: StudyConfig, space: SearchSpace, params_of: Callable[[Candidate], float], scan: Scan | None
) -> CandidateSampler:
    """The sampler that the study file names; `params_of` gives a candidate's second objective before it is trained."""
    search = config.search
    scores = scan.score("delta_loss") if scan else None
    if search.sampler == "layer-sets":
        return LayerSetSampler(space, params_of, config.seed, search.startup_trials, scores)
    return optuna_sampler(search.sampler, space, config.seed, search.startup_trials, scores)


def open_study(
    config: StudyConfig, storage: BaseStorage, space: SearchSpace, sampler: CandidateSampler | None = None
) -> optuna.Study:
    """Create the study, or load it and check that it is the same one; without a sampler, it proposes at random.

    Raises StudyError, naming what differs, when the stored study was made from another definition.
    """
    study = optuna.create_study(
        study_name=config.name,
        storage=storage,
        sampler=sampler or CandidateSampler(space, config.seed),
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    beside = config.run_folder / "definition.json"  # records and anchor must not be handed to another study either
    stored = study.user_attrs.get("definition") or (beside.read_text(encoding="utf-8") if beside.exists() else None)
    if stored is None:
        write_atomically(beside, json.dumps(config.definition()))
    if "definition" not in study.user_attrs:
        study.set_user_attr("definition", stored or json.dumps(config.definition()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["dev_wer", config.search.params_objective])
    if stored and (changed := _differences(json.loads(stored), config.definition())):
        raise StudyError(
            [f"{path}: this study was started with {old!r}, the study file now says {new!r}" for path, old, new in changed]
            + ["records of two definitions cannot be compared: put the old value back, or rename the study and its folder"]
        )
    return study


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}".strip("."))]
    return [] if old == new else [(path, old, new)]


@dataclass(frozen=True)
class Lease:
    """Who evaluates a trial, since when that process runs, and when it was last heard of (seconds since 1970)."""

    host: str
    pid: int
    started: float
    renewed: float

    @classmethod
    def mine(cls) -> "Lease":
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), time.time())

    @classmethod
    def of(cls, trial: FrozenTrial) -> "Lease | None":
        stored = trial.user_attrs.get("lease")
        return cls(**stored) if stored else None

    def write(self, study: optuna.Study, trial_id: int) -> None:
        study._storage.set_trial_user_attr(trial_id, "lease", vars(self))

    def is_held(self) -> bool:
        """On this machine, whether that very process lives (it may have slept); elsewhere, whether the lease is fresh."""
        if self.host != socket.gethostname():
            return time.time() - self.renewed < LEASE_SECONDS
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


def end_lost(study: optuna.Study) -> list[str]:
    """End the running trials whose worker is gone; returns their candidates' keys. To be called under the study's lock."""
    lost = []
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        lease = Lease.of(trial)
        if lease is None or not lease.is_held():
            study._storage.set_trial_user_attr(trial._trial_id, "ended", "lost")
            study.tell(trial.number, state=TrialState.FAIL)
            lost.append(trial.user_attrs.get("candidate", ""))
    return lost


def enqueue_next_due(study: optuna.Study, space: SearchSpace) -> str | None:
    """Enqueue what has to be evaluated before the sampler is asked, if anything: a lost candidate, else a named one.

    One at a time, when a worker is free for it: so a study that is killed and resumed keeps its order, and nothing is
    forgotten by whoever is killed in between. Returns the candidate's key. To be called under the study's lock.
    """
    trials = study.get_trials(deepcopy=False)
    taken = {t.user_attrs.get("candidate") for t in trials if is_taken(t)}
    ended = [t.user_attrs for t in trials if t.user_attrs.get("ended") == "lost"]
    lost = [(a.get("name"), Candidate.from_key(a["candidate"])) for a in ended if "candidate" in a]
    for name, candidate in [*lost, *space.named.items()]:
        if candidate.key not in taken:
            attrs = {"candidate": candidate.key} | ({"name": name} if name in BASELINE_NAMES else {})
            study.enqueue_trial(space.params(candidate), user_attrs=attrs)
            return candidate.key
    return None


def settled(study: optuna.Study) -> int:
    """How many candidates have an outcome."""
    return sum(map(is_settled, study.get_trials(deepcopy=False)))
