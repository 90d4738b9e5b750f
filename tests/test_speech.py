import json
import random
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile

from prunesearch.speech.audio import SAMPLE_RATE, AudioError, padded, read_audio, seconds_of
from prunesearch.speech.corpus import load_corpus
from prunesearch.speech.splitting import split_manifest
from prunesearch.speech.text import normalizer_for
from prunesearch.speech.wer import count_errors, is_loop, longest_repetition
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import WordErrors
from tests.conftest import write_study


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (8_000, 1), (44_100, 2), (48_000, 3)])
def test_every_sampling_rate_and_channel_count_becomes_16_khz_mono(rate: int, channels: int, tmp_path: Path) -> None:
    t = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 300 * t)
    soundfile.write(tmp_path / "a.wav", np.stack([tone] * channels, 1) * 0.5, rate)
    samples = read_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32
    assert abs(len(samples) - SAMPLE_RATE) <= 1
    assert np.abs(np.fft.rfft(samples)).argmax() == 300  # Hz: the signal lasts one second
    assert seconds_of(tmp_path / "a.wav") == pytest.approx(1)


def test_errors_of_unusable_recordings_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    for name in ("text.wav", "empty.wav", "nan.wav", "missing.wav", ""):
        with pytest.raises(AudioError, match=name or str(tmp_path)):
            read_audio(tmp_path / name)


def test_padding_reaches_the_next_multiple() -> None:
    assert len(padded(np.ones(20_000, np.float32), 1.0)) == 32_000
    assert len(padded(np.ones(32_000, np.float32), 1.0)) == 32_000
    assert len(padded(np.ones(20_000, np.float32), None)) == 20_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("Don’t stop — it's O'Neil's.", "don't stop it's o'neil's"),
        ("Rødgrød med FLØDE, æblegrød & Åse", "rødgrød med fløde æblegrød åse"),
        ("’s Avonds: zeeën, coöperatie", "'s avonds zeeën coöperatie"),
        ("  3 snake_case  ", "3 snakecase"),
    ],
)
def test_the_papers_normaliser(text: str, expected: str) -> None:
    normalize = normalizer_for("paper", "da")
    assert normalize(text) == expected
    assert normalize(expected) == expected


def test_the_other_normalisers() -> None:
    assert normalizer_for("none")(" A  b ") == "A b"
    assert normalizer_for("whisper", "en")("It's two colours!") == "it is 2 colours"
    assert normalizer_for("whisper", "da")("Rødgrød, tak!") == "rødgrød tak"


def test_counts_agree_with_a_direct_alignment_and_sum_to_jiwers_corpus_wer() -> None:
    rng = random.Random(0)
    texts = [[rng.choice("abcd") for _ in range(rng.randint(1, 8))] for _ in range(60)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    total = sum((count_errors(" ".join(r), " ".join(h)) for r, h in pairs), WordErrors())
    assert total.wer == pytest.approx(jiwer.wer([" ".join(r) for r, _ in pairs], [" ".join(h) for _, h in pairs]))
    for reference, hypothesis in pairs:
        counts = count_errors(" ".join(reference), " ".join(hypothesis))
        assert counts.errors == edit_distance(reference, hypothesis)
        assert len(hypothesis) == counts.reference_words - counts.deletions + counts.insertions


def edit_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def test_errors_of_empty_texts_are_counted() -> None:
    assert count_errors("a b", "") == WordErrors(deletions=2, reference_words=2)
    assert count_errors("", "a b c") == WordErrors(insertions=3)


def test_loops_are_detected_unless_the_reference_repeats_too() -> None:
    assert longest_repetition(["a", "b", "a", "b", "a", "b", "c"]) == 3
    assert longest_repetition([]) == longest_repetition(["a"]) == 1
    assert is_loop("turn it on", "turn it it it it it")
    assert is_loop("a b", "x y z x y z x y z x y z")
    assert not is_loop("nine nine nine nine", "nine nine nine nine")
    assert not is_loop("a", "a a a")


def test_a_corpus_keeps_its_order_and_its_limits(toy: Path, tmp_path: Path) -> None:
    config = load_study(write_study(tmp_path, toy, data={"max_train_utterances": 7, "max_seconds": 0.7}))
    train = load_corpus(config, "train")
    assert [u.id for u in train] == [u.id for u in load_corpus(config, "train")]
    assert len(train) == 7
    assert all(u.seconds <= 0.7 and u.group in ("a", "b") for u in train)


def test_a_group_column_that_no_line_has_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="has the column 'accent'"):
        load_corpus(load_study(write_study(tmp_path, toy, data={"group": "accent"})), "dev")


