"""Tables, datasets and texts that are not quite right: each is read as it was meant, or named in one line."""

import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from prunesearch.asr.recognizer import Segment
from prunesearch.asr.scoring import score_manifest
from prunesearch.model.llm import load_llm
from prunesearch.speech.audio import read_audio
from prunesearch.speech.corpus import load_corpus
from prunesearch.speech.overlap import shared_recordings
from prunesearch.speech.tables import read_common_voice, read_manifest
from prunesearch.speech.text import normalizer_for
from prunesearch.study.config import StudyConfig, TextConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import LlmConfig
from prunesearch.study.sources import CommonVoiceSource
from tests.conftest import write_study
from tests.fuzz.tables import fuzz

HEADER = "client_id\tpath\tsentence\tup_votes\tgender"
GOOD = ["c\t1.mp3\tfirst\t2\tmale", "c\t2.mp3\tsecond\t2\tfemale"]


def study(tmp_path: Path, toy: Path, **data: Any) -> StudyConfig:
    return load_study(write_study(tmp_path / "study", toy, data={"group": "speaker", **data}))


def release(folder: Path, *lines: str, durations: str | None = None) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "dev.tsv").write_bytes("\n".join([HEADER, *lines, ""]).encode())
    if durations is not None:
        (folder / "clip_durations.tsv").write_text(durations)
    return read_common_voice(folder, CommonVoiceSource(common_voice=str(folder), split="dev"), "gender")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("c\t9.mp3\tone\thalf\t2\tmale", [3]),
        ("c\t9.mp3\tone\nhalf\t2\tmale", [3, 4]),
        ("c\t9.mp3\tone\n\nhalf\t2\tmale", [3, 5]),
        ("c\t9.mp3\tone\t2\tma\nle", [3, 4]),  # the first half has all fields
        ("c\t9.mp3\tone", [3]),
        ("c\t9.mp3\tone\thalf\t2", [3]),  # a tab too many and a field too few
        ("c\t\tone\t2\tmale", [3]),
        ("c\t9.mp3\to\ufffdne\t2\tmale", [3]),
    ],
)
def test_common_voice_lines_without_the_headers_shape_are_named_and_nothing_shifts(
    bad: str, named: list[int], tmp_path: Path
) -> None:
    rows = release(tmp_path / "da", GOOD[0], bad, GOOD[1])
    assert [int(r.where.rsplit(":", 1)[1]) for r in rows if r.problem] == named
    assert [(r.text, r.group) for r in rows if not r.problem] == [("first", "male"), ("second", "female")]


def test_quotation_marks_in_a_common_voice_sentence_are_text(tmp_path: Path) -> None:
    rows = release(tmp_path / "da", 'c\ta\t"no\t2\t', 'c\tb\t"no"\t2\t', 'c\tc\t"he said ""no"""\t2\t')
    assert [r.text for r in rows] == ['"no', '"no"', 'he said "no"']


