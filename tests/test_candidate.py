import itertools
import random

import pytest

from prunesearch.study.candidate import BASELINE_NAMES, Candidate, baselines


def test_layers_are_kept_sorted_and_compare_equal() -> None:
    assert Candidate((5, 1, 3), 4) == Candidate((1, 3, 5), 4)


def test_key_is_canonical_and_reversible() -> None:
    rng = random.Random(0)
    sets = [tuple(rng.sample(range(32), rng.randint(0, 8))) for _ in range(300)]
    drawn = [Candidate(s, rng.choice([0, 1, 16]), rng.choice([0, 1, 12])) for s in sets]
    assert all(Candidate.from_key(c.key) == c for c in drawn)
    assert all((a == b) == (a.key == b.key) for a, b in itertools.pairwise(drawn))


@pytest.mark.parametrize("wrong", ["", "minus-", "full+lora", "minus-1-+lora2", "top2", "full+lora8 ", "full@", "full@1+lora8"])
def test_other_texts_are_no_keys(wrong: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Candidate.from_key(wrong)


@pytest.mark.parametrize(("layers", "rank"), [((-1,), 0), ((2, 2), 0), ((), -4)])
def test_impossible_candidates_are_refused(layers: tuple[int, ...], rank: int) -> None:
    with pytest.raises(ValueError, match="got"):
        Candidate(layers, rank)


def test_the_four_baselines() -> None:
    found = baselines(12, 8)
    assert tuple(found) == BASELINE_NAMES
    assert found["unpruned"] == Candidate()
    assert found["unpruned+lora"] == Candidate((), 8)
    assert found["top2"] == Candidate((10, 11))
    assert found["top2+lora"] == Candidate((10, 11), 8)
