"""What a comparison makes of a study's records."""

from pathlib import Path

import pytest

from prunesearch.report import compare, verdict
from prunesearch.study.candidate import BASELINE_NAMES, Candidate
from prunesearch.study.errors import StudyError
from prunesearch.study.record import SplitResult, read_records, write_record, write_utterances
from tests.report_records import FOUND, add, add_baselines, add_study, heard, utterances, wer


@pytest.fixture
def records(tmp_path: Path) -> Path:
    add_study(tmp_path / "records")
    return tmp_path / "records"


def test_records_are_sorted_into_front_others_pruned_and_failed(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    assert tuple(found.baselines) == BASELINE_NAMES
    assert [r.candidate.key for r in found.front] == ["minus-4-5", "minus-1-2+lora4", "full+lora8"]
    assert len(found.complete) == 6
    assert [r.candidate.key for r in found.pruned] == ["minus-0-1+lora4"]
    assert [r.candidate.key for r in found.failed] == ["minus-0-2+lora4"]
    assert {r.candidate for r in found.front_and_baselines} == {r.candidate for r in found.complete} - {Candidate((0,), 4)}
    best = found.best_by_removed[2]
    assert (best.record.candidate, best.tried) == (FOUND, 4)  # three complete, one ended at a rung


def test_the_winner_has_the_lowest_dev_wer_of_those_that_beat_top2_lora(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    (contrast,) = found.dominating
    assert found.winner == contrast
    assert found.chosen == contrast.system
    assert (contrast.system.candidate, contrast.split) == (FOUND, "test")
    assert contrast.difference is not None
    assert contrast.difference.estimate == pytest.approx(wer(1) - wer(3))
    add(records, Candidate((2, 3), 4), 1, test=9)
    winner = compare(records, "speech_params", "s").winner
    assert winner is not None
    assert winner.system.candidate == Candidate((2, 3), 4), "test has no say"


def test_without_a_winner_the_knee_is_chosen(tmp_path: Path) -> None:
    add_baselines(tmp_path)
    found = compare(tmp_path, "speech_params", "s")
    assert found.winner is None
    assert found.chosen == found.knee is not None


def test_baselines_are_compared_as_in_the_paper(records: Path) -> None:
    found = compare(records, "speech_params", "s").differences
    assert [(c.system.name, c.reference.name, c.difference and c.difference.verdict) for c in found] == [
        ("top2", "unpruned", "higher"),
        ("top2+lora", "unpruned", "higher"),
        ("top2+lora", "unpruned+lora", "higher"),
    ]


def test_reductions_have_three_denominators(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    saved = found.reductions(found.baselines["top2+lora"])
    assert saved is not None
    assert (saved.encoder, saved.speech, saved.total) == pytest.approx((3 / 12, 2.92 / 14, 2.92 / 64))
    added = found.reductions(found.baselines["unpruned+lora"])
    assert added is not None
    assert added.speech < 0 == added.encoder


def test_trainings_of_one_system_are_averaged(records: Path) -> None:
    before = compare(records, "speech_params", "s")
    add(records, Candidate((1, 2), 4, repeat=1), 3, test=2)  # 2 on dev and 1 on test the first time
    add(records, Candidate((0,), 4, repeat=1), 9, state="failed")
    after = compare(records, "speech_params", "s")
    assert len(after.complete) == len(before.complete)
    assert after.trainings[FOUND] == 2
    system = next(r for r in after.complete if r.candidate == FOUND)
    assert system.dev is not None
    assert system.test is not None
    assert system.dev.errors.wer == pytest.approx(wer(2.5))
    assert system.test.errors.wer == pytest.approx(wer(1.5))
    (contrast,) = after.dominating
    assert contrast.difference is not None
    assert contrast.difference.estimate == pytest.approx(wer(1.5) - wer(3))


def test_a_repeat_that_was_not_decoded_on_test_moves_the_difference_to_dev(records: Path) -> None:
    add(records, Candidate((1, 2), 4, repeat=1), 3)
    (contrast,) = compare(records, "speech_params", "s").dominating
    assert contrast.system.test is None
    assert contrast.split == "dev"


def test_records_of_different_utterances_are_refused(records: Path) -> None:
    results = utterances(1)[1:]
    write_utterances(records, FOUND, "test", results)
    record = next(r for r in read_records(records) if r.candidate == FOUND)
    write_record(records, record.model_copy(update={"test": SplitResult.of(results)}))
    with pytest.raises(StudyError, match="not decoded on the same test utterances"):
        compare(records, "speech_params", "s")


def test_utterances_are_paired_by_id_not_by_line(records: Path) -> None:
    before = compare(records, "speech_params", "s")
    write_utterances(records, FOUND, "test", reversed(utterances(1)))
    assert compare(records, "speech_params", "s") == before


def test_without_stored_utterances_there_is_no_interval(records: Path) -> None:
    for split in ("dev", "test"):
        (records / FOUND.key / f"{split}.jsonl").unlink()
    found = compare(records, "speech_params", "s")
    assert found.winner is not None
    assert (found.winner.split, found.winner.difference) == (None, None)
    assert "has no interval" in " ".join(verdict(found))


def test_hypervolumes_are_bounded_by_the_worst_baseline(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    assert found.reference is not None
    assert found.reference == pytest.approx((1.01 * 14_080_000, 1.01 * wer(5)))
    assert found.hypervolumes["front"] > found.hypervolumes["baselines"] > 0


def test_a_candidate_whose_worst_group_is_above_the_limit_is_not_chosen(records: Path) -> None:
    winner = compare(records, "speech_params", "s").winner
    assert winner is not None
    results = [heard(f"g{i}", "one two", "one two" if i % 2 else "one too", "ab"[i % 2]) for i in range(10)]
    dev = SplitResult.of(results).model_copy(update={"errors": winner.system.dev.errors})
    write_record(records, winner.system.model_copy(update={"dev": dev}))
    for limit, chosen in ((0.5, True), (0.4, False)):
        found = compare(records, "speech_params", "s", max_worst_group_wer=limit)
        assert (found.winner is not None) == chosen
        assert (winner.system.candidate in {r.candidate for r in found.front}) == chosen
        assert len(found.complete) == 6
        assert (
            f"{1 - chosen:d} are excluded because their worst group's dev WER is above {100 * limit:g} %" in verdict(found)[0]
        )


# --- the verdict ---


def test_without_test_results_the_difference_is_on_dev_and_the_verdict_says_so(tmp_path: Path) -> None:
    add_study(tmp_path, found_on_test=None)
    found = compare(tmp_path, "speech_params", "s")
    assert found.dominating[0].split == "dev"
    assert "also chosen on dev" in " ".join(verdict(found))


def test_a_winner_whose_test_interval_contains_zero_is_not_called_better(tmp_path: Path) -> None:
    add_study(tmp_path, found_on_test=3)
    said = " ".join(verdict(compare(tmp_path, "speech_params", "s")))
    assert "On test, no difference can be seen between minus-1-2+lora4 and top2+lora" in said


def test_a_verdict_counts_candidates_and_names_the_winner_and_the_control(records: Path) -> None:
    counts, winner, *differences = verdict(compare(records, "speech_params", "s"))
    assert counts == "Candidates: 6 complete, 1 ended at a rung, 1 failed; 3 on the front."
    assert winner.startswith("One candidate beats top2+lora: it has no more speech parameters and a lower dev WER.")
    assert "minus-1-2+lora4, with 0.04 M fewer speech parameters" in winner
    assert f"a dev WER of {100 * wer(2):.2f} % instead of {100 * wer(3):.2f} %" in winner
    assert differences[0].startswith("On test, minus-1-2+lora4 has a lower WER than top2+lora: −20.00 points")
    assert [d.endswith("This is the fair control: LoRA on both sides.") for d in differences] == [False, False, False, True]


def test_a_verdict_says_that_no_candidate_beats_top2_lora(tmp_path: Path) -> None:
    add_baselines(tmp_path, on_test=False)
    add(tmp_path, FOUND, 4)
    said = " ".join(verdict(compare(tmp_path, "speech_params", "s")))
    assert f"no candidate has at most 11.08 M speech parameters and a dev WER below {100 * wer(3):.2f} %" in said


def test_without_top2_lora_the_verdict_says_that_it_is_missing(tmp_path: Path) -> None:
    empty = compare(tmp_path / "nowhere", "speech_params", "s")
    assert (empty.front, empty.baselines, empty.winner, empty.chosen) == ((), {}, None, None)
    assert "it is not evaluated" in " ".join(verdict(empty))
    add(tmp_path, Candidate((1,), 4), 2)
    found = compare(tmp_path, "total_params", "s")
    assert found.reductions(found.front[0]) is None
