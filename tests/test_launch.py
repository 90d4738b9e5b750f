"""The whole way on toy models: command line, kills, workers, report."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from prunesearch.commands.confirm import confirm
from prunesearch.commands.launch import launch
from prunesearch.commands.plan import plan
from prunesearch.commands.status import status
from prunesearch.model.skeleton import params_of_candidates
from prunesearch.report import write_report
from prunesearch.report.confirmation import compare_with_confirmation, confirmation_file
from prunesearch.study.candidate import BASELINE_NAMES, Candidate, baselines
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.front import pareto_front
from prunesearch.study.importance import read_scan
from prunesearch.study.record import RunRecord, read_records
from prunesearch.training.context import TrainingContext
from prunesearch.training.recipe import train_and_score
from prunesearch.workers.storage import open_storage
from tests.conftest import write_study

ROOT = Path(__file__).parents[1]


def cli(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "cli.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **kwargs)


def outcomes(file: Path) -> dict[str, dict[str, Any]]:
    config = load_study(file)
    return {r.candidate.key: {**r.outcome(), "study": ""} for r in read_records(config.run_folder / "records")}


def complete_trials(file: Path) -> list[str]:
    config = load_study(file)
    study = optuna.load_study(study_name=config.name, storage=open_storage(None, config.run_folder))
    return [t.user_attrs["candidate"] for t in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])]


@pytest.fixture(scope="module")
def calm(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted study."""
    file = write_study(tmp_path_factory.mktemp("calm") / "s", toy)
    launch(file)
    return file


def test_plan_counts_equal_the_built_models_parameters(calm: Path) -> None:
    config = load_study(calm)
    count = params_of_candidates(config)
    records = read_records(config.run_folder / "records")
    assert len(records) == 6
    assert all(count(r.candidate) == r.parameters for r in records)
    made = plan(config)
    assert made.named["unpruned"].encoder - made.named["top2"].encoder == 2 * made.layer_params
    assert made.candidates == (1 + 4 + 6) * 3


def test_test_is_decoded_for_the_baselines_and_the_front_only(calm: Path) -> None:
    config = load_study(calm)
    records = read_records(config.run_folder / "records")
    assert {r.name for r in records} == {*BASELINE_NAMES, None}
    comparison = write_report(config)
    counted = {r.candidate for r in (*comparison.front, *comparison.baselines.values())}
    assert {r.candidate for r in records if r.test is not None} == counted
    written = {p.name for p in (config.run_folder / "report").iterdir()}
    assert written == {
        "front.png",
        "front.svg",
        "front.pdf",
        "report.html",
        "report.csv",
        "report.json",
        "report.md",
        "report.tex",
    }


def test_optuna_trials_equal_the_records(calm: Path) -> None:
    config = load_study(calm)
    study = optuna.load_study(study_name=config.name, storage=open_storage(None, config.run_folder))
    records = {r.candidate.key: r for r in read_records(config.run_folder / "records")}
    assert len(study.trials) == len(records)
    for trial in study.trials:
        record = records[trial.user_attrs["candidate"]]
        assert record.dev is not None
        assert trial.values == [record.dev.errors.wer, record.parameters.speech]


def test_a_second_launch_trains_nothing_and_a_larger_budget_continues(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = outcomes(calm)
    launch(calm)
    assert outcomes(calm) == before
    told: list[RunRecord] = []

    class ProgressListener:
        def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
            pass

        def finished(self, record: RunRecord, finished: int, of: int) -> None:
            told.append(record)

        def note(self, text: str) -> None:
            pass

    launch(calm, trials=7, listener=ProgressListener())
    assert len(told) == 1
    after = outcomes(calm)
    assert {key: after[key]["dev"] for key in before} == {key: before[key]["dev"] for key in before}


def test_three_kills_do_not_change_the_records(toy: Path, calm: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy)
    run = file.parent / "run"
    log = tmp_path / "log.txt"

    def kill_when(condition: Any) -> None:
        with log.open("a") as out:
            process = subprocess.Popen([sys.executable, "cli.py", "launch", str(file)], cwd=ROOT, stderr=out, stdout=out)
        deadline = time.time() + 120
        while not condition() and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, log.read_text()
        assert condition()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    kill_when(lambda: (run / "anchor" / "checkpoint.pt").exists())
    kill_when(lambda: list((run / "records").glob("*/checkpoint.pt")))
    kill_when(lambda: len(list((run / "records").glob("*/record.json"))) >= 4)
    assert cli("launch", file).returncode == 0
    # launched again in the meantime, the calm study may have gone further
    expected = {key: value for key, value in outcomes(calm).items() if key in outcomes(file)}
    assert {k: {**v, "test": None} for k, v in outcomes(file).items()} == {k: {**v, "test": None} for k, v in expected.items()}
    assert len(expected) == 6
    assert complete_trials(file) == complete_trials(calm)[:6]


def test_two_workers_share_a_study(toy: Path, tmp_path: Path, calm: Path) -> None:
    file = write_study(tmp_path / "s", toy)
    done = cli("launch", file, "--workers", "2")
    assert done.returncode == 0, done.stderr
    counts = Counter(complete_trials(file))
    assert sum(counts.values()) == len(counts) == 6
    assert done.stderr.count("dev WER") == 6
    for key in {"full", "minus-2-3"}:
        assert outcomes(file)[key]["dev"] == outcomes(calm)[key]["dev"], "who trains a candidate does not matter"


def test_the_sampler_for_layer_sets_scans_first_and_searches_on(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path, toy, search={"sampler": "layer-sets", "startup_trials": 5, "trials": 8})
    launch(file)
    assert len(complete_trials(file)) == len(set(complete_trials(file))) == 8
    scan = read_scan(tmp_path / "run" / "scan" / "scan.json")
    assert scan is not None
    assert len(scan.sets) == 4 + 6


def test_rungs_are_stored_in_records(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"rungs": [0.5], "rung_confidence": 1.0})
    launch(file)
    assert all([rung.step for rung in r.rungs] == [0, 4] for r in read_records(file.parent / "run" / "records"))


