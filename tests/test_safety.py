"""What a study is locked to, and what in its storage or its folder is refused."""

import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from safetensors.torch import load_file, save_file

from prunesearch.commands.launch import launch
from prunesearch.commands.status import abort, retry, status
from prunesearch.model.digest import weights_digest
from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.samplers import CandidateSampler, optuna_sampler
from prunesearch.search.study_progress import candidate_key
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord, read_records, write_record
from prunesearch.training.context import TrainingContext
from prunesearch.workers.lease import LEASE_SECONDS, LeaseMonitor, release_stale
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import code_identity, lock_provenance, open_existing_study, open_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import WorkerTrial, finished_at
from tests.conftest import write_study
from tests.test_search import landscape, params_of, rules, space
from tests.workers_helpers import command, complete, finished, opened

QUICK: dict[str, Any] = {"training": {"steps": 2, "init": "scratch"}, "search": {"sampler": "random"}}


@pytest.fixture(scope="module")
def finished_study(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_study(tmp_path_factory.mktemp("finished") / "s", toy, **QUICK)
    launch(file, trials=4)
    return file


@pytest.fixture
def study(finished_study: Path, tmp_path: Path) -> Path:
    """A copy of a study with four complete candidates, to be damaged."""
    shutil.copytree(finished_study.parent, tmp_path / "s")
    return tmp_path / "s" / "study.toml"


def stored(study: Path) -> StoredStudy:
    return open_existing_study(load_study(study))


# Locks


def test_other_data_are_refused_unless_changes_are_allowed(config: StudyConfig) -> None:
    study = opened(config, None)
    lock_provenance(study, "data", {"dev": {"utterances": 4, "digest": "a"}})
    lock_provenance(study, "data", {"dev": {"utterances": 4, "digest": "a"}})
    with pytest.raises(StudyError) as caught:
        lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}})
    assert caught.value.lines[:2] == [
        "data.dev.digest: the study has 'a', this worker 'b'",
        "data.dev.utterances: the study has 4, this worker 5",
    ]
    lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}}, allow_changes=True)
    lock_provenance(study, "data", {"dev": {"utterances": 5, "digest": "b"}})


def test_a_worker_with_other_texts_may_not_join(toy: Path, tmp_path: Path) -> None:
    manifest = (toy / "dev.jsonl").read_text().replace('"dev/', f'"{toy}/dev/')
    (tmp_path / "dev.jsonl").write_text(manifest)
    file = write_study(tmp_path / "s", toy, data={"dev": str(tmp_path / "dev.jsonl")})
    launch(file, trials=1)
    (tmp_path / "dev.jsonl").write_text(manifest.replace('"text": "low', '"text": "mid', 1))
    done = command("worker", file)
    assert [line.split(":")[0] for line in done.errors][:1] == ["data.dev.digest"]
    assert command("worker", file, "--allow-changes").code == 0


def test_a_worker_cannot_join_a_study_that_was_not_launched(toy: Path, tmp_path: Path) -> None:
    assert "`prunesearch launch" in command("worker", write_study(tmp_path / "s", toy)).error


def test_other_code_is_refused_and_what_differs_is_named(study: Path) -> None:
    here = code_identity()
    stored(study).set_attr("code", {**here, "source": "0" * 12, "torch": "1.0"})
    for verb in ("launch", "worker"):
        done = command(verb, study)
        assert done.errors == [
            f"code.source: the study has '000000000000', this worker '{here['source']}'",
            f"code.torch: the study has '1.0', this worker '{here['torch']}'",
            "records made with other code cannot be compared: use what the study was started with, or continue with "
            "--allow-changes",
        ]
    assert finished(stored(study)) == 4
    done = command("launch", study, "--trials", "5", "--allow-changes")
    assert done.code == 0, done.err
    assert finished(stored(study)) == 5
    assert stored(study).attrs["code"] == here
    assert command("launch", study, "--trials", "5").code == 0, "the study is locked to the new code now"


def test_another_anchor_is_refused(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 2}, anchor={"steps": 2}, search={"sampler": "random"})
    launch(file, trials=1)
    anchor = file.parent / "run" / "anchor" / "projector.safetensors"
    change_one_tensor(anchor)
    done = command("launch", file, "--trials", "2")
    assert [line.split(":")[0] for line in done.errors] == [
        "anchor.sha256",
        "records made with other anchor cannot be compared",
    ]
    assert len(read_records(file.parent / "run" / "records")) == 1
    assert command("launch", file, "--trials", "2", "--allow-changes").code == 0


def change_one_tensor(file: Path) -> None:
    """Replace the file: the old one may be mapped to memory."""
    tensors = load_file(file)
    name = min(tensors)
    tensors[name] = -2 * tensors[name] + 1
    save_file(tensors, file.with_suffix(".new"), {"format": "pt"})
    os.replace(file.with_suffix(".new"), file)


