"""The sampler for layer sets: its expected gain, its model, and what it finds on a landscape whose front is known."""

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from prunesearch.search.layer_sets import LayerSetSampler, expected_improvement
from prunesearch.search.loss_model import loss_model
from prunesearch.search.samplers import CandidateSampler, optuna_sampler
from prunesearch.search.space import SearchSpace
from prunesearch.search.surrogate import EXPECTED, Surrogate
from prunesearch.study.candidate import Candidate
from prunesearch.study.front import hypervolume

DEPTH, RANKS = 10, (0, 4, 16)
SPACE = SearchSpace(tuple(range(DEPTH)), 5, RANKS, {})
COSTS = [1.5, 0.4, 0.6, 0.15, 0.3, 0.1, 0.2, 0.12, 0.25, 0.5]


def log_wer(candidate: Candidate) -> float:
    """Neighbours cost less together, layers 3 and 7 more; LoRA repairs a tenth."""
    layers = candidate.removed_layers
    cost = sum(COSTS[i] for i in layers)
    cost -= sum(0.6 * min(COSTS[a], COSTS[b]) for a, b in itertools.pairwise(layers) if b - a == 1)
    cost += 0.4 * ({3, 7} <= set(layers))
    return math.log(0.05) + cost * (1 - 0.1 * (candidate.lora_rank > 0))


def params_of(candidate: Candidate) -> float:
    return 1000.0 - 50 * len(candidate.removed_layers) + candidate.lora_rank


SCAN = {s: log_wer(Candidate(s)) - log_wer(Candidate()) for k in (1, 2) for s in itertools.combinations(range(DEPTH), k)}


def found(sampler: CandidateSampler, trials: int) -> optuna.Study:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    for _ in range(trials):
        trial = study.ask(SPACE.distributions)
        candidate = SPACE.candidate(trial.params)
        trial.set_user_attr("candidate", candidate.key)
        study.tell(trial, [math.exp(log_wer(candidate)), params_of(candidate)])
    return study


def best_at_each_size(study: optuna.Study) -> list[float]:
    values = [(SPACE.candidate(t.params), t.values[0]) for t in study.get_trials()]
    return [min((v for c, v in values if len(c.removed_layers) >= k), default=math.inf) for k in range(6)]


def test_expected_improvement_equals_a_monte_carlo_mean() -> None:
    draws = np.random.default_rng(0).normal(-2.0, 0.3, 400_000)
    for best in (-2.5, -2.0, -1.0):
        simulated = np.maximum(0, best - draws).mean()
        closed = expected_improvement(np.array(best), np.array(-2.0), np.array(0.3))
        assert closed == pytest.approx(simulated, rel=0.02)
    assert expected_improvement(np.array(-1.0), np.array(-3.0), np.array(1e-6)) == pytest.approx(2.0)


def test_the_gain_is_the_expected_growth_of_the_hypervolume() -> None:
    sampler = LayerSetSampler(SPACE, params_of)
    front = [(800.0, math.log(0.5), Candidate()), (900.0, math.log(0.2), Candidate())]

    class Certain:
        noise = 0.0

        def predict(self, candidates: list[Candidate]) -> tuple[np.ndarray, np.ndarray]:
            return np.full(len(candidates), math.log(0.3)), np.full(len(candidates), 1e-9)

    gain = sampler._gain([Candidate((0, 1, 2), 0)], Certain(), None, front)[0]  # type: ignore[arg-type]
    assert gain == pytest.approx((900 - 850) * math.log(0.5 / 0.3), rel=1e-4)  # at 850 parameters, until the front is lower


def test_the_surrogates_prior_is_a_covariance() -> None:
    rng = random.Random(0)
    candidates = list({c.key: c for c in (SPACE.draw(rng) for _ in range(60))}.values())
    surrogate = Surrogate(SPACE.removable, RANKS, loss_model(SPACE.removable, SCAN))
    encoded = surrogate.encode(candidates)
    parts = surrogate.parts(encoded, encoded)
    assert len(parts) == len(EXPECTED)
    for part, own in zip(parts, surrogate.own_parts(encoded), strict=True):
        assert np.allclose(part, part.T)
        assert np.allclose(np.diag(part), own)
        assert np.linalg.eigvalsh(part).min() > -1e-8
    surrogate.variances = np.random.default_rng(0).uniform(0.1, 1, len(EXPECTED) + 1)
    assert np.allclose(surrogate.covariance(encoded, encoded), np.tensordot(surrogate.variances[:-1], parts, 1))