def test_status_before_during_and_after(toy: Path, tmp_path: Path, calm: Path) -> None:
    file = write_study(tmp_path / "s", toy)
    with pytest.raises(StudyError, match="not been launched"):
        status(file)
    found = status(calm)
    assert found["settled"] >= 6
    assert found["running"] == []
    assert found["front"]
    told = json.loads(cli("status", calm, "--json").stdout)
    assert told == found


def test_dropped_lines_of_sources_are_counted(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is no recording")
    lines = [
        (toy / "dev.jsonl").read_text().replace('"dev/', f'"{toy}/dev/'),
        '{"audio": "text.wav", "text": "low", "speaker": "a"}',
    ]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    file = write_study(tmp_path, toy, data={"dev": str(tmp_path / "dev.jsonl"), "skip_unreadable": True})
    done = cli("launch", file, "--trials", "1")
    assert "dev: 1 line left out" in done.stdout
    assert "anchor, loss" in done.stderr, "without a terminal, too, it is said what is being done"
    assert done.stderr.count("of the dev words wrong") == 1, "a tiny random LLM understands little"
    again = cli("launch", file, "--trials", "1")
    assert "of the dev words wrong" not in again.stderr, "it has been said"


def test_a_candidate_is_trained_without_a_launched_study(toy: Path, tmp_path: Path) -> None:
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy)))
    assert train_and_score(context, Candidate((2,), 2)).state == "complete"


def test_two_processes_train_one_candidate_as_one_does(toy: Path, tmp_path: Path) -> None:
    calm = {"projector": {"dropout": 0.0}, "llm": {"lora_dropout": 0.0}}  # each process draws dropout masks of its own
    alone, group = write_study(tmp_path / "alone", toy, **calm), write_study(tmp_path / "group", toy, **calm)
    launch(alone, trials=2)
    # as on two GPUs: with --cpu, accelerate would ask for MPI
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command = [*accelerate, "cli.py", "launch", str(group), "--trials", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    theirs = {r.candidate.key: r for r in read_records(load_study(group).run_folder / "records")}
    ours = {r.candidate.key: r for r in read_records(load_study(alone).run_folder / "records")}
    assert theirs.keys() == ours.keys()
    for key, record in theirs.items():
        assert record.provenance["processes"] == 2
        assert record.losses == pytest.approx(ours[key].losses, abs=1e-4)
        assert record.test is not None


def test_a_confirmation_is_a_study_of_its_own_for_longer_and_from_several_seeds(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy)
    with pytest.raises(StudyError, match="no complete candidate"):
        confirm(file)
    launch(file, trials=6)
    config = load_study(file)
    confirm(file, seeds=2, steps=12)
    confirmed = load_study(confirmation_file(config))
    logs = [(c.run_folder / "anchor" / "anchor.json").read_bytes() for c in (config, confirmed)]
    assert logs[0] == logs[1], "handed on, not trained again: no two trainings take as many seconds"
    records = read_records(confirmed.run_folder / "records")
    front = pareto_front(read_records(config.run_folder / "records"), config.search.params_objective)
    systems = {*baselines(4, 4).values(), *(r.candidate for r in front)}
    assert {r.candidate.system for r in records} == systems
    assert Counter(r.repeat for r in records) == {0: len(systems), 1: len(systems)}
    assert {r.steps for r in records} == {12}
    found = compare_with_confirmation(config)
    assert found is not None
    assert len(found.systems) == len(systems)
    assert all(len(s.long_dev_wers) == 2 for s in found.systems)
    assert found.regret >= 0
    assert status(confirmation_file(config))["settled"] == len(records)
