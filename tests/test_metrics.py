"""What errors are counted in: words, or characters where there are no spaces; CER beside it; texts in another language."""

from pathlib import Path

import jiwer
import pytest

from prunesearch.report import compare, verdict, write_comparison
from prunesearch.report.error_analysis import confused_words
from prunesearch.report.error_tables import failures_table
from prunesearch.report.tables import tables
from prunesearch.speech.corpus import Utterance
from prunesearch.speech.language import is_switched
from prunesearch.speech.wer import score
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import TextConfig
from prunesearch.study.record import SplitResult, UtteranceResult
from tests.report_records import add_results


def heard(reference: str, hypothesis: str, language: str | None, metric: str = "auto", id: str = "a") -> UtteranceResult:
    utterance = Utterance(id, Path("a.wav"), reference, reference, 1.0, language)
    return score(utterance, hypothesis, TextConfig.model_validate({"metric": metric}))


@pytest.mark.parametrize(
    ("language", "metric", "unit", "errors", "of"),
    [
        ("zh", "auto", "characters", 1, 4),
        ("zh-TW", "auto", "characters", 1, 4),
        ("Chinese (Taiwan)", "auto", "characters", 1, 4),
        ("zho", "auto", "characters", 1, 4),
        ("ja", "auto", "characters", 1, 4),
        ("zh", "cer", "characters", 1, 4),
        ("zh", "wer", "words", 2, 1),
        ("ko", "auto", "words", 2, 1),
        (None, "auto", "words", 2, 1),
    ],
)
def test_the_unit_follows_the_language_and_the_study(
    language: str | None, metric: str, unit: str, errors: int, of: int
) -> None:
    result = heard("你好世界", "你好 世间", language, metric)
    assert (result.unit, result.errors.errors, result.errors.reference_words) == (unit, errors, of)
    assert result.characters is not None
    assert (result.characters.errors, result.characters.reference_characters) == (1, 4), "in characters in any case"


def test_cer_is_jiwers_without_spaces() -> None:
    pairs = [("the pound key", "the town key"), ("one two", ""), ("a bc", "abc d")]
    found = SplitResult.of([heard(*pair, "en") for pair in pairs]).characters
    joined = [["".join(text.split()) for text in texts] for texts in zip(*pairs, strict=True)]
    assert found is not None
    assert found.cer == pytest.approx(jiwer.cer(*joined))


def test_a_split_says_what_its_rate_is() -> None:
    chinese, english = heard("你好", "你", "zh"), heard("one two", "one", "en")
    assert [SplitResult.of(r).metric for r in ([english], [chinese], [chinese, english])] == ["wer", "cer", "mer"]
    mixed = SplitResult.of([chinese, english])
    assert mixed.errors.wer == 2 / 4
    assert mixed.by_language["zh"].wer == 1 / 2
    assert SplitResult.pooled([mixed, mixed]).metric == "mer"
    assert SplitResult.pooled([mixed, mixed]).characters == mixed.characters + mixed.characters  # type: ignore[operator]


def test_results_of_versions_without_characters_stay_readable() -> None:
    old = heard("one", "two", "en").model_dump(mode="json")
    for key in ("unit", "characters", "switched"):
        del old[key]
    read = UtteranceResult.model_validate_json(UtteranceResult.model_validate(old).model_dump_json())
    assert SplitResult.of([read, heard("one", "two", "en")]).characters is None
    assert SplitResult.of([read]).switched_rate is None


def test_loops_and_confusions_of_a_language_without_spaces_are_in_characters() -> None:
    assert heard("你好世界", 9 * "你", "zh").looped
    assert heard("你好世界", 9 * "字幕由志愿者提供", "zh").looped
    assert not heard("你好世界", "哈哈哈哈", "zh").looped
    assert not heard(9 * "你", 9 * "你", "zh").looped
    assert list(confused_words([heard("你好世界", "你好世间", "zh")])) == [("界", "间")]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "language", "switched"),
    [
        ("please enter your agent number followed by the pound key", "por favor introduzca su número de agente", "en", True),
        ("por favor introduzca su número de agente", "please enter your agent number", "es-MX", True),
        ("por favor introduzca su número", "por favor introduzca un número", "Spanish", False),
        ("tak for i aften", "thank you for tonight and see you again tomorrow", "da", True),
        ("two", "too", "en", False),  # nothing is sure about a single word
        ("one two three", "", "en", False),
        ("forty two people", "42", "en", False),
        ("forty two people", "…", "en", False),
        ("hello there my friend", "hola mi amigo cómo estás", None, None),
        ("hello there my friend", "hola mi amigo cómo estás", "klingon", None),
    ],
)
def test_a_text_in_another_language_is_noticed(reference: str, hypothesis: str, language: str, switched: bool | None) -> None:
    assert is_switched(reference, hypothesis, language) is switched


def test_a_reference_that_looks_like_the_other_language_clears_its_hypothesis() -> None:
    spanish = "por favor introduzca su número de agente"
    assert is_switched(spanish, spanish, "en") is False


def test_the_rate_of_switched_texts_leaves_unknown_languages_out() -> None:
    results = [heard("one", "por favor introduzca su número de agente", "en"), heard("one", "one", "en"), heard("a", "b", None)]
    assert SplitResult.of(results).switched_rate == 1 / 2


@pytest.fixture
def chinese(tmp_path: Path) -> Path:
    records = tmp_path / "records"
    for candidate, said in ((Candidate(), "你好世界"), (Candidate((4, 5)), "你好世间")):
        results = [heard("你好世界", said, "zh", id=f"u{i}") for i in range(4)]
        add_results(records, candidate, results, results, "unpruned" if not candidate.removed_layers else "top2")
    return records


def test_a_report_calls_its_rate_by_its_name(chinese: Path, tmp_path: Path) -> None:
    comparison = compare(chinese, "speech_params", "s")
    assert comparison.rate == "CER"
    write_comparison(comparison, tmp_path / "report")
    for name in ("report.md", "report.tex", "front.svg"):
        text = (tmp_path / "report" / name).read_text()
        assert "CER" in text
        assert "WER" not in text, name
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Dev CER" in page
    assert "WER dev" not in page
    assert any("CER" in column for table in tables(comparison) for column in table.columns)
    assert not any("WER" in sentence for sentence in verdict(comparison))


def test_cer_and_other_languages_are_beside_wer_in_every_report(tmp_path: Path) -> None:
    results = [heard("one two three", "one two tree", "en", id=f"u{i}") for i in range(4)]
    add_results(tmp_path / "records", Candidate(), results, None, "unpruned")
    (row,) = failures_table(compare(tmp_path / "records", "speech_params", "s")).rows
    assert row == ("unpruned", "dev", "0.0", "0.0", "–", "0.0", "1.000", "9.09")
