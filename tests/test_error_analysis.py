"""Which errors systems make: kinds, confusions, changed utterances, groups."""

import random
from pathlib import Path

import pytest

from prunesearch.report import compare
from prunesearch.report.decodings import DecodedPair, Decoding
from prunesearch.report.error_analysis import (
    analyse_errors,
    confused_words,
    error_changes,
    length_ratio,
    unpruned_counterpart,
    without_lora,
)
from prunesearch.study.candidate import Candidate
from prunesearch.study.record import SplitResult, WordErrors
from tests.report_records import add, add_study, heard


def test_confusions_are_exactly_the_counted_word_errors() -> None:
    rng = random.Random(4)
    results = [heard(str(i), *(" ".join(rng.choices("abcd", k=rng.randint(0, 6))) for _ in range(2))) for i in range(200)]
    pairs = list(confused_words(results))
    total = sum((r.errors for r in results), WordErrors())
    assert sum(said is None for said, _ in pairs) == total.insertions > 0
    assert sum(word is None for _, word in pairs) == total.deletions > 0
    assert sum(said is not None and word is not None and said != word for said, word in pairs) == total.substitutions
    assert len(pairs) == total.errors


def test_two_systems_are_compared_word_by_word(tmp_path: Path) -> None:
    whole, small = (add(tmp_path, c, 1) for c in (Candidate(), Candidate((1,))))
    ours = (heard("a", "one two", "one too"), heard("b", "three", "three"), heard("c", "four", ""))
    theirs = (heard("a", "one two", "one two"), heard("b", "three", "free"), heard("c", "four", ""))
    found = analyse_errors(small, whole, DecodedPair("test", Decoding((0,), (ours,)), Decoding((0,), (theirs,))))
    assert [(c.said, c.heard, c.ours, c.theirs) for c in found.confusions] == [("two", "too", 1, 0), ("three", "free", 0, 1)]
    assert [(c.id, c.errors, c.ours, c.theirs) for c in found.worse] == [("a", 1, "one too", "one two")]
    assert [(c.id, c.errors) for c in found.better] == [("b", -1)]


def test_error_changes_compare_rates_by_kind_and_language(tmp_path: Path) -> None:
    add_study(tmp_path)
    comparison = compare(tmp_path, "speech_params", "s")
    plain, with_lora = comparison.baselines["top2"], comparison.baselines["top2+lora"]
    found = error_changes(with_lora, plain)
    assert [c.language for c in found] == [None, "da", "nl"]
    assert {c.split for c in found} == {"test"}
    assert found[0].of("errors") == pytest.approx((3 + 1 / 3) / (5 + 1 / 3) - 1)
    assert found[0].of("insertions") is None, "the reference makes none"
    assert [c for c in comparison.lora_changes if c.system == with_lora] == found


def test_counterparts_differ_only_in_layers_or_only_in_lora(tmp_path: Path) -> None:
    add_study(tmp_path)
    comparison = compare(tmp_path, "speech_params", "s")
    plain, with_lora = comparison.baselines["top2"], comparison.baselines["top2+lora"]
    assert without_lora(with_lora, comparison.complete) == plain
    assert without_lora(plain, comparison.complete) is None
    assert unpruned_counterpart(with_lora, comparison.complete) == comparison.baselines["unpruned+lora"]
    assert unpruned_counterpart(plain, comparison.complete) == comparison.baselines["unpruned"]
    assert unpruned_counterpart(comparison.baselines["unpruned"], comparison.complete) is None
    pairs = {(c.system.name, c.reference.name) for c in comparison.pruning_changes}
    assert pairs == {("top2", "unpruned"), ("top2+lora", "unpruned+lora"), (None, "unpruned+lora")}


def test_the_worst_group_and_the_gap_between_groups_are_reported() -> None:
    results = [heard("a", "one two", "one two", "x"), heard("b", "one two", "one", "y"), heard("c", "one", "two", None)]
    split = SplitResult.of(results)
    assert (split.worst_group, split.worst_group_wer, split.group_gap) == ("y", 0.5, 0.5)
    again = SplitResult.pooled([split, SplitResult.of([heard("a", "one two", "a b c", "x")])])
    assert again.by_group["x"].reference_words == 4
    assert again.worst_group == "x"
    assert SplitResult.of([heard("c", "one", "two")]).worst_group_wer is None


def test_the_length_ratio_is_recognised_words_per_reference_word() -> None:
    pairs = (("one two", "one"), ("three", "three four five"), ("six", ""))
    results = [heard(str(i), reference, hypothesis) for i, (reference, hypothesis) in enumerate(pairs)]
    recognised, reference = (sum(len(pair[side].split()) for pair in pairs) for side in (1, 0))
    assert length_ratio(SplitResult.of(results)) == pytest.approx(recognised / reference)
