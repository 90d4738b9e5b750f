"""The bootstraps, against slow references that resample one utterance at a time."""

import random

import numpy as np
import pytest

from prunesearch.report.statistics import paired_bootstrap, relative_bootstrap


def test_bootstrap_agrees_with_a_slow_reference() -> None:
    rng = random.Random(1)
    words = [rng.randint(1, 12) for _ in range(40)]
    first, second = ([rng.randint(0, w) for w in words] for _ in range(2))
    draws = [rng.choices(range(40), k=40) for _ in range(4000)]
    slow = sorted(sum(first[i] - second[i] for i in draw) / sum(words[i] for i in draw) for draw in draws)
    fast = paired_bootstrap(np.array(first), np.array(second), np.array(words), resamples=4000)
    assert fast.estimate == pytest.approx((sum(first) - sum(second)) / sum(words))
    assert fast.low == pytest.approx(slow[100], abs=0.015)
    assert fast.high == pytest.approx(slow[3900], abs=0.015)


@pytest.mark.parametrize(("trainings", "alike"), [((3, 3), True), ((3, 3), False), ((2, 3), False)])
def test_bootstrap_over_trainings_agrees_with_a_slow_reference(trainings: tuple[int, int], alike: bool) -> None:
    rng = np.random.default_rng(2)
    words = rng.integers(1, 12, 40)
    first, second = (np.array([np.minimum(words, rng.integers(0, 5, 40) + 2 * s) for s in range(n)]) for n in trainings)
    slow: dict[str, list[float]] = {"paired": [], "relative": []}
    for _ in range(4000):
        rows, ours = rng.integers(0, 40, 40), rng.integers(0, trainings[0], trainings[0])
        theirs = ours if alike else rng.integers(0, trainings[1], trainings[1])
        a, b = first[ours][:, rows].sum() / trainings[0], second[theirs][:, rows].sum() / trainings[1]
        slow["paired"].append((a - b) / words[rows].sum())
        slow["relative"].append(a / b - 1)
    found = {
        "paired": paired_bootstrap(first, second, words, 4000, by_training=alike),
        "relative": relative_bootstrap(first, second, 4000, by_training=alike),
    }
    for name, difference in found.items():
        low, high = np.quantile(slow[name], [0.025, 0.975])
        assert difference.low == pytest.approx(low, abs=0.1 * (high - low)), name
        assert difference.high == pytest.approx(high, abs=0.1 * (high - low)), name
    assert found["paired"].estimate == pytest.approx((first.mean(0).sum() - second.mean(0).sum()) / words.sum())


def test_the_relative_bootstrap_agrees_with_a_slow_one() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.poisson(2.0, 400), rng.poisson(2.4, 400)
    found = relative_bootstrap(first, second)
    draws = rng.integers(0, 400, (4000, 400))
    slow = first[draws].sum(1) / second[draws].sum(1) - 1
    assert found.estimate == pytest.approx(first.sum() / second.sum() - 1)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(slow, [0.025, 0.975])), abs=0.01)


def test_the_bootstrap_of_equal_systems_is_zero_and_of_a_better_one_negative() -> None:
    words = np.full(50, 10)
    errors = np.arange(50) % 4
    same = paired_bootstrap(errors, errors, words)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    assert same.verdict == "no difference can be seen"
    better = paired_bootstrap(errors, errors + 1 + errors % 2, words)
    assert better.verdict == "lower"
    assert better.low <= better.estimate <= better.high < 0
    worse = paired_bootstrap(errors + 1 + errors % 2, errors, words)
    assert (worse.verdict, worse.estimate) == ("higher", -better.estimate)
    assert better == paired_bootstrap(errors, errors + 1 + errors % 2, words)  # seeded


def test_a_relative_change_against_zero_errors_is_nan() -> None:
    found = relative_bootstrap(np.ones(5, int), np.zeros(5, int))
    assert np.isnan([found.estimate, found.low, found.high]).all()


def test_the_bootstrap_refuses_unpaired_counts() -> None:
    with pytest.raises(ValueError, match="same utterances"):
        paired_bootstrap(np.ones(3), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap(np.ones(0), np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match="same utterances"):
        relative_bootstrap(np.ones(3), np.ones(2))
