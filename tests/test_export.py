"""The model out: exported, loaded again, and listened to."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from prunesearch import SlamAsr
from prunesearch.asr.slam_asr import windows
from prunesearch.commands.export import chosen, export
from prunesearch.commands.launch import launch
from prunesearch.speech.text import normalizer_for
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import read_records, read_utterances
from tests.conftest import write_study
from tests.test_launch import ROOT, cli

LORA, BARE = "minus-2-3+lora4", "minus-2-3"


@pytest.fixture(scope="module")
def study(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_study(tmp_path_factory.mktemp("exported") / "s", toy, training={"steps": 40})
    launch(file, trials=5)
    return file


@pytest.fixture(scope="module")
def exported(study: Path) -> Path:
    export(study, study.parent / "out", LORA)
    return study.parent / "out"


@pytest.fixture(scope="module")
def heard(study: Path, toy: Path) -> Callable[[str], tuple[list[Path], list[str]]]:
    """The dev split's recordings, and what a trial made of them."""

    def of(key: str) -> tuple[list[Path], list[str]]:
        results = read_utterances(load_study(study).run_folder / "records", Candidate.from_key(key), "dev") or []
        rows = [json.loads(line) for line in (toy / "dev.jsonl").read_text().splitlines()]
        return [toy / row["audio"] for row in rows], [result.hypothesis for result in results]

    return of


Heard = Callable[[str], tuple[list[Path], list[str]]]


@pytest.mark.parametrize("key", [LORA, BARE])
def test_an_exported_system_says_what_the_trial_said(study: Path, heard: Heard, tmp_path: Path, key: str) -> None:
    export(study, tmp_path / "out", key)
    files, said = heard(key)
    transcripts = SlamAsr.from_pretrained(tmp_path / "out").transcribe(files)
    assert [normalizer_for("paper")(t) for t in transcripts] == list(said)


def test_in_the_processors_own_precision_too_every_word_is_the_trials(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 40, "precision": "auto"}, decoding={"batch_size": 3})
    config = launch(file, trials=4)
    said = [r.hypothesis for r in read_utterances(config.run_folder / "records", Candidate.from_key(LORA), "test") or []]
    export(file, tmp_path / "out", trial=3)
    files = [toy / json.loads(line)["audio"] for line in (toy / "test.jsonl").read_text().splitlines()]
    transcripts = SlamAsr.from_pretrained(tmp_path / "out").transcribe(files)
    assert [normalizer_for("paper")(t) for t in transcripts] == said


def test_it_can_be_saved_and_loaded_again(exported: Path, heard: Heard, tmp_path: Path) -> None:
    files, _ = heard(LORA)
    asr = SlamAsr.from_pretrained(exported)
    asr.save_pretrained(tmp_path / "again")
    assert SlamAsr.from_pretrained(tmp_path / "again").transcribe(files) == asr.transcribe(files)


