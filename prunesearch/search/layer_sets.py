"""A sampler for layer sets: a candidate's parameters are known beforehand, and only its WER is uncertain.

It models log WER with a Gaussian process over candidates (`surrogate`), and proposes the candidate with the largest expected
gain in hypervolume. It chooses among neighbours of the front, sets that the scan finds cheap, and random sets. The hypervolume
is that of log WER, so that halving the errors counts the same at 4 % and at 40 %; otherwise, all trials would go to systems
with a very high WER. Since the parameters are known, the gain is a sum of expected improvements over the steps of
the front.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr
from threadpoolctl import threadpool_limits

from prunesearch.search.loss_model import ScreenedLoss, loss_model
from prunesearch.search.samplers import WORST_GROUP_WER, CandidateSampler
from prunesearch.search.scan_costs import Array, log_wer
from prunesearch.search.scan_proposer import ScanProposer
from prunesearch.search.space import ParamsOf, SearchSpace
from prunesearch.search.study_progress import candidate_key
from prunesearch.search.surrogate import EXPECTED, EXPECTED_SCREENED, FIT_AT_MOST, LossModel, Posterior, Surrogate
from prunesearch.study.candidate import Candidate
from prunesearch.study.front import non_dominated
from prunesearch.study.importance import LayerSet

# The best of 0.05, 0.1 and 0.3 after 10 to 40 trials (benchmarks/search). At lower temperatures, the first sets are too similar
# to learn from.
FIRST_TEMPERATURE = 0.1
SMALL_SPACE = 3000  # in a space of so many candidates, all of them are considered
POOL = 1600
SCREENED = 10  # of each size, sets that were cheapest when they were screened, besides
REFINED = 5  # candidates whose neighbours are considered in each round
ROUNDS = 2
PREDICT_FROM = 260  # results that predictions use: half of them near the front, the others spread over the rest
LEAST_NOISE = 0.01  # of log WER; with less, repeats are never worth a training
REFERENCE_WER = 1.0


@dataclass(frozen=True)
class Results:
    """Candidates with their log WER, by trial number. `extra`: variances of the results besides the noise of a training."""

    numbers: list[int]
    candidates: list[Candidate]
    values: Array
    extra: Array


class LayerSetSampler(CandidateSampler):
    """For any study that minimises (WER, parameters) over `space`: with `study.optimize` and `space.suggest(trial)`, or with
    ask and tell.

    `params_of`: a candidate's second objective. `startup_trials`: proposals before the first model; they come from the scan, or
    are random sets without one. `scan`: what removing a set adds to the loss, for the sets that were measured; `()` has the
    unpruned loss (`Scan.increases()`). `max_worst_group_wer`: trials must carry the attribute `worst_group_wer`; it is
    modelled as WER is, and an expected gain is multiplied by the probability that the limit holds.
    """

    def __init__(
        self,
        space: SearchSpace,
        params_of: ParamsOf,
        seed: int = 0,
        startup_trials: int = 6,
        scan: Mapping[LayerSet, float] | None = None,
        max_worst_group_wer: float | None = None,
    ):
        super().__init__(space, seed)
        self._params_of = params_of
        self._limit = None if max_worst_group_wer is None else _bounded_log_wer(max_worst_group_wer)
        self._startup_trials = startup_trials
        self._scan = scan
        self._scan_proposer = ScanProposer(space, scan)
        self._seen: dict[int, tuple[Candidate, float]] = {}  # trial number -> candidate, log WER
        self._fitted: tuple[int, Surrogate] | None = None
        self._everything: list[Candidate] | None = None
        self._losses: LossModel | None = None

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        others = (t for t in study.get_trials(deepcopy=False) if trial is None or t.number != trial.number)
        trials = [t for t in others if candidate_key(t)]  # a study may hold trials of other programs
        if (number := begun - len(self._space.named)) < self._startup_trials:
            return self._scan_proposer.propose(max(0, number), seen, rng, FIRST_TEMPERATURE)
        known = self._results(trials)
        if len(known.candidates) < 3:
            return None
        with threadpool_limits(limits=1, user_api="blas"):  # with a few hundred rows, more threads are slower
            return self._most_promising(trials, known, seen, rng)

    def _most_promising(
        self, trials: Sequence[FrozenTrial], known: Results, seen: set[str], rng: random.Random
    ) -> Candidate | None:
        """The candidate with the largest expected gain, given the results and the running trials."""
        surrogate = self._surrogate(trials, known)
        known = self._informative(known)
        posterior = surrogate.given(known.candidates, known.values, known.extra)
        running = [Candidate.from_key(key) for t in trials if t.state == TrialState.RUNNING and (key := candidate_key(t))]
        if running:  # assume that they end as predicted, so that the next proposal is a different one
            means, _ = posterior.predict(running)
            everyone = known.candidates + running
            extra = np.append(known.extra, np.zeros(len(running)))
            known = Results(known.numbers, everyone, np.append(known.values, means), extra)
            posterior = surrogate.given(known.candidates, known.values, known.extra)
        worst = self._worst_groups(trials, surrogate)
        front = self._front(known.candidates, posterior, worst)
        return self._best(posterior, worst, front, seen, rng)

    def _worst_groups(self, trials: Sequence[FrozenTrial], surrogate: Surrogate) -> Posterior | None:
        """The posterior of the worst group's log WER, if the study limits it. It uses the covariance that was fitted to WER."""
        told = [t for t in trials if t.state == TrialState.COMPLETE and WORST_GROUP_WER in t.user_attrs]
        if self._limit is None or len(told) < 3:
            return None
        told = told[-PREDICT_FROM:]
        values = np.array([_bounded_log_wer(t.user_attrs[WORST_GROUP_WER]) for t in told])
        return surrogate.given([self._space.candidate(t.params) for t in told], values, np.zeros(len(told)))

    def _results(self, trials: Sequence[FrozenTrial]) -> Results:
        """Results of finished trials, and of trials that ended at a rung, with the WER that they would have reached."""
        finished = [t for t in trials if t.state == TrialState.COMPLETE]
        found: list[tuple[int, Candidate, float, float]] = []
        for t in finished:
            if t.number not in self._seen:
                self._seen[t.number] = self._space.candidate(t.params), _bounded_log_wer(t.values[0])
            found.append((t.number, *self._seen[t.number], 0.0))
        for t in trials:
            if t.state != TrialState.PRUNED or (last := _last_rung(t)) is None:
                continue
            name, wer = last
            falls = [
                _bounded_log_wer(f.values[0]) - _bounded_log_wer(f.user_attrs[name]["wer"])
                for f in finished
                if name in f.user_attrs
            ]
            if len(falls) >= 3:
                value = _bounded_log_wer(wer) + float(np.mean(falls))
                found.append((t.number, self._space.candidate(t.params), value, float(np.var(falls, ddof=1))))
        found.sort(key=lambda x: x[0])
        return Results(
            [n for n, *_ in found],
            [c for _, c, _, _ in found],
            np.array([v for *_, v, _ in found]),
            np.array([e for *_, e in found]),
        )

    def _informative(self, known: Results) -> Results:
        """All results, or `PREDICT_FROM` of them: those nearest to the front, and an even selection of the others."""
        count = len(known.candidates)
        if count <= PREDICT_FROM:
            return known
        params = np.array([self._params_of(c) for c in known.candidates])
        order = np.lexsort((known.values, params))
        best = np.minimum.accumulate(known.values[order])
        above = np.empty(count)
        above[order] = known.values[order] - best
        ranked = np.argsort(above, kind="stable")
        near, far = ranked[: PREDICT_FROM // 2], ranked[PREDICT_FROM // 2 :]
        chosen = np.sort(np.append(near, far[np.linspace(0, len(far) - 1, PREDICT_FROM // 2).astype(int)]))
        return Results(
            [known.numbers[i] for i in chosen], [known.candidates[i] for i in chosen], known.values[chosen], known.extra[chosen]
        )

    def _surrogate(self, trials: Sequence[FrozenTrial], known: Results) -> Surrogate:
        """Refit whenever the number of results has grown by 10 %, always on the results up to that point, so that resuming
        gives the same fit.
        """
        count = 1
        while (following := max(count + 1, int(count * 1.1))) <= len(known.candidates):
            count = following
        if self._fitted is None or self._fitted[0] != count:
            then = self._results([t for t in trials if t.number <= known.numbers[count - 1]])
            layers = tuple(sorted({*self._space.removable, *(i for c in self._space.named.values() for i in c.removed_layers)}))
            if self._losses is None:
                self._losses = loss_model(layers, self._scan)
            expected = EXPECTED_SCREENED if isinstance(self._losses, ScreenedLoss) else EXPECTED
            surrogate = Surrogate(layers, self._space.ranks, self._losses, expected)
            order = np.argsort(then.values, kind="stable")
            chosen = sorted(order[np.linspace(0, len(order) - 1, min(len(order), FIT_AT_MOST)).astype(int)])
            surrogate.fit([then.candidates[i] for i in chosen], then.values[chosen], then.extra[chosen])
            self._fitted = count, surrogate
        return self._fitted[1]

    def _front(
        self, candidates: Sequence[Candidate], posterior: Posterior, worst: Posterior | None
    ) -> list[tuple[float, float, Candidate]]:
        """(parameters, predicted log WER, candidate) of the front within the limit, fewest parameters first."""
        if worst is not None:
            candidates = [c for c, p in zip(candidates, self._within(candidates, worst), strict=True) if p >= 0.5]
        if not candidates:
            return []
        means, _ = posterior.predict(candidates)
        points = [(self._params_of(c), float(m)) for c, m in zip(candidates, means, strict=True)]
        first = {points[i]: i for i in reversed(non_dominated(points))}  # of candidates with equal points, the first one
        return [(*point, candidates[i].system) for point, i in sorted(first.items())]

    def _within(self, candidates: Sequence[Candidate], worst: Posterior) -> Array:
        """The probability that each candidate's worst group keeps within the limit: (N,)."""
        assert self._limit is not None
        means, deviations = worst.predict(candidates)
        likely: Array = ndtr((self._limit - means) / deviations)
        return likely

    def _best(
        self,
        posterior: Posterior,
        worst: Posterior | None,
        front: list[tuple[float, float, Candidate]],
        seen: set[str],
        rng: random.Random,
    ) -> Candidate | None:
        pool = [c for c in self._pool(front, rng) if c.key not in seen] + self._repeats(posterior, front, seen)
        if not pool:
            return None
        gains = self._gain(pool, posterior, worst, front)
        if self._everything is None:
            for _ in range(ROUNDS):  # hill climbing from the best candidates
                best = np.argsort(-gains)[:REFINED]
                known_keys = {c.key for c in pool}
                near = {n.key: n for i in best for n in _neighbours(self._space, pool[i])}
                new = [c for key, c in near.items() if key not in known_keys and key not in seen]
                if not new:
                    break
                pool += new
                gains = np.append(gains, self._gain(new, posterior, worst, front))
                if gains.argmax() < len(pool) - len(new):
                    break
        return pool[int(gains.argmax())]

    def _pool(self, front: list[tuple[float, float, Candidate]], rng: random.Random) -> list[Candidate]:
        if self._space.size <= SMALL_SPACE:
            if self._everything is None:
                self._everything = self._space.everything()
            return self._everything
        found = {n.key: n for _, _, c in front for n in _neighbours(self._space, c)}
        pool = rng.sample(sorted(found.values(), key=lambda c: c.key), min(len(found), POOL // 2))
        sizes = [rng.randint(0, self._space.max_removed) for _ in range(POOL - len(pool))]
        third = len(sizes) // 3
        noise = np.random.default_rng(rng.getrandbits(32))
        draw = self._scan_proposer.draw
        sets = draw(sizes[third:], 1.0, noise) + draw(sizes[:third], math.inf, noise)
        pool += [Candidate(layers, rng.choice(self._space.ranks)) for layers in sets]
        pool += [Candidate(layers, rank) for layers in self._scan_proposer.cheapest(SCREENED) for rank in self._space.ranks]
        return list({c.key: c for c in pool}.values())

    def _repeats(self, posterior: Posterior, front: list[tuple[float, float, Candidate]], seen: set[str]) -> list[Candidate]:
        """The front's members, each from its next seed; none if two trainings of one system hardly differ."""
        if posterior.noise < LEAST_NOISE:
            return []
        again = ([replace(c, repeat=n) for n in range(1, self._space.repeats + 1)] for _, _, c in front)
        return [new[0] for each in again if (new := [c for c in each if c.key not in seen])]

    def _gain(
        self,
        pool: Sequence[Candidate],
        posterior: Posterior,
        worst: Posterior | None,
        front: list[tuple[float, float, Candidate]],
    ) -> Array:
        """Expected gain in hypervolume of log WER, bounded by a WER of 1 and the largest number of parameters. A tiny term
        keeps an order among candidates without an expected gain: those that may be better than predicted come first.
        """
        means, deviations = posterior.predict(pool)
        deviations = deviations**2 / np.hypot(deviations, posterior.noise)  # the part that one training would remove
        params = np.array([self._params_of(c) for c in pool])
        widest = self._params_of(Candidate((), max(self._space.ranks))) * (1 + 1e-9)
        begins = np.array([p for p, _, _ in front])
        steps = np.append(0.0, [v for _, v, _ in front])  # log WER; 0 is a WER of 1: below the front's smallest member
        left, right = np.append(-np.inf, begins), np.append(begins, widest)
        widths = np.maximum(0.0, right - np.maximum(left, params[:, None]))  # (N, steps)
        gains = (widths * expected_improvement(steps, means[:, None], deviations[:, None])).sum(1)
        here = steps[(begins <= params[:, None]).sum(1)]
        hope = here - means + 2 * deviations
        gains += 1e-9 * widest * ndtr(hope)
        return gains if worst is None else gains * self._within(pool, worst)


def expected_improvement(best: Array, mean: Array, deviation: Array) -> Array:
    """E[max(0, best - Y)] for Y ~ N(mean, deviation^2)."""
    z = (best - mean) / deviation
    gain: Array = (best - mean) * ndtr(z) + deviation * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return np.maximum(gain, 0.0)


def _bounded_log_wer(wer: float) -> float:
    return log_wer(min(wer, REFERENCE_WER))


def _last_rung(trial: FrozenTrial) -> tuple[str, float] | None:
    name = max((n for n in trial.user_attrs if n.startswith("rung_")), key=lambda n: int(n.removeprefix("rung_")), default=None)
    return None if name is None else (name, trial.user_attrs[name]["wer"])


def _neighbours(space: SearchSpace, candidate: Candidate) -> list[Candidate]:
    """Candidates with one layer more, one less, one exchanged for another, or the next rank up or down."""
    layers, rank = set(candidate.removed_layers) & set(space.removable), candidate.lora_rank
    kept = [i for i in space.removable if i not in layers]
    sets = [layers - {i} for i in layers]
    sets += [layers - {i} | {j} for i in layers for j in kept]
    sets += [layers | {j} for j in kept]
    places = [k for k, r in enumerate(space.ranks) if r == rank]
    ranks = [space.ranks[p] for k in places for p in (k - 1, k + 1) if 0 <= p < len(space.ranks)] or list(space.ranks)
    changed = [(tuple(sorted(s)), rank) for s in sets if rank in space.ranks] + [(tuple(sorted(layers)), r) for r in ranks]
    return [Candidate(s, r) for s, r in changed if len(s) <= space.max_removed]
