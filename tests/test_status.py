"""Commands that look at a study and steer it: status, retry, abort, wherever its storage is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from optuna.trial import TrialState, create_trial

from prunesearch.commands import status as control
from prunesearch.commands.clean import clean
from prunesearch.commands.confirm import confirm
from prunesearch.commands.launch import launch
from prunesearch.report.confirmation import confirmation_file
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Interrupt, Interrupted
from prunesearch.study.record import RunRecord, read_records
from prunesearch.workers import lease as leases
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_study import open_existing_study
from prunesearch.workers.trial import WorkerTrial
from tests.conftest import write_study
from tests.servers import until
from tests.test_search import landscape, rules
from tests.workers_helpers import command, complete, finished, opened

QUICK: dict[str, Any] = {"training": {"steps": 2, "init": "scratch"}, "search": {"sampler": "random"}}


def test_an_interrupt_hands_the_candidate_back_and_abort_stops_all_workers(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    study, stop = opened(config, None), Interrupt()

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full+lora8":
            assert control.abort(config.source) == 1
            until(lambda: stop.requested, "word of it")
            stop.check()
        return landscape(trial.candidate)

    with pytest.raises(Interrupted):
        run_loop(study, rules(config, 9), evaluate, stop)
    assert control.status(config.source)["aborted"]
    assert finished(study) == 1
    with pytest.raises(Interrupted):  # until it is launched again, nobody goes on
        run_loop(study, rules(config, 9), evaluate)
    assert finished(study) == 1


def test_clean_removes_what_is_made_again_but_not_under_a_workers_feet(config: StudyConfig) -> None:
    study, refused = opened(config, None), []
    run = config.run_folder
    for folder in (run / "features", run / "scratch" / "deep", run / "records" / "full", run / "anchor"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"12345")
    (run / "features" / "dev.lock").touch()

    def evaluate(trial: WorkerTrial) -> RunRecord:
        with pytest.raises(
            StudyError, match=r"must have no workers at work, got 1: .* \(process \d+\); wait, or stop them"
        ) as caught:
            clean(config.source)
        refused.append(caught.value)
        return landscape(trial.candidate)

    run_loop(study, rules(config, 2), evaluate)
    assert len(refused) == 2
    sizes = {run / "features": 5, run / "scratch": 5}
    assert clean(config.source, dry_run=True) == sizes
    assert (run / "features" / "file").exists()
    with FileLock(run / "features" / "dev.lock"), pytest.raises(StudyError, match=r"another command is at work .*dev\.lock"):
        clean(config.source)
    assert clean(config.source) == sizes
    assert sorted(p.name for p in run.rglob("*") if p.is_file() and "journal" not in p.name and p.suffix != ".json") == [
        *("dev.lock", "file", "file", "test.lock")
    ], "of records and anchor"
    assert clean(config.source) == {}
    assert control.status(config.source)["settled"] == 2


def test_failed_candidates_can_be_evaluated_again(config: StudyConfig) -> None:
    study, good = opened(config, None), []

    def evaluate(trial: WorkerTrial) -> RunRecord:
        state = "complete" if good or trial.key != "full" else "failed"
        return landscape(trial.candidate).model_copy(update={"state": state, "reason": "because"})

    def go() -> None:
        run_loop(study, rules(config, 5), evaluate)

    go()
    assert control.retry(config.source) == ["full"]
    assert control.retry(config.source) == [], "it waits already"
    assert finished(study) == 4
    good.append(True)
    go()
    assert finished(study) == 5
    assert complete(study).count("full") == 1


def test_a_retry_that_is_interrupted_is_still_pending(config: StudyConfig) -> None:
    study, state = opened(config, None), ["fail"]

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full" and state[0] == "stop":
            state[0] = "good"
            raise Interrupted
        bad = trial.key == "full" and state[0] == "fail"
        return landscape(trial.candidate).model_copy(update={"state": "failed" if bad else "complete", "reason": "because"})

    def go() -> None:
        run_loop(study, rules(config, 5), evaluate)

    go()
    control.retry(config.source)
    state[0] = "stop"
    with pytest.raises(Interrupted):
        go()
    go()
    assert complete(study).count("full") == 1
    assert finished(study) == 5


# Wherever launch put it

PLACES = {
    "journal": "journal://${WHERE}/of a study/journal.log",
    "sqlite": "sqlite:///${WHERE}/study.db",
    "one variable": "${WHOLE_URL}",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("in_the_file", [True, False])
def test_commands_find_a_study_wherever_launch_put_it(
    place: str, in_the_file: bool, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched in one folder, looked at from another one that shares storage and artifacts only."""
    (tmp_path / "a place").mkdir()
    monkeypatch.setenv("WHERE", str(tmp_path / "a place"))
    monkeypatch.setenv("WHOLE_URL", f"sqlite:///{tmp_path}/a place/whole.db")
    storage = {"artifacts": "${WHERE}/artifacts"} | ({"url": PLACES[place]} if in_the_file else {})
    settings: dict[str, Any] = {**QUICK, "storage": storage}
    launched, elsewhere = (write_study(tmp_path / name / "s", toy, **settings) for name in ("launched", "elsewhere"))
    option = [] if in_the_file else ["--storage", PLACES[place]]

    done = command("launch", launched, "--trials", 4, *option)
    assert done.code == 0, done.err
    stored = open_existing_study(load_study(launched), None if in_the_file else PLACES[place])
    assert finished(stored) == 4
    assert not (launched.parent / "run" / "journal.log").exists()
    stored.study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"candidate": "minus-1", "ended": "failed"}))

    found = json.loads(command("status", elsewhere, "--json", *option).out)
    assert (found["settled"], found["trials"]) == (5, 4)
    assert command("retry", elsewhere, *option).out == "re-queued: minus-1\n"
    assert command("retry", elsewhere, *option).out == "no candidate has failed\n"
    assert command("abort", elsewhere, *option).code == 0
    assert stored.attrs["aborted"]

    out = tmp_path / "out"
    assert command("export", elsewhere, "--trial", 2, "--out", out, *option).code == 0
    assert read_record_of(out) == stored.trials()[2].user_attrs["candidate"]
    measured = json.loads(command("measure", elsewhere, "--runs", 1, "--utterances", 2, "--json", *option).out)
    assert len(measured["systems"]) == 4
    done = command("confirm", elsewhere, "--seeds", 1, "--steps", 2, *option)
    assert done.code == 0, done.err
    confirmation = load_study(confirmation_file(load_study(elsewhere)))
    confirmed = open_existing_study(confirmation, None if in_the_file else PLACES[place])
    assert finished(confirmed) == len(complete(confirmed)) >= 4
    assert not (confirmation.run_folder / "journal.log").exists()


