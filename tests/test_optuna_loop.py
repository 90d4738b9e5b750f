"""The samplers outside the worker's loop, in a plain `study.optimize`, and the grid in a study file, from start to end."""

import itertools
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from prunesearch.commands.launch import launch
from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.samplers import CandidateSampler, SpaceExhausted, optuna_sampler
from prunesearch.search.space import SearchSpace
from prunesearch.search.study_progress import candidate_key
from prunesearch.study.candidate import BASELINE_NAMES, Candidate, baselines
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.record import read_records
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_study import open_existing_study, open_study
from prunesearch.workers.storage import open_storage
from tests.conftest import write_study
from tests.test_search import landscape, params_of, rules, space
from tests.workers_helpers import complete

Objective = Callable[[optuna.Trial], tuple[float, float]]


def objective(where: SearchSpace) -> Objective:
    """A plain objective: what the candidate costs, by formula."""

    def evaluate(trial: optuna.Trial) -> tuple[float, float]:
        candidate = where.suggest(trial)
        record = landscape(candidate)
        assert record.dev is not None
        return record.dev.errors.wer, params_of(candidate)

    return evaluate


def new_study(sampler: CandidateSampler) -> optuna.Study:
    return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def proposed(study: optuna.Study) -> list[str | None]:
    return [candidate_key(t) for t in study.get_trials(deepcopy=False)]


def test_a_plain_loop_begins_with_the_baselines_and_proposes_nothing_twice() -> None:
    where = space()
    study = new_study(LayerSetSampler(where, params_of, startup_trials=3))
    study.optimize(objective(where), n_trials=30, n_jobs=1)
    keys = proposed(study)
    assert keys[:4] == [where.named[name].key for name in BASELINE_NAMES]
    assert len(set(keys)) == len(keys) == 30
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}


def test_a_plain_loop_ends_when_the_space_is_used_up() -> None:
    where = space(removable=(4, 5), max_removed=1, ranks=(0,))
    study = new_study(LayerSetSampler(where, params_of, startup_trials=1))
    with pytest.raises(SpaceExhausted):
        study.optimize(objective(where), n_trials=30)
    everything = {c.key for c in (*where.everything(), *where.named.values())}
    done = [candidate_key(t) for t in study.trials if t.state == TrialState.COMPLETE]
    assert set(done) == everything
    assert len(done) == len(everything)


def test_an_objective_that_raises_counts_as_done() -> None:
    where = space()
    study, plain = new_study(LayerSetSampler(where, params_of, startup_trials=3)), objective(where)

    def fails_for_rank_4(trial: optuna.Trial) -> tuple[float, float]:
        values = plain(trial)
        if trial.params["lora_rank"] == 4:
            raise FloatingPointError
        return values

    study.optimize(fails_for_rank_4, n_trials=25, catch=(FloatingPointError,))
    keys = proposed(study)
    assert len(set(keys)) == len(keys) == 25, "what failed is not proposed again"
    failed = {key for key, t in zip(keys, study.trials, strict=True) if t.state == TrialState.FAIL}
    assert failed == {key for key in keys if key and Candidate.from_key(key).lora_rank == 4}
    assert failed


def test_an_enqueued_candidate_comes_next_and_is_not_proposed_again() -> None:
    where = space()
    study = new_study(LayerSetSampler(where, params_of, startup_trials=3))
    study.optimize(objective(where), n_trials=6)
    wanted = next(c for c in where.everything() if c.key not in proposed(study))
    study.enqueue_trial(where.params(wanted))
    study.optimize(objective(where), n_trials=20)
    keys = proposed(study)
    assert keys[6] == wanted.key
    assert len(set(keys)) == len(keys) == 26


def test_two_loops_of_one_seed_propose_the_same() -> None:
    where = space()
    studies = [new_study(LayerSetSampler(where, params_of, seed=3, startup_trials=3)) for _ in range(2)]
    for study in studies:
        study.optimize(objective(where), n_trials=14)
    assert proposed(studies[0]) == proposed(studies[1])


def test_the_gaussian_process_of_optuna_goes_on_when_a_fixed_candidate_adds_a_parameter(config: StudyConfig) -> None:
    """Earlier trials lack it, and Optuna's sampler fails on these."""
    narrow = space(removable=(0, 1, 2, 3), named=dict(itertools.islice(baselines(6, 8).items(), 2)))
    extra = Candidate((5,), 4)
    wide = space(removable=(0, 1, 2, 3), named={**narrow.named, extra.key: extra})
    assert wide.distributions.keys() - narrow.distributions.keys() == {"remove_5"}
    storage = open_storage(None, config.run_folder)
    for where, trials in ((narrow, 8), (wide, 14)):
        study = open_study(config, storage, where, optuna_sampler("gp", where, 0, startup_trials=2))
        run_loop(study, rules(config, trials, where), lambda trial: landscape(trial.candidate))
    assert len(set(complete(study))) == len(complete(study)) == 14
    assert extra.key in complete(study)


def test_a_grid_evaluates_the_whole_space_once_and_small_sets_first(toy: Path, tmp_path: Path) -> None:
    search = {"sampler": "grid", "removable_layers": [1, 2, 3], "max_removed": 2, "lora_ranks": [0], "trials": 50}
    file = write_study(tmp_path / "s", toy, training={"steps": 1, "init": "scratch"}, search=search)
    launch(file)
    config = load_study(file)
    where = SearchSpace.of(config, 4)
    named = [where.named[name].key for name in BASELINE_NAMES]
    keys = [t.user_attrs["candidate"] for t in open_existing_study(config).trials()]
    assert keys == [*named, "minus-1", "minus-2", "minus-3", "minus-1-2", "minus-1-3"]
    assert set(keys) == {*named, *(c.key for c in where.everything())}
    assert {r.candidate.key for r in read_records(config.run_folder / "records")} == set(keys)
    launch(file)
    assert len(open_existing_study(config).trials()) == len(keys), "nothing is left"