@pytest.mark.parametrize("scan", [None, SCAN], ids=["no scan", "scan"])
def test_the_surrogate_predicts_unseen_candidates(scan: dict | None) -> None:
    rng = random.Random(1)
    drawn = list({c.key: c for c in (SPACE.draw(rng) for _ in range(120))}.values())
    seen, unseen = drawn[:50], drawn[50:]
    values, truth = (np.array([log_wer(c) for c in cs]) for cs in (seen, unseen))
    surrogate = Surrogate(SPACE.removable, RANKS, loss_model(SPACE.removable, scan))
    surrogate.fit(seen, values, np.zeros(len(seen)))
    means, deviations = surrogate.given(seen, values, np.zeros(len(seen))).predict(unseen)
    error = means - truth
    assert (error**2).mean() < 0.1 * truth.var()
    assert (np.abs(error) < 3 * deviations).mean() > 0.9
    again, _ = surrogate.given(seen, values, np.zeros(len(seen))).predict(seen)
    assert np.abs(again - values).max() < 0.2


@pytest.mark.parametrize("scan", [None, SCAN], ids=["no scan", "scan"])
def test_thirty_trials_find_a_better_front_than_random_search(scan: dict | None) -> None:
    truth = [min(math.exp(log_wer(c)) for c in SPACE.everything() if len(c.removed_layers) >= k) for k in range(6)]

    def lost(make: Callable[[int], CandidateSampler]) -> float:
        runs = [best_at_each_size(found(make(seed), 30)) for seed in range(3)]
        return sum(w / t - 1 for wers in runs for w, t in zip(wers, truth, strict=True))

    ours = lost(lambda seed: LayerSetSampler(SPACE, params_of, seed, scan=scan))
    assert ours < 0.3 * lost(lambda seed: CandidateSampler(SPACE, seed))


def test_many_workers_get_different_candidates_and_pruned_trials_are_used() -> None:
    sampler = LayerSetSampler(SPACE, params_of, scan=SCAN)
    study = found(sampler, 12)
    keys = set()
    for _ in range(8):
        trial = study.ask(SPACE.distributions)
        key = SPACE.candidate(trial.params).key
        trial.set_user_attr("candidate", key)
        keys.add(key)
    assert len(keys) == 8
    assert not keys & {t.user_attrs["candidate"] for t in study.get_trials(states=[TrialState.COMPLETE])}

    for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        t.user_attrs["rung_5"] = {"wer": 2 * t.values[0], "params": 0}
    assert len(sampler._results(study.get_trials(deepcopy=False)).candidates) == 12
    study.tell(trial, state=TrialState.PRUNED)
    ended = study.get_trials(deepcopy=False)[-1]
    ended.user_attrs["rung_5"] = {"wer": 0.4, "params": 0}
    known = sampler._results(study.get_trials(deepcopy=False))
    assert known.candidates[-1] == SPACE.candidate(ended.params)
    assert known.values[-1] == pytest.approx(math.log(0.2))
    assert known.extra[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_resumed_study_gets_the_same_proposals() -> None:
    study = found(LayerSetSampler(SPACE, params_of, scan=SCAN), 25)
    first = [t.user_attrs["candidate"] for t in study.get_trials()]
    part = found(LayerSetSampler(SPACE, params_of, scan=SCAN), 14)
    part.sampler = LayerSetSampler(SPACE, params_of, scan=SCAN)
    for _ in range(11):
        trial = part.ask(SPACE.distributions)
        candidate = SPACE.candidate(trial.params)
        trial.set_user_attr("candidate", candidate.key)
        part.tell(trial, [math.exp(log_wer(candidate)), params_of(candidate)])
    assert [t.user_attrs["candidate"] for t in part.get_trials()] == first


@pytest.mark.parametrize("most", [2, 3, 5, 6])
@pytest.mark.parametrize("scan", [None, SCAN], ids=["no scan", "scan"])
def test_the_first_proposals_cover_every_size(most: int, scan: dict | None) -> None:
    sampler = LayerSetSampler(SearchSpace(SPACE.removable, most, RANKS, {}), params_of, scan=scan)
    sizes = [len(sampler._scan_proposer.propose(n, set(), random.Random(n), 0.1).removed_layers) for n in range(most + 1)]  # type: ignore[union-attr]
    assert sorted(sizes) == list(range(most + 1))
    assert sizes[0] == most
    assert sizes[-1] == 0


@pytest.mark.parametrize("name", ["layer-sets", "tpe", "random"])
def test_the_sampler_works_in_a_plain_optuna_loop(name: str) -> None:
    """Optuna's own loop, with candidates that fail."""
    space = SearchSpace((0, 1, 2, 3), 2, (0, 8), {})

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        removed = [i for i in range(4) if trial.suggest_categorical(f"remove_{i}", [False, True])]
        candidate = Candidate(tuple(removed), trial.suggest_int("lora_rank", 0, 8))
        if removed == [0]:
            raise ValueError
        return math.exp(log_wer(candidate)), params_of(candidate)

    sampler = LayerSetSampler(space, params_of) if name == "layer-sets" else optuna_sampler(name, space, 0, 4)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    study.optimize(objective, n_trials=space.size, catch=ValueError)
    assert sorted(space.candidate(t.params).key for t in study.trials) == sorted(c.key for c in space.everything())
    assert sum(t.state == TrialState.FAIL for t in study.trials) == 2


def test_candidates_of_other_origin_can_become_nsga2_parents() -> None:
    space = SearchSpace(SPACE.removable, 5, RANKS, {"unpruned": Candidate()})
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna_sampler("nsga2", space, 0, 10, SCAN))
    for _ in range(40):
        trial = study.ask(space.distributions)
        candidate = space.candidate(trial.params)
        study.tell(trial, [math.exp(log_wer(candidate)), params_of(candidate)])
    generations = [t.system_attrs["NSGAIISampler:generation"] for t in study.get_trials()]
    assert generations == [0] * 16 + [1] * 16 + [2] * 8


