import json
import math
from pathlib import Path
from typing import Any

import pytest

from prunesearch.commands.init import write_study_file
from prunesearch.search.space import SearchSpace
from prunesearch.study.candidate import count_candidates
from prunesearch.study.config import StudyConfig, load_study, parse_study
from prunesearch.study.errors import StudyError
from tests.conftest import write_study

STUDIES = sorted((Path(__file__).parents[1] / "studies").rglob("*.toml"))


def errors_in(path: Path) -> list[str]:
    with pytest.raises(StudyError) as caught:
        load_study(path)
    return caught.value.lines


def test_a_study_round_trips_through_json(toy: Path, tmp_path: Path) -> None:
    config = load_study(write_study(tmp_path / "s", toy))
    again = StudyConfig.model_validate_json(config.model_dump_json(), context={"folder": config.folder})
    assert again.model_dump() == config.model_dump()
    assert config.name == "s"


def test_a_limit_on_groups_needs_groups(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path, toy, search={"max_worst_group_wer": 0.3})
    assert load_study(file).search.max_worst_group_wer == 0.3
    file.write_text(
        file.read_text()
        .replace('"group" = "speaker"', '"skip_unreadable" = false')
        .replace('group = "speaker"', "skip_unreadable = false")
    )
    (line,) = errors_in(file)
    assert "max_worst_group_wer needs data.group" in line


def test_every_error_is_reported_at_once_each_on_one_line(toy: Path, tmp_path: Path) -> None:
    file = write_study(
        tmp_path, toy, llm={"promt": "x"}, data={"dev": "nowhere.jsonl"}, training={"steps": "many", "rungs": [0.5, 1.5]},
        search={"removable_layers": [1, 9], "sampler": "tpee"},
    )  # fmt: skip
    lines = errors_in(file)
    assert all("\n" not in line for line in lines)
    expected = {
        "llm.promt": "did you mean prompt",
        "data.dev": "nowhere.jsonl",
        "training.steps": "got 'many'",
        "training.rungs": "1.5",
        "search.removable_layers": "must lie in [0, 4)",
        "search.sampler": "did you mean 'tpe'",
    }
    for path, part in expected.items():
        assert [line for line in lines if line.startswith(path) and part in line], (path, lines)
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"search": {"max_removed": 5}}, "must not exceed the number of removable layers, 4"),
        ({"search": {"max_removed": 4}}, "must leave one of the encoder's 4 layers"),
        ({"search": {"fixed": [{"removed_layers": [0, 1, 2, 3]}]}}, "must leave one of the encoder's 4 layers"),
        ({"search": {"lora_ranks": [4, 0]}}, "must rise"),
        ({"search": {"fixed": [{"removed_layers": [4]}]}}, "must lie in [0, 4)"),
        ({"training": {"rungs": [0.5, 0.25]}}, "must rise"),
        ({"search": {"removable_layers": []}}, "at least one layer"),
        ({"encoder": {"model": "${PRUNESEARCH_NO_SUCH_VARIABLE}/w"}}, "export PRUNESEARCH_NO_SUCH_VARIABLE"),
        ({"encoder": {}, "preset": {}}, "preset"),
    ],
)
def test_impossible_combinations_of_keys_are_refused(sections: dict, part: str, toy: Path, tmp_path: Path) -> None:
    if "preset" in sections:
        file = write_study(tmp_path, toy)
        file.write_text('preset = "papr"\n' + file.read_text())
    else:
        file = write_study(tmp_path, toy, **sections)
    assert any(part in line for line in errors_in(file))


def test_two_splits_of_one_manifest_are_refused(toy: Path, tmp_path: Path) -> None:
    both = str(toy / "dev.jsonl")
    assert "dev and test must not share a source" in errors_in(write_study(tmp_path, toy, data={"dev": both, "test": both}))[0]