def states_of(study: Path, split: Any) -> torch.Tensor:
    """The encoder states that the study's candidates share, as a worker gets them."""
    context = TrainingContext.open(load_study(study))
    assert context.shared_depth == 1, "layers 2 and 3 can be removed, and a repair changes the one below them"
    return context.prefix(split, context.used(split)).values.clone()


def test_other_weights_under_the_same_path_are_refused_and_their_states_are_computed_anew(toy: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(toy / "encoder", encoder)
    settings = {**QUICK, "search": {"sampler": "random", "removable_layers": [2, 3]}, "encoder": {"model": str(encoder)}}
    file = write_study(tmp_path / "s", toy, **settings)
    launch(file, trials=1)
    old, old_states = weights_digest(load_file(encoder / "model.safetensors")), states_of(file, "dev")
    change_one_tensor(encoder / "model.safetensors")
    new = weights_digest(load_file(encoder / "model.safetensors"))

    done = command("launch", file, "--trials", "2")
    assert done.errors[0] == f"models.encoder: the study has {old!r}, this worker {new!r}"
    assert len(done.errors) == 2, "the LLM is the same"
    assert len(read_records(file.parent / "run" / "records")) == 1

    done = command("launch", file, "--trials", "2", "--allow-changes")
    assert done.code == 0, done.err
    elsewhere = write_study(tmp_path / "elsewhere" / "s", toy, **settings)
    for split in ("train", "dev"):
        assert torch.equal(states_of(file, split), states_of(elsewhere, split)), "those of the new weights"
    assert not torch.equal(states_of(file, "dev"), old_states)
    llm = weights_digest(load_file(toy / "llm" / "model.safetensors"))
    first, second = sorted(read_records(file.parent / "run" / "records"), key=lambda r: r.provenance["date"] + r.candidate.key)
    assert first.provenance["models"] == {"encoder": old, "llm": llm}
    assert second.provenance["models"] == {"encoder": new, "llm": llm}
    for record in (first, second):
        assert datetime.fromisoformat(record.provenance["date"]).tzinfo is not None


# Trials of other programs


def add_foreign_trials(stored: StoredStudy) -> None:
    """Complete trials that are better than any candidate, a failed one, and one that runs."""
    study = optuna.load_study(study_name=stored.name, storage=stored.storage)  # with a sampler of its own
    unrelated = {"params": {"x": 0.5}, "distributions": {"x": FloatDistribution(0, 1)}}
    study.add_trial(create_trial(values=[0.0, 1.0], **unrelated))
    study.add_trial(create_trial(values=[0.0, 1.0], user_attrs={"rung_best": 3, "rung_1": {"wer": 0.0}}, **unrelated))
    study.add_trial(create_trial(values=[0.0, 1.0]))
    study.add_trial(create_trial(state=TrialState.FAIL, **unrelated))
    study.ask().suggest_float("x", 0, 1)


def foreign_states(stored: StoredStudy) -> list[TrialState]:
    return [t.state for t in stored.trials() if candidate_key(t) is None]


@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize("sampler", ["layer-sets", "tpe", "nsga2", "gp", "grid"])
def test_trials_of_other_programs_are_left_alone(config: StudyConfig, sampler: str, database: bool) -> None:
    url = f"sqlite:///{config.folder}/study.db" if database else None
    storage = open_storage(url, config.run_folder)
    other = optuna.create_study(study_name="another", storage=storage)
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    ours, again = open_study(config, storage, space(), sampler_of_name(sampler)), False
    add_foreign_trials(ours)
    before = foreign_states(ours)

    def evaluate(trial: WorkerTrial) -> RunRecord:
        state = "failed" if trial.key == "full" and not again else "complete"
        return landscape(trial.candidate).model_copy(update={"state": state, "reason": "because"})

    assert status(config.source, url)["front"] == []
    assert status(config.source, url)["settled"] == 0
    assert abort(config.source, url) == 0, "the running one is no worker's"
    ours.set_attr("aborted", False)
    run_loop(ours, rules(config, 12), evaluate)
    assert retry(config.source, url) == ["full"]
    again = True
    run_loop(ours, rules(config, 12), evaluate)
    assert len(complete(ours)) == len(set(complete(ours))) == finished(ours) == 12
    assert len(finished_at(ours, 1)) == 12, "no rung compares with the others"

    key = next(c.key for c in space().everything() if c.key not in complete(ours))
    ours.study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"candidate": key, "ended": "failed"}))
    assert retry(config.source, url) == [key], "its parameters are known, although it has none and others have"
    run_loop(ours, rules(config, 13), evaluate)
    assert key in complete(ours)

    now = [0.0]
    monitor = LeaseMonitor(lambda: now[0])
    for _ in range(4):
        assert release_stale(ours, monitor) == []
        now[0] += LEASE_SECONDS / 3
    found = status(config.source, url)
    assert len(found["front"]) > 1
    assert {row["candidate"] for row in found["front"]} <= set(complete(ours))
    assert foreign_states(ours) == before
    assert len(other.get_trials(states=[TrialState.COMPLETE])) == 3


