from pathlib import Path

from prunesearch.study.candidate import Candidate
from prunesearch.study.record import (
    Parameters,
    RunRecord,
    SplitResult,
    UtteranceResult,
    WordErrors,
    read_record,
    read_records,
    read_utterances,
    write_record,
    write_utterances,
)


def utterance(i: int, errors: int, words: int, language: str = "en") -> UtteranceResult:
    counts = WordErrors(substitutions=errors, reference_words=words)
    return UtteranceResult(id=str(i), reference="r " * words, hypothesis="h\u2028i", errors=counts, language=language)


def record(candidate: Candidate) -> RunRecord:
    return RunRecord(
        study="s", encoder_layers=4, removed_layers=candidate.removed_layers, lora_rank=candidate.lora_rank, seed=0,
        state="complete", steps=3,
        dev=SplitResult.of([utterance(0, 1, 4)]), parameters=Parameters(encoder=5, projector=3, lora=1, llm=11),
    )  # fmt: skip


def test_wer_is_of_the_corpus_not_of_its_utterances() -> None:
    result = SplitResult.of([utterance(0, 1, 1), utterance(1, 0, 9, "da")])
    assert result.errors.wer == 0.1
    assert sum(result.by_language.values(), WordErrors()) == result.errors


def test_an_empty_reference_does_not_divide_by_zero() -> None:
    assert WordErrors(insertions=2).wer == 2


def test_parameters_by_objective() -> None:
    counts = Parameters(encoder=5, projector=3, lora=1, llm=11)
    assert [counts.of(o) for o in ("encoder_params", "speech_params", "total_params")] == [5, 9, 20]


def test_records_and_utterances_survive_the_disk(tmp_path: Path) -> None:
    for candidate in (Candidate((1, 2), 4), Candidate()):
        write_record(tmp_path, record(candidate))
        write_utterances(tmp_path, candidate, "dev", [utterance(0, 1, 4), utterance(1, 0, 2, "da")])
    assert read_record(tmp_path, Candidate((2, 1), 4)) == record(Candidate((1, 2), 4))
    assert read_record(tmp_path, Candidate((3,))) is None
    assert [r.candidate for r in read_records(tmp_path)] == [Candidate(), Candidate((1, 2), 4)]
    assert read_utterances(tmp_path, Candidate(), "dev") == [utterance(0, 1, 4), utterance(1, 0, 2, "da")]
    assert read_utterances(tmp_path, Candidate(), "test") is None
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"