def test_odd_lines_of_clip_durations_leave_the_length_to_the_recording(tmp_path: Path) -> None:
    odd = "clip\tduration[ms]\n1.mp3\t1500\n\n2.mp3\tlong\n3.mp3\n4.mp3\t1\t2\n"
    assert [r.seconds for r in release(tmp_path / "da", *GOOD, durations=odd)] == [1.5, None]
    assert [r.seconds for r in release(tmp_path / "da", *GOOD, durations="clip\tseconds\n1.mp3\t2\n")] == [None, None]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_one_line_for_every_table(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_bytes('{"audio": "a.wav", "text": "blå"}\n'.encode(encoding))
    (tmp_path / "dev.tsv").write_bytes(f"{HEADER}\nc\ta\tblå\t2\tmale\n".encode(encoding))
    for read in (
        lambda: read_manifest(tmp_path / "dev.jsonl"),
        lambda: read_common_voice(tmp_path, CommonVoiceSource(common_voice=str(tmp_path), split="dev")),
    ):
        with pytest.raises(StudyError, match="must be UTF-8, but") as caught:
            read()
        assert len(caught.value.lines) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_other_line_ends_are_read(end: str, tmp_path: Path) -> None:
    lines = ['{"audio": "a.wav", "text": "a\u2028b"}', '{"audio": "b.wav", "text": "c"}']
    (tmp_path / "m.jsonl").write_bytes(end.join(lines).encode("utf-8-sig"))
    assert [(r.text, r.problem) for r in read_manifest(tmp_path / "m.jsonl")] == [("a\u2028b", None), ("c", None)]


WRONG_LINES = {
    '{"audio": "a.wav", "text": null}': "`text` must be a string, got null",
    '{"audio": "a.wav", "text": 5}': "`text` must be a string, got 5",
    '{"audio": 5, "text": "a"}': "`audio` must be a string, got 5",
    '{"audio": "", "text": "a"}': "it names no recording",
    '{"audio": "a.wav"}': "`text` is missing",
    '{"audio": "a.wav", "text": "a", "language": 5}': "`language` must be a string, got 5",
    '{"audio": "a.wav", "text": "a", "text": "b"}': "the key 'text' occurs twice",
    '{"audio": "a.wav", "text": "a", "duration": 0}': "`duration` must be a positive number of seconds, got 0",
    '{"audio": "a.wav", "text": "a", "duration": "2"}': "`duration` must be a positive number",
    '{"audio": "a.wav", "text": "a", "duration": NaN}': "`duration` must be a positive number",
    '{"audio": "a.wav", "text": "a", "id": true}': "`id` must be a string, got true",
    '{"audio": "a.wav", "text": "\\ud800"}': "half of a surrogate pair",
    '["a.wav", "a"]': "must be a JSON object",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_value_is_named_by_studies_and_by_evaluate(
    line: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.jsonl").write_text(f'{{"audio": "{toy}/dev/0.wav", "text": "low", "speaker": "a"}}\n{line}\n')
    with pytest.raises(StudyError) as caught:
        load_corpus(study(tmp_path, toy, dev=str(tmp_path / "m.jsonl")), "dev")
    assert "m.jsonl:2: " in caught.value.lines[0]
    assert WRONG_LINES[line] in caught.value.lines[0]
    monkeypatch.setattr("prunesearch.asr.scoring.read_audio", lambda path: pytest.fail("a recording was read first"))
    with pytest.raises(StudyError) as evaluated:
        score_manifest(SimpleNamespace(settings=SimpleNamespace(text=TextConfig())), tmp_path / "m.jsonl")  # type: ignore[arg-type]
    assert caught.value.lines[0] == evaluated.value.lines[0]


def test_evaluate_refuses_references_without_words_and_never_divides_by_none(toy: Path, tmp_path: Path) -> None:
    def write(*texts: tuple[str, str]) -> Path:
        rows = [{"audio": str(toy / "dev" / "0.wav"), "text": text, "language": language} for text, language in texts]
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / "m.jsonl"

    asr: Any = SimpleNamespace(
        settings=SimpleNamespace(text=TextConfig()),
        segments=lambda samples, *options: [[Segment(0.0, 1.0, "a b")]] * len(samples),
    )
    with pytest.raises(StudyError, match="no text has a word left after normalisation"):
        score_manifest(asr, write(("...", "en"), ("!", "da")))
    found = score_manifest(asr, write(("...", "en"), ("a b", "da")))
    assert found["by_language"] == {"da": 0.0, "en": None}
    assert found["wer"] == 1.0


# Datasets


def recordings(toy: Path) -> list[tuple[Path, str]]:
    lines = [json.loads(line) for line in (toy / "dev.jsonl").read_text().splitlines()]
    return [(toy / line["audio"], line["text"]) for line in lines[:4]]


def save(folder: Path, split: str | None, audio: list[Any], text: list[Any], **more: Any) -> None:
    data = datasets.Dataset.from_dict({"audio": audio, "text": text, "speaker": ["a"] * len(text), **more})
    data._split = None if split is None else datasets.NamedSplit(split)
    data.save_to_disk(folder)


@pytest.mark.parametrize("kind", ["array", "channels", "bytes", "bytes struct", "path", "relative path", "path struct"])
def test_every_way_of_storing_a_recording_gives_the_same_samples(kind: str, toy: Path, tmp_path: Path) -> None:
    def cell(path: Path) -> Any:
        samples = soundfile.read(path, dtype="float32")[0]
        return {
            "array": lambda: {"array": samples.tolist(), "sampling_rate": 16_000},
            "channels": lambda: {"array": [samples.tolist()] * 2, "sampling_rate": 16_000},
            "bytes": path.read_bytes,
            "bytes struct": lambda: {"bytes": path.read_bytes(), "path": None},
            "path": lambda: str(path),
            "relative path": lambda: path.name,
            "path struct": lambda: {"bytes": None, "path": str(path)},
        }[kind]()

    there = recordings(toy)
    save(tmp_path / "saved", "dev", [cell(path) for path, _ in there], [text for _, text in there])
    for path, _ in there:
        (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    found = load_corpus(study(tmp_path, toy, dev={"dataset": str(tmp_path / "saved"), "split": "dev"}), "dev")
    assert [u.reference for u in found] == [text for _, text in there]
    for utterance, (path, _) in zip(found, there, strict=True):
        np.testing.assert_array_equal(read_audio(utterance.audio), read_audio(path))


def test_an_audiofolder_and_a_csv_file_work_without_torchcodec(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, lines = tmp_path / "folder", []
    folder.mkdir()
    for path, text in recordings(toy):
        (folder / path.name).write_bytes(path.read_bytes())
        lines.append(f"{path.name},{text},a\n")
    (folder / "metadata.csv").write_text("file_name,text,speaker\n" + "".join(lines))
    (folder / "list.csv").write_text("audio,text,speaker\n" + "".join(lines))
    for source in ({"split": "train"}, {"split": "dev", "data_files": "list.csv"}):
        found = load_corpus(study(tmp_path, toy, dev={"dataset": str(folder), **source}), "dev")
        assert sorted(u.reference for u in found) == sorted(text for _, text in recordings(toy))
        assert all(len(read_audio(u.audio)) > 0 for u in found)
    (folder / "list.csv").write_text("audio,text,speaker\n" + "".join(line.replace(",a", ",x,a") for line in lines))
    with pytest.raises(StudyError, match="more fields than the header"):
        load_corpus(study(tmp_path, toy, dev={"dataset": str(folder), **source}), "dev")


def test_a_saved_split_serves_under_its_own_name_once(toy: Path, tmp_path: Path) -> None:
    there = recordings(toy)
    for name, split in (("named", "train"), ("unnamed", None)):
        save(tmp_path / name, split, [str(p) for p, _ in there], [t for _, t in there])
    source = {"dataset": str(tmp_path / "named"), "split": "dev"}
    with pytest.raises(StudyError, match=r"holds the split 'train' alone, got 'dev': write split = \"train\""):
        load_corpus(study(tmp_path, toy, dev=source), "dev")
    for name in ("named", "unnamed"):
        both = {split: {"dataset": str(tmp_path / name), "split": split} for split in ("dev", "test")}
        with pytest.raises(StudyError, match=r"data\.dev and data\.test must not share recordings"):
            load_corpus(study(tmp_path, toy, **both), "test")


def test_class_labels_give_their_names_and_numbers_are_refused(toy: Path, tmp_path: Path) -> None:
    there = recordings(toy)
    texts, paths = sorted({t for _, t in there}), [str(p) for p, _ in there]
    labels = datasets.Features(
        {
            "audio": datasets.Value("string"),
            "text": datasets.ClassLabel(names=texts),
            "language": datasets.ClassLabel(names=["da"]),
        }
    )
    rows = {"audio": paths, "text": [texts.index(t) for _, t in there], "language": [0] * 4}
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict(rows, features=labels)}).save_to_disk(tmp_path / "labels")
    source = {"dataset": str(tmp_path / "labels"), "split": "dev", "language_column": "language"}
    found = load_corpus(load_study(write_study(tmp_path / "s", toy, data={"dev": source, "group": "language"})), "dev")
    assert [(u.reference, u.language, u.group) for u in found] == [(t, "da", "da") for _, t in there]
    save(tmp_path / "numbers", "dev", paths, [1, 2, 3, 4])
    with pytest.raises(StudyError, match="the column 'text' must hold text or class labels, got int64"):
        load_corpus(study(tmp_path, toy, dev={"dataset": str(tmp_path / "numbers"), "split": "dev"}), "dev")


def test_recordings_that_two_splits_share_are_said_whatever_their_names(toy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, names in (("train", "ab"), ("dev", "cd"), ("test", "ef")):
        for name in names:
            soundfile.write(tmp_path / f"{name}.wav", rng.uniform(-0.5, 0.5, 8000), 16_000)
        rows = [{"audio": f"{name}.wav", "text": "low", "speaker": "a"} for name in names]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = study(tmp_path, toy, **{split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")})
    assert shared_recordings({split: load_corpus(config, split) for split in config.data.splits}) == []
    (tmp_path / "e.wav").write_bytes((tmp_path / "c.wav").read_bytes())
    (line,) = shared_recordings({split: load_corpus(config, split) for split in config.data.splits})
    assert line.startswith("data.dev and data.test share 1 recordings, the first is c.wav in dev and e.wav in test")


# Texts


@pytest.mark.parametrize("name", ["paper", "whisper"])
@pytest.mark.parametrize("language", ["en", "nl"])
def test_words_that_differ_only_in_how_they_are_typed_are_equal(name: str, language: str) -> None:
    normalize = normalizer_for(name, language)
    for apostrophe in "‘’‛ʼʻ´`′＇":
        assert normalize(f"{apostrophe}s avonds, don{apostrophe}t") == normalize("'s avonds, don't"), apostrophe
    for one, other in (("ĳs", "ijs"), ("ﬁets", "fiets"), ("ＡＢＣ１２", "abc12"), ("zee\u00admeeuw", "zeemeeuw")):
        assert normalize(one) == normalize(other)
    for text in ("blåbær coöperatie", "कि की", "เวลา"):
        assert normalize(unicodedata.normalize("NFD", text)) == normalize(text)


def test_marks_of_scripts_that_need_them_survive_and_others_do_not() -> None:
    paper = normalizer_for("paper")
    words = "कि की कू কি น้ำ เด็ก தமிழ் كِتَاب ẹ́".split()
    assert [paper(word) for word in words] == [unicodedata.normalize("NFC", word) for word in words]
    assert paper("❤️ 1️⃣ İstanbul 5½ ﷺ") == "1 istanbul 5½ ﷺ"


def test_none_composes_accents_and_changes_nothing_else() -> None:
    assert normalizer_for("none")("‘A´  e\u0301") == "‘A´ é"


def test_a_special_token_in_a_transcript_is_text(toy: Path) -> None:
    import torch

    llm = load_llm(toy / "llm", LlmConfig(model=str(toy / "llm")), torch.float32)
    *tokens, end = llm.tokens("low </s> <pad>")
    assert end == llm.eos
    assert not {llm.eos, llm.pad} & set(tokens)
    assert llm.tokenizer.decode(tokens, skip_special_tokens=True) == "low </s> <pad>"


def test_mutated_tables_are_read_right_or_named() -> None:
    result = fuzz(0, None, 1500)
    assert result.wrong == []
    assert min(result.read, result.named) > 300
