"""The front, its knee and its hypervolume, against their definitions."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prunesearch.study.candidate import Candidate
from prunesearch.study.front import (
    beats,
    dev_wer,
    hypervolume,
    knee,
    latest_dev_errors,
    non_dominated,
    pareto_front,
    pooled_by_system,
)
from prunesearch.study.record import RunRecord, SplitResult
from tests.report_records import add, add_results, heard, utterances, wer


def test_the_front_equals_its_definition() -> None:
    rng = random.Random(0)
    for size in [0, 1, 2, *range(3, 60, 4)]:
        points = [(rng.randrange(8), rng.randrange(8) / 8) for _ in range(size)]
        dominated = [any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points]
        assert sorted(non_dominated(points)) == [i for i in range(size) if not dominated[i]]


def test_the_front_holds_complete_records_by_size(tmp_path: Path) -> None:
    small, large = add(tmp_path, Candidate((1, 2)), 3), add(tmp_path, Candidate(()), 1)
    worse, stopped = add(tmp_path, Candidate((1,), 8), 3), add(tmp_path, Candidate((0, 1, 2)), 0, state="pruned")
    assert pareto_front([large, stopped, worse, small], "speech_params") == [small, large]


def test_each_language_has_its_own_front(tmp_path: Path) -> None:
    whole = add(tmp_path, Candidate(), 2)
    part = add(tmp_path, Candidate((1,)), 3)
    danish_only = SplitResult.of([u for u in utterances(1) if u.language == "da"])
    mute = part.model_copy(update={"removed_layers": (2, 3), "dev": danish_only})
    assert pareto_front([whole, part, mute], "speech_params", language="nl") == [part, whole]
    assert pareto_front([whole, part, mute], "speech_params", language="da") == [mute]


def test_beats_means_no_more_parameters_and_a_lower_wer(tmp_path: Path) -> None:
    whole, part = add(tmp_path, Candidate(), 2), add(tmp_path, Candidate((1,)), 1)
    assert beats(part, whole, "speech_params")
    assert not beats(whole, part, "speech_params")
    same_wer = part.model_copy(update={"dev": whole.dev})
    assert not beats(same_wer, whole, "speech_params")
    same_size = part.model_copy(update={"parameters": whole.parameters})
    assert beats(same_size, whole, "speech_params")


def test_trainings_of_one_system_are_pooled_to_their_mean(tmp_path: Path) -> None:
    first = add(tmp_path, Candidate((1,), 4), 2, test=1)
    second = add(tmp_path, Candidate((1,), 4, repeat=1), 5)
    failed = add(tmp_path, Candidate((1,), 4, repeat=2), 9, state="failed")
    other = add(tmp_path, Candidate((1,)), 1)
    pooled, alone = pooled_by_system([second, first, failed, other])
    assert dev_wer(pooled) == pytest.approx(wer((2 + 5) / 2))
    assert pooled.test is None, "one of its trainings was not decoded there"
    assert alone == other


def test_a_run_that_ended_at_a_rung_has_that_rungs_dev_errors(tmp_path: Path) -> None:
    complete = add(tmp_path, Candidate(), 2)
    pruned, failed = (add(tmp_path, Candidate((1,)), 3, state=state) for state in ("pruned", "failed"))
    assert latest_dev_errors(complete) == SplitResult.of(utterances(2)).errors
    assert latest_dev_errors(pruned) == SplitResult.of(utterances(3)).errors
    assert latest_dev_errors(failed) is None


def test_test_is_reported_where_it_was_decoded_and_dev_elsewhere(tmp_path: Path) -> None:
    both, dev_only = add(tmp_path, Candidate(), 2, test=1), add(tmp_path, Candidate((1,)), 2)
    assert both.reported == ("test", both.test)
    assert dev_only.reported == ("dev", dev_only.dev)
    assert add(tmp_path, Candidate((2,)), 2, state="failed").reported is None


def a_front(folder: Path, members: Sequence[tuple[tuple[int, ...], int]]) -> list[RunRecord]:
    return pareto_front([add(folder, Candidate(layers), errors) for layers, errors in members], "speech_params")


def test_the_knee_is_farthest_below_the_line_between_the_ends(tmp_path: Path) -> None:
    rng = random.Random(1)
    for case in range(20):
        errors = sorted(rng.sample(range(1, 40), 6), reverse=True)
        sets = [tuple(range(k)) for k in range(5, -1, -1)]
        front = a_front(tmp_path / str(case), list(zip(sets, errors, strict=True)))
        assert len(front) == 6
        points = np.array([(r.parameters.speech, dev_wer(r)) for r in front])
        points = (points - points.min(0)) / np.ptp(points, axis=0)
        along, ahead = points[-1] - points[0], points - points[0]
        below = (along[1] * ahead[:, 0] - along[0] * ahead[:, 1]) / np.hypot(*along)
        distances = dict(zip((r.candidate for r in front), below, strict=True))
        assert distances[knee(front, "speech_params").candidate] == pytest.approx(max(below))


def test_the_knee_of_a_known_front(tmp_path: Path) -> None:
    front = a_front(tmp_path, [((), 1), ((1,), 1), ((1, 2), 2), ((0, 1, 2), 8)])
    assert [r.removed_layers for r in front] == [(0, 1, 2), (1, 2), (1,)], "() has more parameters and no lower WER"
    assert knee(front, "speech_params").removed_layers == (1, 2), "one more layer lowers WER by 0.1, the one before by 0.6"
    assert knee(front[:2], "speech_params").removed_layers == (1, 2), "of two, the one of lower WER"
    with pytest.raises(ValueError, match="at least one member"):
        knee([], "speech_params")


def test_the_hypervolume_is_the_area_of_all_dominated_places() -> None:
    rng = random.Random(2)
    for size in range(12):
        points = [(rng.randrange(10), rng.randrange(10)) for _ in range(size)]
        squares = [(x, y) for x in range(8) for y in range(7)]  # of side 1, by their lower left corners
        dominated = sum(any(p <= x and q <= y for p, q in points) for x, y in squares)
        assert hypervolume(points, (8, 7)) == dominated


def test_a_candidate_over_the_groups_limit_is_not_on_the_front(tmp_path: Path) -> None:
    results = [heard(f"g{i}", "one two", "one two" if i % 2 else "one too", "ab"[i % 2]) for i in range(10)]
    record = add_results(tmp_path, Candidate(), results)
    assert pareto_front([record], "speech_params", max_worst_group_wer=0.5) == [record]
    assert pareto_front([record], "speech_params", max_worst_group_wer=0.4) == []