def test_broken_lines_are_reported_together_or_skipped_if_the_study_says_so(toy: Path, tmp_path: Path) -> None:
    good = (toy / "dev.jsonl").read_text().replace('"dev/', f'"{toy}/dev/')
    bad = ["{", json.dumps({"audio": "x.wav"}), json.dumps({"audio": "missing.wav", "text": "low"})]
    (tmp_path / "dev.jsonl").write_text("\n".join([*bad, good]))
    with pytest.raises(StudyError) as caught:
        load_corpus(load_study(write_study(tmp_path, toy, data={"dev": "dev.jsonl"})), "dev")
    assert [f"dev.jsonl:{n}:" in line for n, line in enumerate(caught.value.lines[:3], 1)] == [True] * 3
    skipping = load_study(write_study(tmp_path, toy, data={"dev": "dev.jsonl", "skip_unreadable": True}))
    assert len(load_corpus(skipping, "dev")) == 8


# One manifest that becomes three


def manifest_of(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "all.jsonl"


@pytest.mark.parametrize(("column", "unit"), [("speaker", "speaker"), ("client_id", "client_id"), (None, "text")])
def test_a_manifest_is_split_without_a_speaker_or_text_in_two_splits(tmp_path: Path, column: str | None, unit: str) -> None:
    rows: list[dict[str, object]] = [
        {"audio": f"clips/{i}.wav", "text": f"sentence {i % 40}", "more": i, **({column: f"s{i % 9}"} if column else {})}
        for i in range(120)
    ]
    done = split_manifest(manifest_of(tmp_path / "in", rows), tmp_path / "out" / "data")
    again = split_manifest(tmp_path / "in" / "all.jsonl", tmp_path / "again")
    assert done == again
    assert done.unit == unit
    found = {
        split: [json.loads(line) for line in (tmp_path / "out" / "data" / f"{split}.jsonl").open()] for split in done.utterances
    }
    assert sum(map(len, found.values())) == 120
    assert {row["more"] for split in found.values() for row in split} == set(range(120)), "each once, with all of its columns"
    assert all(len(chosen) >= 0.15 * 120 for chosen in found.values())
    assert len(found["train"]) > len(found["dev"])
    names = [{row[unit] for row in chosen} for chosen in found.values()]
    assert not names[0] & names[1]
    assert not names[1] & names[2]
    assert not names[0] & names[2]
    one = found["dev"][0]
    assert (tmp_path / "out" / "data" / one["audio"]).resolve() == (tmp_path / "in" / "clips" / f"{one['more']}.wav").resolve()


def test_a_column_of_speakers_with_gaps_is_not_used(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"audio": f"{i}.wav", "text": f"t{i}", "speaker": f"s{i}" if i else None} for i in range(9)
    ]
    assert split_manifest(manifest_of(tmp_path, rows), tmp_path / "out").unit == "text"


def test_a_manifest_that_cannot_be_split_is_named_and_writes_nothing(tmp_path: Path) -> None:
    two: list[dict[str, object]] = [{"audio": f"{i}.wav", "text": f"t{i % 2}"} for i in range(9)]
    with pytest.raises(StudyError, match=r"must have at least three different texts to be split, got 2"):
        split_manifest(manifest_of(tmp_path, two), tmp_path / "out")
    with pytest.raises(StudyError, match=r"all\.jsonl:2: "):
        split_manifest(manifest_of(tmp_path, [*two[:1], {"text": "no recording"}]), tmp_path / "out")
    with pytest.raises(StudyError, match=r"--data: there is no file"):
        split_manifest(tmp_path / "nowhere.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dev.jsonl").write_text("mine")
    three: list[dict[str, object]] = [{"audio": f"{i}.wav", "text": f"t{i}"} for i in range(9)]
    with pytest.raises(StudyError, match=r"dev\.jsonl exists already, and is not overwritten"):
        split_manifest(manifest_of(tmp_path, three), tmp_path / "out")
    assert (tmp_path / "out" / "dev.jsonl").read_text() == "mine"