def sampler_of_name(name: str) -> CandidateSampler:
    if name == "layer-sets":
        return LayerSetSampler(space(), params_of, startup_trials=2)
    return optuna_sampler(name, space(), 0, 2)


def test_commands_pass_over_trials_of_other_programs(study: Path, tmp_path: Path) -> None:
    add_foreign_trials(stored(study))
    before = foreign_states(stored(study))
    done = command("launch", study, "--trials", "5")
    assert done.code == 0, done.err
    assert len(read_records(study.parent / "run" / "records")) == 5
    assert foreign_states(stored(study)) == before
    for words in (["status", study], ["status", study, "--json"], ["retry", study], ["report", study]):
        done = command(*words)
        assert (done.code, "None" in done.out) == (0, False), done
    number = before.index(TrialState.RUNNING) + 4  # the first four are ours
    assert command("export", study, "--trial", number, "--out", tmp_path / "out").error == (
        f"--trial: must be a trial that has a candidate, got {number}: `prunesearch status` lists the front"
    )


BAD_KEYS = {
    "../../x": "a candidate's key must look like full, minus-3-4, minus-3+lora8 or full@1, got '../../x'",
    "/tmp/x": "a candidate's key must look like full, minus-3-4, minus-3+lora8 or full@1, got '/tmp/x'",
    "minus-3-2": "write 'minus-2-3'",
    "full+lora0": "write 'full'",
}


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("key", BAD_KEYS)
@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL])
def test_a_trial_whose_candidate_is_no_key_is_named_and_nothing_is_written(
    key: str, state: TrialState, study: Path, tmp_path: Path
) -> None:
    values = [0.0, 1.0] if state == TrialState.COMPLETE else None
    attrs = {"candidate": key, "ended": "handed back"}
    stored(study).study.add_trial(create_trial(state=state, values=values, user_attrs=attrs))
    before = files_of(tmp_path)
    out = tmp_path / "out"
    commands = {
        "status": ["status", study],
        "retry": ["retry", study],
        "launch": ["launch", study, "--trials", "6"],
        "export": ["export", study, "--trial", "4", "--out", out],
    }
    for words in commands.values():
        error = command(*words).error
        assert error.startswith("trial 4, attribute candidate: "), error
        assert BAD_KEYS[key] in error
        assert error.endswith("correct or remove trial 4 in the study's storage")
    assert not out.exists()
    changed = {
        p.relative_to(study.parent / "run").parts[0] for p, content in files_of(tmp_path).items() if before.get(p) != content
    }
    assert changed <= {"journal.log", "corpus"}, "the study's own budget, and nothing of a candidate"


# Damaged records


def with_schema(version: int) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(b'"schema_version": 1', f'"schema_version": {version}'.encode())


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "of a later version": (with_schema(99), "schema_version must be 1, got 99: update prunesearch to read it"),
    "cut off": (lambda content: content[: len(content) // 2], "the record is cut off, or is not JSON"),
    "empty": (lambda content: b"", "the record is empty"),
    "of another candidate": (lambda content: content.replace(b'"lora_rank": 0', b'"lora_rank": 2'), "the folder must be named"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_cannot_be_read_is_named_before_anything_is_trained(damage: str, study: Path) -> None:
    file, (change, rule) = study.parent / "run" / "records" / "full" / "record.json", DAMAGES[damage]
    before = file.read_bytes()
    file.write_bytes(change(before))
    assert file.read_bytes() != before
    for words in (["report", study], ["launch", study, "--trials", "5"], ["export", study, "--out", study.parent / "out"]):
        assert command(*words).error.startswith(f"{file}: {rule}")
    assert len(stored(study).trials()) == 4
    assert command("status", study).code == 0, "it reads the storage only"
    file.write_bytes(before)
    assert command("launch", study, "--trials", "5").code == 0


@pytest.mark.parametrize("split", ["dev", "test"])
def test_decoded_utterances_that_are_cut_off_are_named(split: str, study: Path) -> None:
    records = study.parent / "run" / "records"
    if split == "dev":  # as before test was decoded
        for record in read_records(records):
            write_record(records, record.model_copy(update={"test": None}))
            (records / record.candidate.key / "test.jsonl").unlink()
    file = records / "full" / f"{split}.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    lines = content.count(b"\n")
    assert command("report", study).error.startswith(f"{file}: the file is cut off in line {lines}: restore the file")
    file.write_bytes(content)
    assert command("report", study).code == 0