def test_the_surrogates_neighbours_are_adjacent_in_the_encoder() -> None:
    surrogate = Surrogate((0, 4, 5, 7, 9), (0,))
    encoded = surrogate.encode([Candidate((0, 4)), Candidate((4, 5)), Candidate((5, 7)), Candidate((4, 5, 7, 9))])
    assert encoded.neighbours.sum(1).tolist() == [0, 1, 0, 1]
    assert encoded.one_apart.sum(1).tolist() == [0, 0, 1, 2]
    assert (encoded.runs[:, 2] * 2.5).round().tolist() == [1, 2, 1, 2]  # the longest run


def test_the_front_is_repeated_if_trainings_differ_and_hardly_if_they_do_not() -> None:
    space = SearchSpace(SPACE.removable, 5, RANKS, {}, repeats=2)

    def keys(noise: float) -> list[str]:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=LayerSetSampler(space, params_of, scan=SCAN))
        for _ in range(45):
            trial = study.ask(space.distributions)
            candidate = space.candidate(trial.params)
            trial.set_user_attr("candidate", candidate.key)
            luck = random.Random(candidate.key).gauss(0, noise)
            study.tell(trial, [math.exp(log_wer(candidate) + luck), params_of(candidate)])
        return [t.user_attrs["candidate"] for t in study.get_trials()]

    noisy, calm = keys(0.15), keys(0.0)
    assert len(set(noisy)) == len(noisy)
    again = [Candidate.from_key(k) for k in noisy if "@" in k]
    assert len(again) >= 5
    assert {c.repeat for c in again} <= {1, 2}
    assert all(noisy.index(Candidate(c.removed_layers, c.lora_rank, c.repeat - 1).key) < noisy.index(c.key) for c in again)
    assert sum("@" in k for k in calm) <= 3  # what it takes to see that two trainings come out alike


def test_workers_that_begin_together_begin_with_sets_of_different_sizes() -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=LayerSetSampler(SPACE, params_of, scan=SCAN))
    sizes = []
    for _ in range(5):
        trial = study.ask(SPACE.distributions)
        candidate = SPACE.candidate(trial.params)
        trial.set_user_attr("candidate", candidate.key)
        sizes.append(len(candidate.removed_layers))
    assert sorted(sizes) == [1, 2, 3, 4, 5]


def test_proposals_keep_within_the_limit_on_the_worst_group() -> None:
    """Without layer 5, which costs the others least, one group's WER is three times the mean."""
    limit = 0.15

    def worst(candidate: Candidate) -> float:
        return math.exp(log_wer(candidate)) * (3.0 if 5 in candidate.removed_layers else 1.2)

    def proposed(most: float | None) -> optuna.Study:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=LayerSetSampler(SPACE, params_of, 0, 6, SCAN, most))
        for _ in range(30):
            trial = study.ask(SPACE.distributions)
            candidate = SPACE.candidate(trial.params)
            trial.set_user_attr("candidate", candidate.key)
            trial.set_user_attr("worst_group_wer", worst(candidate))
            trial.set_constraint("worst_group_wer", worst(candidate) - limit)
            study.tell(trial, [math.exp(log_wer(candidate)), params_of(candidate)])
        return study

    def volume(candidates: list[Candidate]) -> float:
        points = [(params_of(c), log_wer(c)) for c in candidates if worst(c) <= limit]
        return hypervolume(points, (params_of(Candidate((), 16)) + 1, 0.0))

    everything = volume(SPACE.everything())
    free, kept = ([SPACE.candidate(t.params) for t in proposed(most).get_trials()] for most in (None, limit))
    assert volume(kept) > 0.98 * everything
    assert volume(free) < 0.7 * everything
    assert all(worst(SPACE.candidate(t.params)) <= limit for t in proposed(limit).best_trials)
