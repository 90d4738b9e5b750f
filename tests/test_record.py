import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunesearch.study.candidate import Candidate
from prunesearch.study.errors import StudyError
from prunesearch.study.record import (
    Parameters,
    RunRecord,
    SplitResult,
    UtteranceResult,
    WordErrors,
    read_record,
    read_records,
    read_utterances,
    write_atomically,
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


def test_a_wer_over_no_words_is_not_a_number() -> None:
    assert math.isnan(WordErrors(insertions=2).wer)
    assert (WordErrors(insertions=2) + WordErrors(reference_words=4)).wer == 0.5


def test_each_objective_counts_its_parameters() -> None:
    counts = Parameters(encoder=5, projector=3, lora=1, llm=11)
    assert [counts.of(o) for o in ("encoder_params", "speech_params", "total_params")] == [5, 9, 20]


def test_records_and_utterances_round_trip_through_files(tmp_path: Path) -> None:
    for candidate in (Candidate((1, 2), 4), Candidate()):
        write_record(tmp_path, record(candidate))
        write_utterances(tmp_path, candidate, "dev", [utterance(0, 1, 4), utterance(1, 0, 2, "da")])
    assert read_record(tmp_path, Candidate((2, 1), 4)) == record(Candidate((1, 2), 4))
    assert read_record(tmp_path, Candidate((3,))) is None
    assert [r.candidate for r in read_records(tmp_path)] == [Candidate(), Candidate((1, 2), 4)]
    assert read_utterances(tmp_path, Candidate(), "dev") == [utterance(0, 1, 4), utterance(1, 0, 2, "da")]
    assert read_utterances(tmp_path, Candidate(), "test") is None
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_a_file_gets_the_permissions_that_open_would_give_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_record(tmp_path, record(Candidate()))
        write_atomically(tmp_path / "again", "old")
        write_atomically(tmp_path / "again", "new")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    plain, *ours = (path.stat().st_mode for path in (tmp_path / "plain", tmp_path / "again", tmp_path / "full" / "record.json"))
    assert ours == [plain] * 2
    assert (tmp_path / "again").read_text() == "new"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", "old")

    def no_space(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def changed(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | fields).encode()


@pytest.mark.parametrize(
    ("spoil", "rule", "fix"),
    [
        (lambda content: b"", "is empty", "restore the file"),
        (lambda content: b"  \n", "is empty", "restore the file"),
        (lambda content: content[: len(content) // 2], "cut off", "delete it"),
        (lambda content: content[:-3], "cut off", "delete it"),
        (lambda content: b"\xff" + content, "cut off, or is not JSON", "delete it"),
        (lambda content: b"[]", "not a valid record", "restore the file"),
        (changed(schema_version=99), "schema_version must be 1, got 99", "update prunesearch"),
        (changed(schema_version=99, steps=None, more=1), "schema_version must be 1, got 99", "update prunesearch"),
        (changed(schema_version=0), "schema_version must be 1, got 0", "restore the file"),
        (changed(schema_version="x"), "schema_version must be 1, got 'x'", "restore the file"),
        (changed(steps="many"), "steps: ", "restore the file"),
        (changed(removed_layers=[-1]), "must not be negative", "restore the file"),
        (changed(lora_rank=8), "named after the record's candidate, minus-3+lora8, got minus-3", "rename the folder"),
    ],
)
def test_a_record_that_cannot_be_read_whole_is_named_in_one_line(
    tmp_path: Path, spoil: Callable[[bytes], bytes], rule: str, fix: str
) -> None:
    write_record(tmp_path, record(Candidate((3,))))
    write_record(tmp_path, record(Candidate()))
    file = tmp_path / "minus-3" / "record.json"
    file.write_bytes(spoil(file.read_bytes()))
    for read in (lambda: read_records(tmp_path), lambda: read_record(tmp_path, Candidate((3,)))):
        with pytest.raises(StudyError) as caught:
            read()
        (line,) = caught.value.lines
        assert line.startswith(f"{file}: ")
        assert rule in line
        assert fix in line
        assert "\n" not in line
    assert read_record(tmp_path, Candidate()) == record(Candidate())


def test_all_broken_records_are_named_at_once(tmp_path: Path) -> None:
    candidates = [Candidate(), Candidate((1,)), Candidate((2,))]
    for candidate in candidates:
        write_record(tmp_path, record(candidate))
    for candidate in candidates[1:]:
        (tmp_path / candidate.key / "record.json").write_text("")
    with pytest.raises(StudyError) as caught:
        read_records(tmp_path)
    assert len(caught.value.lines) == 2


def test_utterances_cut_anywhere_within_a_line_are_refused(tmp_path: Path) -> None:
    utterances = [utterance(0, 1, 4), utterance(1, 0, 2, "da")]
    write_utterances(tmp_path, Candidate(), "dev", utterances)
    file = tmp_path / "full" / "dev.jsonl"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        if whole[:length].endswith(b"\n"):
            continue
        with pytest.raises(StudyError) as caught:
            read_utterances(tmp_path, Candidate(), "dev")
        (line,) = caught.value.lines
        assert str(file) in line
        assert "restore the file from a copy, or delete it" in line
    file.write_bytes(whole.replace(b'"id": "1"', b'"id": 1'))
    with pytest.raises(StudyError, match="line 2 is not a decoded utterance"):
        read_utterances(tmp_path, Candidate(), "dev")
    write_utterances(tmp_path, Candidate(), "dev", [])
    assert read_utterances(tmp_path, Candidate(), "dev") == []
