"""Exported systems: written, loaded again, and used."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prunesearch import SlamAsr
from prunesearch.asr.assembly import weights_file
from prunesearch.asr.recognizer import Segment, windows
from prunesearch.asr.recordings import Transcript, format_transcript, recordings
from prunesearch.asr.scoring import score_manifest
from prunesearch.commands.export import choose_record, export
from prunesearch.commands.launch import launch
from prunesearch.speech.text import normalizer_for
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError, user_error_lines
from prunesearch.study.front import knee, pareto_front, pooled_by_system
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
def decoded(study: Path, toy: Path) -> Callable[[str], tuple[list[Path], list[str]]]:
    """The dev split's recordings, and a trial's hypotheses of them."""

    def of(key: str) -> tuple[list[Path], list[str]]:
        results = read_utterances(load_study(study).run_folder / "records", Candidate.from_key(key), "dev") or []
        rows = [json.loads(line) for line in (toy / "dev.jsonl").read_text().splitlines()]
        return [toy / row["audio"] for row in rows], [result.hypothesis for result in results]

    return of


Decoded = Callable[[str], tuple[list[Path], list[str]]]


@pytest.mark.parametrize("key", [LORA, BARE])
def test_an_exported_system_transcribes_as_its_trial_did(study: Path, decoded: Decoded, tmp_path: Path, key: str) -> None:
    export(study, tmp_path / "out", key)
    files, said = decoded(key)
    transcripts = SlamAsr.from_pretrained(tmp_path / "out").transcribe(files)
    assert [normalizer_for("paper")(t) for t in transcripts] == list(said)


def test_in_auto_precision_an_exported_system_transcribes_as_its_trial_did(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 40, "precision": "auto"}, decoding={"batch_size": 3})
    config = launch(file, trials=4)
    said = [r.hypothesis for r in read_utterances(config.run_folder / "records", Candidate.from_key(LORA), "test") or []]
    export(file, tmp_path / "out", trial=3)
    files = [toy / json.loads(line)["audio"] for line in (toy / "test.jsonl").read_text().splitlines()]
    transcripts = SlamAsr.from_pretrained(tmp_path / "out").transcribe(files)
    assert [normalizer_for("paper")(t) for t in transcripts] == said


def test_it_can_be_saved_and_loaded_again(exported: Path, decoded: Decoded, tmp_path: Path) -> None:
    files, _ = decoded(LORA)
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


@torch.no_grad()
def test_a_merged_llm_predicts_what_the_llm_with_its_adapter_predicts(study: Path, exported: Path, tmp_path: Path) -> None:
    export(study, tmp_path / "merged", LORA, merge=True)
    assert not (tmp_path / "merged" / "adapter").exists()
    adapted, merged = SlamAsr.from_pretrained(exported), SlamAsr.from_pretrained(tmp_path / "merged")
    states = torch.randn(3, 40, adapted.encoder.width, generator=torch.Generator().manual_seed(0))
    inputs = states, torch.tensor([40, 9, 23]), torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    logits = adapted.reader.logits(*inputs)
    torch.testing.assert_close(merged.reader.logits(*inputs), logits, atol=1e-4, rtol=1e-4)
    with adapted.reader.model.disable_adapter():
        assert (adapted.reader.logits(*inputs) - logits).abs().max() > 0.01, "the LoRA matters"


def test_export_chooses_by_key_by_size_or_the_knee(study: Path) -> None:
    config = load_study(study)
    records = read_records(config.run_folder / "records")
    assert choose_record(config, LORA).candidate.key == LORA
    small = min(r.parameters.speech for r in records)
    assert choose_record(config, best_under_params=small).parameters.speech == small
    front = pareto_front(pooled_by_system([r for r in records if r.state == "complete"]), config.search.params_objective)
    assert choose_record(config).candidate == knee(front, config.search.params_objective).candidate
    assert choose_record(config, trial=3).candidate.key == LORA
    two = {"trial": 1, "candidate": LORA}
    for wrong in ({"candidate": "minus-0"}, {"candidate": "top"}, {"best_under_params": 1.0}, {"trial": 99}, two):
        with pytest.raises(StudyError) as caught:
            choose_record(config, **wrong)  # type: ignore[arg-type]
        assert len(caught.value.lines) == 1


def test_a_model_card_lists_removed_layers_and_wer(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "of which removed: 2, 3" in card
    assert "| dev | all |" in card
    assert "license: #" in card


def test_a_non_empty_folder_is_not_overwritten_and_a_foreign_folder_is_not_loaded(
    exported: Path, study: Path, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match="not empty"):
        export(study, exported, LORA)
    with pytest.raises(StudyError, match=r"slam\.json"):
        SlamAsr.from_pretrained(tmp_path)
    with pytest.raises(StudyError, match="neither a folder nor a repository"):
        SlamAsr.from_pretrained("some/where")


def text_of(folder: Path) -> dict[str, str]:
    """The content of every file of an export, by its name there: safetensors, too, for their headers."""
    return {str(p.relative_to(folder)): p.read_bytes().decode(errors="replace") for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("choice", [{}, {"with_llm": False}, {"merge": True}])
def test_an_export_holds_no_path_of_the_machine(study: Path, toy: Path, tmp_path: Path, choice: dict[str, bool]) -> None:
    export(study, tmp_path / "out", LORA, **choice)
    SlamAsr.from_pretrained(tmp_path / "out", llm=toy / "llm" if "with_llm" in choice else None).save_pretrained(
        tmp_path / "again", with_llm=choice.get("with_llm", True)
    )
    for folder in (tmp_path / "out", tmp_path / "again"):
        found = text_of(folder)
        assert {"slam.json", "tokenizer/tokenizer_config.json", "encoder/config.json"} <= found.keys()
        for name, text in found.items():
            for path in (toy, study.parent, tmp_path, Path.home()):
                assert str(path) not in text, name
        assert json.loads(found["slam.json"])["llm"]["model"] == "llm"
    stored = json.loads((tmp_path / "out" / "record.json").read_text())["provenance"]["config"]
    assert (stored["encoder"]["model"], stored["llm"]["model"], stored["data"]["dev"]) == ("encoder", "llm", ["dev.jsonl"])
    assert "train train.jsonl" in (tmp_path / "out" / "README.md").read_text()


def test_an_llm_that_is_left_out_is_given_when_the_export_is_loaded(
    study: Path, exported: Path, toy: Path, decoded: Decoded, tmp_path: Path
) -> None:
    export(study, tmp_path / "out", LORA, with_llm=False)
    assert not (tmp_path / "out" / "llm").exists()
    assert 'llm="/path/to/llm"' in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(
        StudyError, match=r'its LLM llm was a local folder .*from_pretrained\(.*, llm="/path/to/llm"\)'
    ) as caught:
        SlamAsr.from_pretrained(tmp_path / "out")
    assert len(caught.value.lines) == 1
    files, _ = decoded(LORA)
    given = SlamAsr.from_pretrained(tmp_path / "out", llm=toy / "llm")
    assert given.transcribe(files) == SlamAsr.from_pretrained(exported).transcribe(files)
    named = cli("transcribe", tmp_path / "out", *files, "--llm", toy / "llm")
    assert (named.returncode, named.stdout) == (0, cli("transcribe", exported, *files).stdout)
    scored = cli("evaluate", tmp_path / "out", "--data", toy / "dev.jsonl", "--llm", toy / "llm")
    assert (scored.returncode, scored.stdout) == (0, cli("evaluate", exported, "--data", toy / "dev.jsonl").stdout)
    with pytest.raises(StudyError, match=r"the hub cannot be reached, .*\ngive a local folder instead: --llm"):
        SlamAsr.from_pretrained(tmp_path / "out", llm="nobody/nothing")


def test_an_llm_of_the_hub_is_named_and_loaded_from_there(exported: Path, tmp_path: Path) -> None:
    asr = SlamAsr.from_pretrained(exported)
    settings = asr.settings
    asr.settings = settings.model_copy(
        update={"llm": settings.llm.model_copy(update={"model": "nobody/nothing"}), "llm_is_local": False}
    )
    asr.save_pretrained(tmp_path / "out", with_llm=False)
    assert json.loads((tmp_path / "out" / "slam.json").read_text())["llm"]["model"] == "nobody/nothing"
    with pytest.raises(StudyError, match="the hub cannot be reached, and nobody/nothing is not in its cache"):
        SlamAsr.from_pretrained(tmp_path / "out")


def test_an_export_of_the_first_format_is_loaded_from_the_path_in_it(
    study: Path, exported: Path, toy: Path, decoded: Decoded, tmp_path: Path
) -> None:
    export(study, tmp_path / "out", LORA, with_llm=False)
    settings = json.loads((tmp_path / "out" / "slam.json").read_text())
    del settings["llm_is_local"]
    for path, works in ((str(toy / "llm"), True), ("/of/another/machine/llm", False)):
        first = settings | {"format": 1, "llm": settings["llm"] | {"model": path}}
        (tmp_path / "out" / "slam.json").write_text(json.dumps(first))
        if works:
            files, _ = decoded(LORA)
            assert SlamAsr.from_pretrained(tmp_path / "out").transcribe(files) == SlamAsr.from_pretrained(exported).transcribe(
                files
            )
        else:
            with pytest.raises(StudyError, match="its LLM llm was a local folder"):
                SlamAsr.from_pretrained(tmp_path / "out")


def test_a_pickled_adapter_and_an_incomplete_export_are_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    weights = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(StudyError, match=r"adapter must hold the LoRA as adapter_model\.safetensors") as caught:
        SlamAsr.from_pretrained(tmp_path / "out")
    assert len(caught.value.lines) == 1
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    with pytest.raises(StudyError, match="incomplete export: it has no tokenizer"):
        SlamAsr.from_pretrained(tmp_path / "out")


def test_an_encoder_that_lacks_a_tensor_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    file = tmp_path / "out" / "encoder" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "conv1.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(StudyError, match=r"lacks 1 of the encoder's tensors, the first is conv1\.weight"):
        SlamAsr.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "lacks a tensor", "of another rank", "NaN"])
def test_damaged_weights_of_a_record_are_named(study: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(study.parent, tmp_path / "s")
    config = load_study(tmp_path / "s" / "study.toml")
    record = choose_record(config, LORA)
    file = weights_file(config, record)
    weights = load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "lacks a tensor":
        save_file({name: t for name, t in weights.items() if name != "projector.up.bias"}, file)
    elif damage == "of another rank":
        save_file({name: t[:2].clone() if "lora_A" in name else t for name, t in weights.items()}, file)
    else:
        weights["projector.up.bias"][0] = float("nan")
        save_file(weights, file)
    says = {"cut": "cut off", "lacks a tensor": r"projector\.up\.bias", "of another rank": r"lora_A.*\(2, 16\)", "NaN": "NaN"}
    with pytest.raises(StudyError, match=rf"weights\.safetensors.*{says[damage]}") as caught:
        export(config.source, tmp_path / "out", LORA)
    assert len(caught.value.lines) == 1


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


def test_decode_refuses_a_part_longer_than_a_window(exported: Path) -> None:
    asr = SlamAsr.from_pretrained(exported)
    longest = np.ones(int(asr.window_seconds * 16_000), np.float32)
    assert len(asr.decode([longest])) == 1
    with pytest.raises(ValueError, match="at most 100 encoder positions, got 101"):
        asr.decode([np.ones(len(longest) + 320, np.float32)])


def test_transcripts_are_formatted_as_text_json_and_subrip() -> None:
    transcript = Transcript("a.wav", [Segment(0.0, 2.5, "one"), Segment(2.5, 3.0, ""), Segment(3.0, 3723.0046, "two")])
    assert format_transcript(transcript, "text") == "one two"
    assert format_transcript(transcript, "text", with_name=True) == "a.wav\tone two"
    parsed = json.loads(format_transcript(transcript, "json"))
    assert (parsed["audio"], parsed["text"]) == ("a.wav", "one two")
    assert parsed["segments"][2] == {"start": 3.0, "end": 3723.0, "text": "two"}
    assert format_transcript(transcript, "srt").splitlines()[8:11] == ["3", "00:00:03,000 --> 01:02:03,005", "two"]


def test_all_arguments_without_recordings_are_reported_at_once(toy: Path, tmp_path: Path) -> None:
    with recordings([str(toy / "dev"), str(toy / "test" / "0.wav")]) as found:
        assert len(found) == 9
        assert all(path.is_file() for path in found.values())
    with pytest.raises(StudyError) as caught, recordings([str(tmp_path), "nowhere.wav"]):
        pass
    assert [line.split(":")[0] for line in caught.value.lines] == [str(tmp_path), "nowhere.wav"]


def test_transcribe_reads_files_folders_and_stdin_and_names_unusable_recordings(
    exported: Path, decoded: Decoded, tmp_path: Path
) -> None:
    files, said = decoded(LORA)
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


def test_the_evaluate_command_counts_what_the_study_counted(exported: Path, study: Path, toy: Path) -> None:
    found = json.loads(cli("evaluate", exported, "--data", toy / "dev.jsonl", "--json").stdout)
    record = next(r for r in read_records(load_study(study).run_folder / "records") if r.candidate.key == LORA)
    assert record.dev is not None
    assert found["substitutions"] == record.dev.errors.substitutions
    assert found["wer"] == pytest.approx(record.dev.errors.wer)


def test_all_unusable_manifest_lines_are_reported_at_once(exported: Path, toy: Path, tmp_path: Path) -> None:
    asr, manifest = SlamAsr.from_pretrained(exported), tmp_path / "data.jsonl"
    good = json.dumps({"audio": str(toy / "dev" / "0.wav"), "text": "low"})
    manifest.write_text(
        "\n".join(["{", good, json.dumps({"audio": "nowhere.wav", "text": "low"}), json.dumps({"text": "low"}), "[]"])
    )
    with pytest.raises(StudyError) as caught:
        score_manifest(asr, manifest)
    assert [line.split(": ")[0] for line in caught.value.lines] == [f"{manifest}:{n}" for n in (1, 3, 4, 5)]
    for content, rule in ((b"\n", "has no line"), (b"\xff", "must be UTF-8")):
        manifest.write_bytes(content)
        with pytest.raises(StudyError, match=rule):
            score_manifest(asr, manifest)
    manifest.write_text(good)
    assert score_manifest(asr, manifest)["utterances"] == 1


def test_a_full_disk_during_an_export_is_one_line_and_leaves_nothing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:  # as safetensors reports it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("prunesearch.asr.slam_asr.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        export(study, tmp_path / "out", BARE)
    assert user_error_lines(caught.value) == [
        f"{tmp_path / 'out'}: No space left on device: free space there, and run the same command again: finished work is kept"
    ]
    assert not (tmp_path / "out").exists()