def read_record_of(exported: Path) -> str:
    return RunRecord.model_validate_json((exported / "record.json").read_bytes()).candidate.key


@pytest.mark.parametrize("verb", ["status", "retry", "abort", "worker", "confirm", "measure", "export", "report"])
def test_a_study_that_was_not_launched_is_one_line_and_nothing_is_created(verb: str, toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, **QUICK, storage={"url": f"sqlite:///{tmp_path}/nowhere.db"})
    arguments = ["--out", tmp_path / "out"] if verb == "export" else []
    assert "`prunesearch launch" in command(verb, file, *arguments).error
    if verb != "worker":
        assert {p.name for p in tmp_path.iterdir()} == {"s"}
        assert not (file.parent / "run").exists()


# A confirmation starts where it is told to


@pytest.fixture(scope="module")
def anchored(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search that started from an anchor."""
    settings = {"training": {"steps": 2}, "anchor": {"steps": 8}, "search": {"sampler": "random", "trials": 4}}
    file = write_study(tmp_path_factory.mktemp("anchored") / "s", toy, **settings)
    launch(file)
    return file


def first_losses(run: Path) -> dict[str, float]:
    return {r.candidate.key: r.losses[0] for r in read_records(run / "records")}


@pytest.mark.parametrize("init", [None, "anchor", "scratch"])
def test_a_confirmation_starts_from_the_searchs_anchor_or_from_scratch(
    init: str | None, anchored: Path, tmp_path: Path, toy: Path
) -> None:
    shutil.copytree(anchored.parent, tmp_path / "s")
    study = tmp_path / "s" / "study.toml"
    done = command("confirm", study, "--seeds", 1, "--steps", 3, *(["--init", init] if init else []))
    assert done.code == 0, done.err
    confirmation = load_study(confirmation_file(load_study(study)))
    assert confirmation.training.init == (init or "anchor")
    stored, search = open_existing_study(confirmation), open_existing_study(load_study(study))
    assert len(complete(stored)) >= 4
    assert stored.attrs.get("anchor") == (None if init == "scratch" else search.attrs["anchor"])
    assert (confirmation.run_folder / "anchor").exists() == (init != "scratch")

    # the same training, with projectors of which it is known where they start
    begin = {"init": "scratch" if init == "scratch" else "anchor", "steps": 3}
    alike = write_study(tmp_path / "alike" / "s", toy, training=begin, anchor={"steps": 8}, search={"sampler": "random"})
    launch(alike, trials=4)
    losses = first_losses(confirmation.run_folder)
    assert losses == pytest.approx({key: first_losses(alike.parent / "run")[key] for key in losses})


def test_a_confirmation_elsewhere_gets_the_searchs_anchor_from_the_artifacts(toy: Path, tmp_path: Path) -> None:
    storage = {"url": f"journal://{tmp_path}/journal.log", "artifacts": str(tmp_path / "artifacts")}
    settings: dict[str, Any] = {"training": {"steps": 2}, "anchor": {"steps": 8}, "search": {"sampler": "random", "trials": 4}}
    here, there = (write_study(tmp_path / name / "s", toy, **settings, storage=storage) for name in ("here", "there"))
    launch(here)
    confirm(there, seeds=1, steps=2)
    logs = [tmp_path / "here/s/run/anchor/anchor.json", tmp_path / "there/s/run/confirm/run/anchor/anchor.json"]
    assert logs[0].read_bytes() == logs[1].read_bytes(), "not trained again: no two trainings take as many seconds"
    stored = {p.name for p in (tmp_path / "artifacts").iterdir()}
    assert "s-confirm--anchor--projector.safetensors" in stored, "for the confirmation's other workers"
