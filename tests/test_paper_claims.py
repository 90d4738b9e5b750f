"""The paper's claims and their verdicts, and its published numbers."""

from pathlib import Path

import pytest

from prunesearch.report import compare
from prunesearch.report.paper_claims import Verdict, verdict_on_direction, verdict_on_size
from prunesearch.report.plots import draw_front
from prunesearch.report.statistics import Difference
from prunesearch.study.candidate import Candidate, baselines
from prunesearch.study.record import SplitResult, UtteranceResult, WordErrors, write_record
from tests.report_records import LAYERS, UTTERANCES, add, add_results, parameters, utterances


def interval(low: float, high: float) -> Difference:
    """In percent."""
    return Difference((low + high) / 200, low / 100, high / 100, 1000)


@pytest.mark.parametrize(
    ("low", "high", "published", "verdict"),
    [
        (-6, -5, (-7, -4), "holds"),  # inside
        (-9, -1, (-7, -4), "holds"),  # overlaps, and below zero
        (-9, 1, (-7, -4), "cannot be said"),  # overlaps, but contains zero
        (-3, -1, (-7, -4), "does not hold"),  # too small a change
        (-9, -8, (-7, -4), "does not hold"),  # too great a change
        (1, 9, (-7, -4), "does not hold"),  # the other direction
        (1, 3, (2, 4), "holds"),
        (-1, 3, (2, 4), "cannot be said"),
        (-5, -5, (-7, -4), "cannot be said"),  # all resamples give the same value: no evidence
    ],
)
def test_the_verdict_on_a_size(low: float, high: float, published: tuple[float, float], verdict: Verdict) -> None:
    assert verdict_on_size(interval(low, high), published) == verdict


@pytest.mark.parametrize(
    ("low", "high", "falls", "verdict"),
    [
        (-9, -1, True, "holds"),
        (-9, -1, False, "does not hold"),
        (1, 9, False, "holds"),
        (1, 9, True, "does not hold"),
        (-1, 1, True, "cannot be said"),
        (-1, -1, True, "cannot be said"),
    ],
)
def test_the_verdict_on_a_direction(low: float, high: float, falls: bool, verdict: Verdict) -> None:
    assert verdict_on_direction(interval(low, high), falls) == verdict


def danish(substitutions: int, deletions: int, insertions: int) -> list[UtteranceResult]:
    """Utterances of ten words with so many errors each; every second has one substitution more, every fifth an insertion."""
    return [
        UtteranceResult(
            id=f"u{i}",
            reference="a",
            hypothesis="b",
            language="da",
            errors=WordErrors(
                substitutions=substitutions + i % 2,
                deletions=deletions,
                insertions=insertions + (i % 5 == 0),
                reference_words=10,
            ),
        )
        for i in range(UTTERANCES)
    ]


def test_each_claim_gets_an_interval_and_a_verdict(tmp_path: Path) -> None:
    kinds = {"unpruned": (4, 1, 0), "unpruned+lora": (3, 1, 1), "top2": (5, 1, 0), "top2+lora": (3, 1, 1)}
    for name, candidate in baselines(LAYERS, 8).items():
        add_results(tmp_path, candidate, danish(*kinds[name]), name=name)
    found = {c.claim: c for c in compare(tmp_path, "speech_params", "s").paper_claims}
    assert {claim: c.verdict for claim, c in found.items()} == {
        # 6.7 errors per utterance instead of 5.7
        "removing two layers raises WER by 2–4 %": "does not hold",
        # the same number of errors in each utterance
        "two layers removed and LoRA added: lower WER than the unpruned encoder without LoRA": "cannot be said",
        "LoRA removes 4–7 % of all errors (unpruned+lora against unpruned)": "cannot be said",
        # 11.04 of 14 million are left
        "two layers removed and LoRA added: 7–14 % fewer speech parameters": "does not hold",
        # one more in each utterance
        "LoRA adds insertions in Danish (unpruned+lora against unpruned)": "holds",
        "LoRA adds insertions in Danish (top2+lora against top2)": "holds",
        # 5.7 errors per utterance instead of 6.7: 15 %
        "LoRA removes 4–7 % of all errors (top2+lora against top2)": "does not hold",
    }
    assert found["removing two layers raises WER by 2–4 %"].measured == pytest.approx(100 * (6.7 / 5.7 - 1))
    saved = found["two layers removed and LoRA added: 7–14 % fewer speech parameters"]
    whole, small = parameters(Candidate()), parameters(Candidate((4, 5), 8))
    assert saved.measured == saved.low == saved.high == pytest.approx(100 * (1 - small.speech / whole.speech))
    assert all(c.low <= c.measured <= c.high for c in found.values())


@pytest.mark.parametrize(
    ("encoder", "language", "expected"),
    [("openai/whisper-large-v2", "en", [0.1518, 0.1668]), ("openai/whisper-large-v2", "da", []), ("encoder", "en", [])],
)
def test_published_numbers_stand_beside_a_study_of_their_encoder_and_language(
    tmp_path: Path, encoder: str, language: str, expected: list[float]
) -> None:
    for candidate in (Candidate(), Candidate((1, 2))):
        record = add(tmp_path, candidate, 1)
        spoken = SplitResult.of([r.model_copy(update={"language": language}) for r in utterances(1)])
        known = {"config": {"encoder": {"model": encoder}}}
        write_record(tmp_path, record.model_copy(update={"dev": spoken, "provenance": known}))
    comparison = compare(tmp_path, "speech_params", "s")
    assert [p.wer for p in comparison.published] == expected
    if expected:
        assert comparison.published[1].params == parameters(Candidate((4, 5))).speech
        labels = [text.get_text() for text in draw_front(comparison).legends[0].get_texts()]
        assert "published" in labels
