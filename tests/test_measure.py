"""Latency, memory and file size of candidates. No test depends on the machine's speed."""

import io
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from rich.console import Console
from safetensors.torch import load_file

import prunesearch.commands.measure
from prunesearch.asr.assembly import StudyModels
from prunesearch.cli.tables import measurement_table
from prunesearch.commands.export import export
from prunesearch.commands.launch import launch
from prunesearch.commands.measure import measure
from prunesearch.commands.measure_folders import is_exported, measure_folders
from prunesearch.report import comparison_of
from prunesearch.report.system_tables import ratios_table
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.measurement import Measurement, Ratios, SystemMetrics, read_measurement
from prunesearch.training.decode import count_new_tokens
from tests.conftest import write_study
from tests.test_launch import cli

BASELINES = {"full", "full+lora4", "minus-2-3", "minus-2-3+lora4"}


@pytest.fixture(scope="module")
def study(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_study(tmp_path_factory.mktemp("measured") / "s", toy)
    launch(file, trials=4)
    return file


@pytest.fixture
def copied(study: Path, tmp_path: Path) -> Path:
    """A copy of the study that a test may damage."""
    shutil.copytree(study.parent, tmp_path / "s")
    return tmp_path / "s" / "study.toml"


@pytest.fixture(scope="module")
def measured(study: Path) -> Measurement:
    return measure(study, runs=2, utterances=3)


def tensor_bytes(*files: Path) -> int:
    return sum(t.numel() * t.element_size() for file in files if file.exists() for t in load_file(file).values())


def test_front_and_baselines_are_measured_and_unpruned_comes_first(measured: Measurement) -> None:
    keys = [system.candidate for system in measured.systems]
    assert keys[0] == "full"
    assert sorted(keys) == sorted(BASELINES)
    assert (measured.turns, measured.utterances, measured.dtype) == (2, 3, "float32")


def test_the_report_shows_what_was_measured(study: Path, measured: Measurement) -> None:
    config = load_study(study)
    assert read_measurement(config.run_folder / "measure.json") == measured
    table = ratios_table(comparison_of(config))
    assert [row[0] for row in table.rows] == [s.name or s.candidate for s in measured.systems]
    assert table.rows[0][1:] == ("1.00 (1.00–1.00)",) * 4 + ("1.000", "1.000")


def test_removed_layers_reduce_the_bytes_by_their_own(measured: Measurement, toy: Path) -> None:
    weights = load_file(toy / "encoder" / "model.safetensors")
    layers = sum(t.numel() * t.element_size() for name, t in weights.items() if name.startswith(("layers.2.", "layers.3.")))
    assert layers > 0
    figures = {system.candidate: system.figures for system in measured.systems}
    for whole, pruned in (("full", "minus-2-3"), ("full+lora4", "minus-2-3+lora4")):
        assert figures[whole].parameter_bytes - figures[pruned].parameter_bytes == layers
        assert figures[whole].file_bytes - figures[pruned].file_bytes == layers


@pytest.mark.parametrize("key", ["full", "minus-2-3+lora4"])
def test_file_bytes_are_what_an_export_writes(study: Path, measured: Measurement, tmp_path: Path, key: str) -> None:
    export(study, tmp_path / "out", key)
    speech = ("encoder/model.safetensors", "projector.safetensors", "adapter/adapter_model.safetensors")
    (system,) = [s for s in measured.systems if s.candidate == key]
    written = tensor_bytes(*(tmp_path / "out" / name for name in speech))
    assert system.figures.file_bytes == written
    assert system.figures.parameter_bytes == written + tensor_bytes(tmp_path / "out" / "llm" / "model.safetensors")


def test_unpruned_has_ratio_one_and_runs_alternate(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    assemble = prunesearch.commands.measure.assemble

    def counting(config: Any, record: Any, loaded: Any) -> Any:
        measured.append(record.candidate.key)
        return assemble(config, record, loaded)

    monkeypatch.setattr(prunesearch.commands.measure, "assemble", counting)
    (unpruned,) = measure(study, ["full"], runs=1, utterances=1).systems
    assert measured == ["full", "full"]  # one warm-up run, one that counts
    assert unpruned.figures == unpruned.unpruned
    assert unpruned.ratios == unpruned.lowest == unpruned.highest
    assert {getattr(unpruned.ratios, f.name) for f in fields(Ratios)} <= {1.0, None}

    measured.clear()
    first, second = measure(study, ["minus-2-3+lora4", "full", "minus-2-3+lora4"], runs=1, utterances=1).systems
    assert (first.candidate, second.candidate) == ("full", "minus-2-3+lora4")
    assert measured == ["full", "minus-2-3+lora4"] * 2
    assert first.figures == second.unpruned


def test_the_llm_is_loaded_once_and_left_without_lora(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[StudyModels] = []
    load = StudyModels.load

    def counting(config: Any, dtype: str) -> StudyModels:
        loaded.append(load(config, dtype))
        return loaded[-1]

    monkeypatch.setattr(StudyModels, "load", counting)
    measure(study, runs=1, utterances=1)
    (models,) = (each.system for each in loaded)
    assert not [name for name, _ in models.llm.model.named_parameters() if "lora_" in name]
    assert models.encoder.depth == 4


def test_tokens_are_counted_up_to_the_end_of_sequence_or_the_limit() -> None:
    end, pad = 2, 0
    assert count_new_tokens([5, 6, end, pad, pad], limit=5, ends=(end,)) == 3
    assert count_new_tokens([5, 6, 7, pad, pad], limit=3, ends=(end,)) == 3
    assert count_new_tokens([5, 6], limit=5, ends=(end,)) == 2
    assert count_new_tokens([5, end, end, end], limit=4, ends=(end,)) == 2  # padded with its end of sequence


def test_the_command_prints_json_and_keeps_the_outcome(study: Path) -> None:
    done = cli("measure", study, "--candidate", "minus-2-3", "--utterances", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((load_study(study).run_folder / "measure.json").read_text()) == found
    assert found.keys() == {f.name for f in fields(Measurement)}
    for system in found["systems"]:
        assert system["figures"].keys() == system["unpruned"].keys() == {f.name for f in fields(SystemMetrics)}
        assert system["ratios"].keys() == {f.name for f in fields(Ratios)}
        for name, ratio in system["ratios"].items():
            assert ratio is None or system["lowest"][name] <= ratio <= system["highest"][name]
        assert all(value is None or value > 0 for value in (*system["figures"].values(), *system["ratios"].values()))


def test_the_table_has_ratios_values_and_the_conditions_of_the_measurement(measured: Measurement) -> None:
    console = Console(width=160, file=io.StringIO())
    console.print(measurement_table(measured))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    (row,) = [line for line in shown.splitlines() if line.startswith("│ top2 ")]
    (system,) = [s for s in measured.systems if s.name == "top2"]
    assert f"{system.ratios.parameters:.3f}" in row
    assert f"{1e3 * system.figures.encoder_seconds:.2f}" in row
    assert ("–" in row) == (system.figures.peak_memory_bytes is None)
    assert "more tokens are generated" in " ".join(shown.split())


def test_systems_with_deleted_weights_are_skipped_unless_named(copied: Path) -> None:
    (load_study(copied).run_folder / "records" / "minus-2-3" / "weights.safetensors").unlink()
    found = measure(copied, runs=1, utterances=1)
    assert {system.candidate for system in found.systems} == BASELINES - {"minus-2-3"}
    with pytest.raises(StudyError, match="weights of minus-2-3 were deleted") as caught:
        measure(copied, ["minus-2-3"])
    assert len(caught.value.lines) == 1


def test_errors_are_one_line(copied: Path, toy: Path, tmp_path: Path) -> None:
    told = cli("measure", copied, "--candidate", "top")
    assert (told.returncode, told.stdout, len(told.stderr.splitlines())) == (2, "", 1), told.stderr
    for key in ("minus-0", "top"):
        with pytest.raises(StudyError, match="--candidate") as caught:
            measure(copied, [key])
        assert len(caught.value.lines) == 1
    with pytest.raises(StudyError, match="no complete candidate yet") as caught:
        measure(write_study(tmp_path / "new", toy))
    assert len(caught.value.lines) == 1
    shutil.rmtree(load_study(copied).run_folder / "records" / "full")
    with pytest.raises(StudyError, match=r"unpruned.*prunesearch launch") as caught:
        measure(copied)
    assert len(caught.value.lines) == 1


def test_an_exported_system_is_measured_beside_another_without_a_study(study: Path, tmp_path: Path) -> None:
    export(study, tmp_path / "small", candidate="minus-2-3+lora4")
    export(study, tmp_path / "whole", candidate="full")
    recordings = load_study(study).data.dev[0]
    found = measure_folders(tmp_path / "small", Path(str(recordings)), tmp_path / "whole", runs=1, utterances=2)
    whole, small = found.systems
    assert (found.study, whole.candidate, small.candidate) == ("small", "whole", "small")
    assert whole.ratios.encoder == 1
    assert small.ratios.file < 1, "two of four layers are missing"
    assert found.utterances == 2
    alone = measure_folders(tmp_path / "small", Path(str(recordings)), runs=1, utterances=1)
    assert [system.candidate for system in alone.systems] == ["small"]
    long = np.sin(np.arange(16_000 * 3) / 20)  # the window has two seconds
    soundfile.write(tmp_path / "long.wav", long, 16_000)
    (tmp_path / "long.jsonl").write_text(json.dumps({"audio": "long.wav", "text": ""}))
    with pytest.raises(StudyError, match=r"lasts 3\.0 s, longer than the window of 2 s"):
        measure_folders(tmp_path / "small", tmp_path / "long.jsonl")
    with pytest.raises(StudyError, match="--data: there is no file"):
        measure_folders(tmp_path / "small", tmp_path / "nowhere.jsonl")
    assert is_exported(tmp_path / "small")
    assert not is_exported(study.parent)