def test_the_encoder_opens_with_transformers_alone(exported: Path) -> None:
    probe = (
        "import sys; from transformers.models.whisper.modeling_whisper import WhisperEncoder; "
        "e, i = WhisperEncoder.from_pretrained(sys.argv[1], output_loading_info=True); "
        "print(len(e.layers), len(i['missing_keys']), len(i['unexpected_keys']), 'prunesearch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe, exported / "encoder"], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["2", "0", "0", "False"], done.stderr


def test_a_merged_llm_needs_no_adapter(study: Path, heard: Heard, tmp_path: Path) -> None:
    export(study, tmp_path / "out", LORA, merge=True)
    assert (tmp_path / "out" / "llm").is_dir()
    assert not (tmp_path / "out" / "adapter").exists()
    files, said = heard(LORA)
    transcripts = SlamAsr.from_pretrained(tmp_path / "out").transcribe(files)
    assert len(transcripts) == len(said)


def test_what_is_exported_is_chosen_by_key_by_size_or_at_the_knee(study: Path) -> None:
    config = load_study(study)
    assert chosen(config, LORA).candidate.key == LORA
    small = min(r.parameters.speech for r in read_records(config.run_folder / "records"))
    assert chosen(config, best_under_params=small).parameters.speech == small
    assert chosen(config).state == "complete"
    assert chosen(config, trial=3).candidate.key == LORA
    two = {"trial": 1, "candidate": LORA}
    for wrong in ({"candidate": "minus-0"}, {"candidate": "top"}, {"best_under_params": 1.0}, {"trial": 99}, two):
        with pytest.raises(StudyError) as caught:
            chosen(config, **wrong)  # type: ignore[arg-type]
        assert len(caught.value.lines) == 1


def test_a_card_says_what_was_removed_and_what_it_costs(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "of which removed: 2, 3" in card
    assert "| dev | all |" in card
    assert "license: #" in card


def test_nothing_is_overwritten_and_no_other_folder_is_taken_for_a_system(exported: Path, study: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not empty"):
        export(study, exported, LORA)
    with pytest.raises(StudyError, match=r"slam\.json"):
        SlamAsr.from_pretrained(tmp_path)
    with pytest.raises(StudyError, match="neither a folder nor a repository"):
        SlamAsr.from_pretrained("some/where")


def test_long_recordings_are_cut_where_they_are_quietest() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.3, 70 * 16_000).astype(np.float32)
    for second in (27.0, 53.0):
        samples[int((second - 0.2) * 16_000) : int((second + 0.2) * 16_000)] = 0
    cuts = windows(samples, 30 * 16_000)
    assert [round(end / 16_000) for _, end in cuts] == [27, 53, 70]
    assert cuts[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    assert windows(samples[:16_000], 30 * 16_000) == [(0, 16_000)]
    silent = np.zeros(65 * 16_000, dtype=np.float32)
    assert all(end - start <= 30 * 16_000 for start, end in windows(silent, 30 * 16_000))


def test_the_command_line_transcribes_files_folders_and_stdin_and_names_what_it_cannot(
    exported: Path, heard: Heard, tmp_path: Path
) -> None:
    files, said = heard(LORA)
    long = np.tile(soundfile.read(files[0])[0], 12)
    soundfile.write(tmp_path / "long.wav", long, 16_000)
    (tmp_path / "text.wav").write_text("no recording")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)

    one = cli("transcribe", exported, files[0])
    assert (one.returncode, normalizer_for("paper")(one.stdout)) == (0, said[0])
    several = cli("transcribe", exported, tmp_path, "--format", "json")
    assert several.returncode == 2
    assert [line.split("/")[-1].split(":")[0] for line in several.stderr.splitlines()] == ["silent.wav", "text.wav"]
    (told,) = [json.loads(line) for line in several.stdout.splitlines()]
    assert len(told["segments"]) > 1
    assert told["segments"][-1]["end"] == pytest.approx(len(long) / 16_000, abs=0.01)
    with files[0].open("rb") as stdin:
        piped = subprocess.run(
            [sys.executable, "cli.py", "transcribe", str(exported), "-", "--format", "srt"],
            stdin=stdin, capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
    assert piped.stdout.startswith("1\n00:00:00,000 --> 00:00:0")
    nothing = cli("transcribe", exported, tmp_path / "nowhere.wav")
    assert (nothing.returncode, len(nothing.stderr.splitlines())) == (2, 1)


def test_evaluate_counts_what_the_study_counted(exported: Path, study: Path, toy: Path) -> None:
    found = json.loads(cli("evaluate", exported, "--data", toy / "dev.jsonl", "--json").stdout)
    record = next(r for r in read_records(load_study(study).run_folder / "records") if r.candidate.key == LORA)
    assert record.dev is not None
    assert found["substitutions"] == record.dev.errors.substitutions
    assert found["wer"] == pytest.approx(record.dev.errors.wer)
