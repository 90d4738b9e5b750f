import itertools
import random

import pytest

from prunesearch.study.candidate import BASELINE_NAMES, Candidate, baselines, count_candidates


def test_layers_are_kept_sorted_and_compare_equal() -> None:
    assert Candidate((5, 1, 3), 4) == Candidate((1, 3, 5), 4)


def test_key_is_canonical_and_reversible() -> None:
    rng = random.Random(0)
    sets = [tuple(rng.sample(range(32), rng.randint(0, 8))) for _ in range(300)]
    drawn = [Candidate(s, rng.choice([0, 1, 16]), rng.choice([0, 1, 12])) for s in sets]
    assert all(Candidate.from_key(c.key) == c for c in drawn)
    assert all((a == b) == (a.key == b.key) for a, b in itertools.pairwise(drawn))


@pytest.mark.parametrize(
    "wrong",
    [
        "", "minus-", "full+lora", "minus-1-+lora2", "top2", "full+lora8 ", "full@", "full@1+lora8", "full\n",
        "../../x", "minus-3/../../x", "/full", "minus-3\x00",
    ],
)  # fmt: skip
def test_malformed_keys_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Candidate.from_key(wrong)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("minus-4-3", "minus-3-4"), ("minus-03", "minus-3"), ("full+lora0", "full"), ("full@0", "full"),
        ("full+lora08@01", "full+lora8@1"),
    ],
)  # fmt: skip
def test_another_spelling_of_a_key_is_refused_and_the_key_is_named(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match="key") as caught:
        Candidate.from_key(wrong)
    assert str(caught.value).endswith(f"write {right!r}")


def test_every_accepted_key_equals_its_candidates_key() -> None:
    rng = random.Random(1)
    accepted = 0
    for _ in range(3000):
        drawn = Candidate(tuple(rng.sample(range(12), rng.randint(0, 3))), rng.choice([0, 8]), rng.choice([0, 1])).key
        at = rng.randrange(len(drawn))
        text = drawn[:at] + rng.choice(["", "0", "1", "-", "@", "+", "/", "٣", ".."]) + drawn[at + rng.choice([0, 1]) :]
        try:
            candidate = Candidate.from_key(text)
        except ValueError:
            continue
        accepted += 1
        assert candidate.key == text
    assert accepted > 100, "some changes give another key"


@pytest.mark.parametrize(("layers", "most", "ranks"), [(4, 2, (0, 4)), (5, 5, (8,)), (6, 0, (0, 2, 4))])
def test_candidates_are_counted_as_they_are_listed(layers: int, most: int, ranks: tuple[int, ...]) -> None:
    sets = [s for k in range(most + 1) for s in itertools.combinations(range(layers), k)]
    assert count_candidates(layers, most, len(ranks)) == len({Candidate(s, rank) for s in sets for rank in ranks})


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