def test_every_kind_of_source_is_parsed_and_its_errors_are_named(toy: Path, tmp_path: Path) -> None:
    fleurs = {"fleurs": "da", "split": "train"}
    file = write_study(tmp_path, toy, data={"train": [fleurs, {"dataset": "x/y", "split": "train"}]})
    train = load_study(file).data.train
    assert [type(source).__name__ for source in train] == ["FleursSource", "DatasetSource"]
    wrong = {
        "train": [{"dataset": "x/y", "split": "train", "txt": "sentence"}, {"fleurs": "de", "split": "train"}],
        "dev": {"common_voice": "nowhere", "split": "dev"},
        "test": "nowhere.jsonl",
    }
    lines = errors_in(write_study(tmp_path, toy, data=wrong))
    expected = {
        "data.train.0.txt": "did you mean text?",
        "data.train.1.fleurs": "must be 'da', 'nl' or 'en', got 'de'",
        "data.dev.common_voice": "there is no folder",
        "data.test:": "there is no file",
    }
    for (path, part), line in zip(expected.items(), lines, strict=True):
        assert line.startswith(path), line
        assert part in line


def test_a_missing_file_and_invalid_toml_are_named(tmp_path: Path) -> None:
    assert "there is no study file" in errors_in(tmp_path / "x.toml")[0]
    (tmp_path / "study.toml").write_text("name = ")
    assert "not valid TOML" in errors_in(tmp_path)[0]


def test_variables_are_expanded_when_the_path_is_opened(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY", str(toy))
    config = load_study(write_study(tmp_path, toy, encoder={"model": "${TOY}/encoder"}))
    assert config.locate(config.slam.encoder.model) == str(toy / "encoder")
    assert "${TOY}" in config.model_dump_json()  # the record says what the user wrote


def test_a_preset_fills_in_and_the_study_overrides(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path, toy, training={"learning_rate": 5e-4})
    file.write_text('preset = "paper"\n' + file.read_text())
    config = load_study(file)
    assert (config.training.init, config.training.learning_rate, config.decoding.test_beams) == ("scratch", 5e-4, 2)


def test_the_fingerprint_ignores_what_may_change_and_nothing_else(toy: Path, tmp_path: Path) -> None:
    base = load_study(write_study(tmp_path, toy)).fingerprint()
    more = load_study(write_study(tmp_path, toy, search={"trials": 99, "fixed": [{"removed_layers": [1]}]}))
    other = load_study(write_study(tmp_path, toy, training={"steps": 9}))
    assert more.fingerprint() == base != other.fingerprint()


def test_every_shipped_study_file_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert STUDIES, "no study files found"
    for split in ("train", "dev", "test"):
        for corpus in ("digits", "noisy", "prompts"):
            (tmp_path / corpus).mkdir(exist_ok=True)
            (tmp_path / corpus / f"{split}.jsonl").touch()
    for model in ("whisper-base", "gemma-3-270m"):
        (tmp_path / model).mkdir()
    monkeypatch.setenv("PRUNESEARCH_REAL", str(tmp_path))
    for file in STUDIES:
        assert load_study(file, data_must_exist=file.parent.name != "paper").search.trials >= 2


def test_the_template_is_a_valid_study_once_there_is_data(tmp_path: Path) -> None:
    file = write_study_file(tmp_path, "mine")
    assert all("must be an existing manifest" in line for line in errors_in(file))
    (file.parent / "data").mkdir()
    for split in ("train", "dev", "test"):
        (file.parent / "data" / f"{split}.jsonl").touch()
    assert load_study(file).name == "mine"
    with pytest.raises(StudyError, match="exists already"):
        write_study_file(tmp_path, "mine")


def test_a_section_that_is_not_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="encoder"):
        parse_study({"encoder": 3, "llm": {"model": "x"}, "data": 1}, tmp_path / "study.toml")


def renamed(file: Path, name: str) -> Path:
    file.write_text(f"name = {json.dumps(name)}\n" + file.read_text())
    return file


@pytest.mark.parametrize("name", ["a", "digits-2", "Ångström_1.5", "_x", "3"])
def test_names_that_init_accepts_are_valid(toy: Path, tmp_path: Path, name: str) -> None:
    assert load_study(renamed(write_study(tmp_path, toy), name)).name == name
    assert write_study_file(tmp_path, name).parent.name == name


