"""The benchmark of search methods: its landscapes are what they claim to be, and a search is charged for what it spends."""

import argparse
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from prunesearch.study.candidate import Candidate
from prunesearch.study.front import hypervolume
from prunesearch.study.importance import family

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "search"
sys.path.insert(0, str(BENCHMARK))

import compare  # noqa: E402
import landscapes  # noqa: E402


@pytest.mark.parametrize("seed", range(5))
def test_the_best_set_of_each_size_equals_exhaustive_search(seed: int) -> None:
    effects = landscapes.Effects.drawn(np.random.default_rng(seed), 9)
    found = effects.mildest(5)
    for size in range(6):
        least = min((s for s in family(range(9), 5) if len(s) == size), key=effects.damage)
        assert effects.damage(found[size]) == pytest.approx(effects.damage(least))


@pytest.mark.parametrize("seed", range(3))
def test_the_true_front_of_a_synthetic_encoder_is_that_of_all_its_candidates(seed: int) -> None:
    landscape = landscapes.synthetic(seed, layers=7, most=4)
    everything = landscape.space.everything()
    assert landscape.true_front == landscapes.front((landscape.params(c), landscape.wer(c)) for c in everything)
    assert landscape.share(c.key for c in everything) == 1


@pytest.mark.parametrize("seed", range(100))
def test_front_and_hypervolume_are_what_their_definitions_say(seed: int) -> None:
    rng = random.Random(seed)
    points = [(float(rng.randint(0, 9)), rng.randint(1, 9) / 10) for _ in range(rng.randint(1, 12))]  # ties are likely
    found = landscapes.front(points)
    dominated = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert found == sorted(set(points) - dominated)
    for log in (False, True):
        seen = [(p, math.log(w) if log else w) for p, w in points]
        expected = hypervolume(seen, (8.0, math.log(0.8) if log else 0.8))
        assert landscapes.hypervolume(found, (8.0, 0.8), log) == pytest.approx(expected)


def test_more_candidates_never_lower_the_quality_of_a_search() -> None:
    landscape = landscapes.synthetic(0, layers=6, most=3)
    keys = [c.key for c in landscape.space.everything()]
    random.Random(0).shuffle(keys)
    shares = [landscape.share(keys[:n]) for n in range(len(keys) + 1)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1


def test_an_unknown_method_is_refused() -> None:
    assert compare.methods("tpe; layer-sets") == ["tpe", "layer-sets"]
    with pytest.raises(argparse.ArgumentTypeError, match="tpee: must be of layer-sets;"):
        compare.methods("tpee;layer-sets")


def test_committed_tables_are_complete() -> None:
    tables = [landscapes.table(path) for path in compare.TABLES.glob("*.json")]
    assert len(tables) >= 2
    for whole in tables:
        assert whole is not None
        everything = whole.space.everything()
        assert {(whole.params(c), whole.wer(c)) for c in everything if whole.on_true_front(c)} == set(whole.true_front)
        assert whole.share(c.key for c in everything) == 1


@pytest.mark.parametrize(("name", "ends"), [("staged evolution", compare.staged), ("random", compare.dominated(0.95))])
def test_a_search_that_ends_trials_early_is_charged_for_the_steps_that_were_trained(name: str, ends: compare.Ends) -> None:
    table = landscapes.table(compare.TABLES / "quickstart.json")
    assert table is not None
    run = compare.run(table, compare.METHODS[name].make(table, 0), trainings=30, ends=ends)
    assert run.ended
    assert len(run.order) > 30 >= sum(run.costs[:-1])
    assert sum(run.costs) >= 30
    assert all((cost == 1) == (key not in run.ended) for key, cost in zip(run.order, run.costs, strict=True))
    assert set(run.costs) <= {0.25, 0.5, 1.0}
    early = [key for key in run.order if key not in run.ended][:3]
    spent = sum(run.costs[: run.order.index(early[-1]) + 1])
    assert run.finished(spent) == early
    assert run.finished(spent - 0.25) == early[:2]


def test_offspring_as_good_as_its_parent_survives() -> None:
    table = landscapes.table(compare.TABLES / "quickstart.json")
    assert table is not None
    run = compare.run(table, compare.METHODS["staged evolution"].make(table, 0), trainings=30, ends=compare.staged)
    best: dict[int, Candidate] = {}
    for candidate in map(Candidate.from_key, run.order):
        parent = best.get(len(candidate.removed_layers))
        rungs = table.rungs[candidate.key]  # type: ignore[index]
        behind = parent is not None and any(wer > table.rungs[parent.key][step] for step, wer in rungs.items())  # type: ignore[index]
        assert (candidate.key in run.ended) == behind
        if not behind and (parent is None or table.wer(candidate) < table.wer(parent)):
            best[len(candidate.removed_layers)] = candidate
