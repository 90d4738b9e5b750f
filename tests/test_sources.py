"""Every kind of source gives the same utterances, and every kind of broken recording is reported."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from prunesearch.speech.audio import read_audio, version_of
from prunesearch.speech.corpus import Utterance, checked_corpus, load_corpus
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.training.context import TrainingContext
from prunesearch.training.recipe import train_and_score
from tests.conftest import write_study


def silent(what: str, done: int, of: int) -> None:
    pass


def study(tmp_path: Path, toy: Path, **data: Any) -> StudyConfig:
    return load_study(write_study(tmp_path / "study", toy, data=data))


def rows(toy: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (toy / f"{split}.jsonl").read_text().splitlines()]


def save_dataset(toy: Path, split: str, folder: Path) -> None:
    """A dataset folder with encoded recordings in its rows, as data sets on the hub have them."""
    there = rows(toy, split)
    table = pa.table(
        {
            "audio": pa.array([{"bytes": (toy / r["audio"]).read_bytes(), "path": None} for r in there]),
            "sentence": [r["text"] for r in there],
            "speaker": [r["speaker"] for r in there],
            "path": [r["audio"] for r in there],
        }
    )
    features = datasets.Features(
        {name: datasets.Audio() if name == "audio" else datasets.Value("string") for name in table.column_names}
    )
    whole = datasets.Dataset(table).cast(features)
    datasets.DatasetDict({split: whole}).save_to_disk(folder)


def save_common_voice(toy: Path, split: str, folder: Path) -> None:
    (folder / "clips").mkdir(parents=True)
    lines = ["client_id\tpath\tsentence\tspeaker\tlocale"]
    for i, row in enumerate(rows(toy, split)):
        samples, rate = soundfile.read(toy / row["audio"])
        soundfile.write(folder / "clips" / f"clip_{i}.mp3", samples, rate, format="MP3")
        lines.append(f"someone\tclip_{i}.mp3\t{row['text']}\t{row['speaker']}\ten")
    (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def contents(utterances: list[Utterance]) -> list[tuple[str, str | None, str | None, float]]:
    return [(u.reference, u.language, u.group, round(u.seconds, 3)) for u in utterances]


def test_a_dataset_folder_gives_the_same_utterances_as_a_manifest(toy: Path, tmp_path: Path) -> None:
    save_dataset(toy, "dev", tmp_path / "dataset")
    source = {"dataset": str(tmp_path / "dataset"), "split": "dev", "text": "sentence", "language": "en"}
    ours = load_corpus(study(tmp_path, toy, dev=source), "dev")
    theirs = load_corpus(study(tmp_path, toy), "dev")
    assert contents(ours) == contents(theirs)
    assert [u.id for u in ours] == [u.id for u in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(read_audio(a.audio), read_audio(b.audio))


def test_a_dataset_and_a_manifest_of_rough_durations_give_the_same_record(toy: Path, tmp_path: Path) -> None:
    rng, lines = random.Random(0), []
    for row in rows(toy, "train"):
        told = soundfile.info(toy / row["audio"]).duration + rng.uniform(-0.1, 0.1)
        lines.append(json.dumps({**row, "audio": str(toy / row["audio"]), "id": row["audio"], "duration": round(told, 2)}))
    (tmp_path / "rough.jsonl").write_text("\n".join(lines))
    save_dataset(toy, "train", tmp_path / "dataset")
    source = {"dataset": str(tmp_path / "dataset"), "split": "train", "text": "sentence", "language": "en"}
    outcomes = []
    for name, train in (("manifest", str(tmp_path / "rough.jsonl")), ("dataset", source)):
        file = write_study(tmp_path / name, toy, data={"train": train, "min_seconds": 0.0})
        outcomes.append(train_and_score(TrainingContext.open(load_study(file)), Candidate((1,), 2)).outcome())
    for outcome in outcomes:
        outcome.pop("study")
    assert outcomes[0] == outcomes[1]


def test_a_changed_dataset_changes_the_version_of_its_recordings(toy: Path, tmp_path: Path) -> None:
    def versions(split: str) -> set[int | str | None]:
        save_dataset(toy, split, tmp_path / split)
        source = {"dataset": str(tmp_path / split), "split": split, "text": "sentence"}
        loaded = [load_corpus(study(tmp_path, toy, dev=source), "dev") for _ in range(2)]
        return {version_of(u.audio) for corpus in loaded for u in corpus}

    assert len(versions("dev")) == len(versions("test")) == 1
    assert versions("dev") != versions("test")


def test_a_common_voice_release_gives_the_same_utterances_as_a_manifest(toy: Path, tmp_path: Path) -> None:
    save_common_voice(toy, "dev", tmp_path / "en")
    source = {"common_voice": str(tmp_path / "en"), "split": "dev"}
    ours = load_corpus(study(tmp_path, toy, dev=source), "dev")
    theirs = load_corpus(study(tmp_path, toy), "dev")
    assert [c[:3] for c in contents(ours)] == [c[:3] for c in contents(theirs)]
    assert [u.seconds for u in ours] == pytest.approx([u.seconds for u in theirs], abs=0.2)  # mp3 adds a frame or two


def test_several_sources_form_one_split_with_a_normaliser_per_language(toy: Path, tmp_path: Path) -> None:
    samples, rate = soundfile.read(toy / rows(toy, "dev")[0]["audio"])
    soundfile.write(tmp_path / "a.wav", samples, rate)
    for language, text in (("da", "Blåbær, 12 Øl!"), ("en", "Colour: don't")):
        row = {"audio": "a.wav", "text": text, "language": language, "speaker": "a", "id": language}
        (tmp_path / f"{language}.jsonl").write_text(json.dumps(row))
    both = [str(tmp_path / "da.jsonl"), str(tmp_path / "en.jsonl")]
    config = load_study(
        write_study(tmp_path / "s", toy, data={"dev": both}, text={"normalizer": {"da": "paper", "en": "whisper"}})
    )
    danish, english = load_corpus(config, "dev")
    assert danish.reference == danish.target == "blåbær 12 øl"
    assert english.reference == "colour do not"
    assert english.target == "Colour: don't"


def test_a_missing_split_or_column_is_named(toy: Path, tmp_path: Path) -> None:
    save_dataset(toy, "dev", tmp_path / "dataset")
    source = {"dataset": str(tmp_path / "dataset"), "split": "dev"}
    with pytest.raises(StudyError, match=r"no column 'text'; it has audio, sentence"):
        load_corpus(study(tmp_path, toy, dev=source), "dev")
    with pytest.raises(StudyError, match="no split 'validation'"):
        load_corpus(study(tmp_path, toy, dev=source | {"split": "validation", "text": "sentence"}), "dev")
    with pytest.raises(StudyError, match=r"cannot be opened: .*\ngive a local folder"):
        load_corpus(study(tmp_path, toy, dev={"dataset": "nobody/nothing", "split": "dev"}), "dev")


def test_smaller_draws_are_subsets_and_hours_are_a_limit(toy: Path, tmp_path: Path) -> None:
    few = {u.id for u in load_corpus(study(tmp_path, toy, max_train_utterances=5), "train")}
    more = {u.id for u in load_corpus(study(tmp_path, toy, max_train_utterances=9), "train")}
    assert few < more
    short = load_corpus(study(tmp_path, toy, max_train_hours=3 / 3600), "train")
    assert 1 < sum(u.seconds for u in short) <= 3
    assert {u.id for u in short} <= more | {u.id for u in load_corpus(study(tmp_path, toy), "train")}


def write_broken(folder: Path, good: Path) -> dict[str, str | None]:
    """Write recordings. Returns, by name, a part of the expected error (None: the recording can be used)."""
    samples, _ = soundfile.read(good)
    whole = good.read_bytes()
    soundfile.write(folder / "stereo.wav", np.stack([samples, samples], 1), 16_000)
    soundfile.write(folder / "8-bit.wav", samples, 16_000, subtype="PCM_U8")
    soundfile.write(folder / "48k.wav", np.repeat(samples, 3), 48_000)
    soundfile.write(folder / "float.wav", samples, 16_000, subtype="FLOAT")
    soundfile.write(folder / "mislabelled.mp3", samples, 16_000, format="WAV")
    soundfile.write(folder / "flac-as.wav", samples, 16_000, format="FLAC")
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "nan.wav", np.where(np.arange(len(samples)) == 5, np.nan, samples), 16_000, subtype="FLOAT")
    soundfile.write(folder / "full.flac", samples, 16_000)
    flac = (folder / "full.flac").read_bytes()
    (folder / "truncated.flac").write_bytes(flac[: len(flac) // 2])
    (folder / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "no-samples.wav", np.zeros(0), 16_000)
    (folder / "text.wav").write_text("this is no recording")
    (folder / "folder.wav").mkdir()
    return {
        "stereo.wav": None, "8-bit.wav": None, "48k.wav": None, "float.wav": None, "mislabelled.mp3": None,
        "flac-as.wav": None, "full.flac": None, "silent.wav": "nothing but silence", "nan.wav": "not finite",
        "truncated.flac": "", "truncated.wav": "is cut off", "empty.wav": "cannot be decoded",
        "no-samples.wav": "holds no samples", "text.wav": "cannot be decoded", "folder.wav": "is a folder",
        "missing.wav": "there is no such file",
    }  # fmt: skip


def test_every_kind_of_broken_recording_is_handled_or_named(toy: Path, tmp_path: Path) -> None:
    good = toy / rows(toy, "dev")[0]["audio"]
    expected = write_broken(tmp_path, good)
    lines = [json.dumps({"audio": name, "text": "low", "speaker": "a"}) for name in expected]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    wrong = {name for name, problem in expected.items() if problem is not None}

    strict = study(tmp_path, toy, dev=str(tmp_path / "dev.jsonl"), min_seconds=0.0)
    with pytest.raises(StudyError, match="skip_unreadable") as caught:
        checked_corpus(strict, "dev", silent)
    assert all(any(name in line for line in caught.value.lines) for name in wrong), "all are told at once"

    lenient = study(tmp_path, toy, dev=str(tmp_path / "dev.jsonl"), min_seconds=0.0, skip_unreadable=True)
    corpus = checked_corpus(lenient, "dev", silent)
    assert {u.id for u in corpus.utterances} == set(expected) - wrong
    seconds = soundfile.info(good).duration
    for utterance in corpus.utterances:  # never a wrong sample rate
        assert len(read_audio(utterance.audio)) / 16_000 == pytest.approx(seconds, abs=0.001), utterance.id
    said = " | ".join(d.reason for d in corpus.dropped)
    assert len(corpus.dropped) == len(wrong)
    for name in wrong:
        assert name in said
        assert (expected[name] or "") in said

    report = json.loads((lenient.run_folder / "corpus" / "dev.json").read_text())
    assert len(report["dropped"]) == len(wrong)
    assert not any(line["reason"].startswith(line["id"]) for line in report["dropped"]), "the line is named once"
    assert report["utterances"] == len(expected) - len(wrong)
    shutil.rmtree(tmp_path / "folder.wav")
    assert [u.id for u in checked_corpus(lenient, "dev", silent).utterances] == [u.id for u in corpus.utterances]


def test_a_parquet_folder_gives_the_same_utterances_as_a_saved_dataset(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dataset(toy, "dev", tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))["dev"]
    (tmp_path / "parquet").mkdir()
    saved.cast_column("audio", datasets.Audio(decode=False)).to_parquet(tmp_path / "parquet" / "dev-0.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    both = [
        load_corpus(study(tmp_path, toy, dev={"dataset": str(tmp_path / kind), "split": split, "text": "sentence"}), "dev")
        for kind, split in (("saved", "dev"), ("parquet", "validation"))
    ]
    assert contents(both[0]) == contents(both[1])
    assert [u.id for u in both[0]] == [u.id for u in both[1]]