@pytest.mark.parametrize("name", ["", " ", "my study", "../x", "a/b", ".hidden", "-x", "x\n", "a\\b", "größe?"])
def test_other_names_are_refused_by_validate_and_init_alike(toy: Path, tmp_path: Path, name: str) -> None:
    (line,) = errors_in(renamed(write_study(tmp_path, toy), name))
    assert line.startswith("name: must consist of letters, digits")
    assert f"got {name!r}" in line
    with pytest.raises(StudyError) as caught:
        write_study_file(tmp_path, name)
    assert caught.value.lines[0].removeprefix("NAME: ") == line.removeprefix("name: ")


def test_an_invalid_folder_or_file_name_is_refused_and_the_proposed_name_is_valid(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "my study!", toy)
    (line,) = errors_in(file)
    assert "got 'my study!', the folder's name: add name = \"my-study\" to the study file" in line
    other = file.rename(file.with_name("größe 2.toml"))
    (line,) = errors_in(other)
    assert "got 'größe 2', the file's name: add name = \"größe-2\" to the study file" in line
    assert load_study(renamed(other, "größe-2")).name == "größe-2"


def test_a_started_study_with_an_invalid_name_is_still_read(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "my study", toy)
    assert load_study(file, data_must_exist=False).name == "my study"
    (tmp_path / "my study" / "run").mkdir()
    assert load_study(file).name == "my study"


def test_a_grid_that_is_too_large_to_list_is_refused(toy: Path, tmp_path: Path) -> None:
    def encoder(layers: int) -> dict[str, Any]:
        folder = tmp_path / f"encoder-{layers}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"encoder_layers": layers}))
        return {"model": str(folder)}

    def search(**keys: Any) -> dict[str, Any]:
        return {"sampler": "grid", "lora_ranks": [0, 4], **keys}

    (line,) = errors_in(write_study(tmp_path, toy, encoder=encoder(32), search=search(max_removed=6)))
    size = 2 * sum(math.comb(32, k) for k in range(7))
    assert line.startswith(f"search.sampler: grid can list at most 200,000 candidates, got a space of {size:,}: ")
    for keys in (
        {"sampler": "tpe", "max_removed": 6},
        {"max_removed": 4},
        {"max_removed": 6, "removable_layers": list(range(10))},
    ):
        assert load_study(write_study(tmp_path, toy, encoder=encoder(32), search=search(**keys)))
    # the depth of a hub model is not known here, but the named layers are
    hub = {"model": "openai/whisper-large-v3"}
    named = search(max_removed=9, removable_layers=list(range(20)))
    (line,) = errors_in(write_study(tmp_path, toy, encoder=hub, search=named))
    assert line.startswith("search.sampler: ")
    assert load_study(write_study(tmp_path, toy, encoder=hub, search=search(max_removed=9)))


def test_validation_and_search_count_the_same_number_of_candidates(toy: Path, tmp_path: Path) -> None:
    for most, ranks in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4])):
        config = load_study(write_study(tmp_path, toy, search={"max_removed": most, "lora_ranks": ranks}))
        assert SearchSpace.of(config, 4).size == count_candidates(4, config.max_removed(4), len(ranks))


@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_of_fewer_than_three_layers_is_refused(toy: Path, tmp_path: Path, layers: int) -> None:
    (tmp_path / "shallow").mkdir()
    (tmp_path / "shallow" / "config.json").write_text(json.dumps({"encoder_layers": layers}))
    file = write_study(tmp_path, toy, encoder={"model": str(tmp_path / "shallow")}, search={"max_removed": 1})
    line = errors_in(file)[0]
    assert line.startswith(f"encoder.model: must have at least three layers, got {layers}")
    (tmp_path / "shallow" / "config.json").write_text(json.dumps({"encoder_layers": 3}))
    assert load_study(file).max_removed(3) == 1
