"""The command line itself: help, JSON on stdout, error messages and exit codes."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import prunesearch.commands.launch
import prunesearch.commands.measure
import prunesearch.commands.status
import prunesearch.commands.worker
from prunesearch.cli.app import app, main
from prunesearch.cli.output import print_json
from prunesearch.cli.progress import ProgressDisplay
from prunesearch.commands.export import export
from prunesearch.commands.launch import launch
from prunesearch.study.candidate import BASELINE_NAMES
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Interrupted
from prunesearch.study.record import read_records
from tests.conftest import write_study
from tests.report_records import give_to_study

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process. Captures file descriptors, so that output of libraries counts, too."""

    def run_command(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["prunesearch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Done(code, *capfd.readouterr())

    return run_command


def all_commands() -> dict[str, Any]:
    """Every command by its words, such as `storage upgrade`."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {word}": leaf for word, leaf in inner.items()} if inner else {name: command}
    return found


@pytest.fixture(scope="module")
def launched(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_study(tmp_path_factory.mktemp("launched") / "s", toy)
    launch(file, trials=4)
    return file


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "optuna", "pydantic")
    probe = f"import sys, prunesearch.cli.app; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"


def test_every_command_and_every_shown_option_has_a_help_text() -> None:
    for name, command in all_commands().items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "hidden", False) or parameter.help, f"{name}: {parameter.name}"


@pytest.mark.parametrize("command", ["launch", "worker", "measure"])
def test_help_shows_new_option_names_and_hides_old_ones(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run(command, "--help")
    new, old = ("--runs", "--turns") if command == "measure" else ("--allow-changes", "--adopt")
    assert done.code == 0
    assert new in done.out
    assert old not in done.out


@pytest.mark.parametrize(
    ("command", "module", "function", "new", "old"),
    [
        ("launch", prunesearch.commands.launch, "launch", ["--allow-changes"], ["--adopt"]),
        ("worker", prunesearch.commands.worker, "join", ["--allow-changes"], ["--adopt"]),
        ("measure", prunesearch.commands.measure, "measure", ["--runs", "3"], ["--turns", "3"]),
    ],
)
def test_old_option_names_do_what_the_new_ones_do(
    command: str, module: Any, function: str, new: list[str], old: list[str],
    run: Run, launched: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    received: list[list[Any]] = []

    def stub(*arguments: Any) -> Any:
        received.append([a for a in arguments if not isinstance(a, ProgressDisplay)])
        return load_study(launched)

    monkeypatch.setattr(module, function, stub)
    monkeypatch.setattr("prunesearch.cli.tables.measurement_table", lambda found: "")
    assert all(run(command, launched, *options).code == 0 for options in (new, old, []))
    assert received[0] == received[1] != received[2]


JSON_COMMANDS = {
    "plan": [],
    "scan": ["--utterances", "2"],
    "status": [],
    "report": [],
    "measure": ["--candidate", "full", "--runs", "1", "--utterances", "1"],
    "clean": ["--dry-run"],
}


def test_json_is_the_only_output_on_stdout(run: Run, launched: Path, toy: Path, tmp_path: Path) -> None:
    printed = {}
    for command, options in JSON_COMMANDS.items():
        done = run(command, launched, *options, "--json")
        assert done.code == 0, done.err
        printed[command] = json.loads(done.out)
        if command == "scan":
            assert "scan.html" in done.err
    export(launched, tmp_path / "exported", "full")
    done = run("evaluate", tmp_path / "exported", "--data", toy / "dev.jsonl", "--json")
    printed["evaluate"] = json.loads(done.out)
    with_json = {name for name, command in all_commands().items() if any("--json" in p.opts for p in command.params)}
    assert printed.keys() == with_json
    assert all(isinstance(value, dict) and value for value in printed.values())


def test_json_of_several_studies_is_one_value(run: Run, launched: Path, tmp_path: Path) -> None:
    shutil.copytree(launched.parent, tmp_path / "other")
    give_to_study(tmp_path / "other" / "run" / "records", "other")
    shutil.rmtree(tmp_path / "other" / "run" / "scan")
    done = run("report", launched, tmp_path / "other", "--out", tmp_path / "overlay", "--json")
    assert done.code == 0, done.err
    assert [found["study"] for found in json.loads(done.out)] == ["s", "other"]


def test_json_of_plan_and_report_has_the_documented_keys(run: Run, launched: Path) -> None:
    planned = json.loads(run("plan", launched, "--json").out)
    assert planned["named"]["unpruned"]["lora"] == 0
    reported = json.loads(run("report", launched, "--json").out)
    assert reported.keys() >= {"study", "baselines", "front", "dominating"}
    assert reported["baselines"].keys() == set(BASELINE_NAMES)
    wanted = {
        "removed_layers", "lora_rank", "dev_wer", "test_wer", "encoder_params", "projector_params", "lora_params",
        "llm_params", "speech_params", "substitutions", "deletions", "insertions", "reference_words", "train_seconds",
    }  # fmt: skip
    assert all(record.keys() >= wanted for record in [*reported["front"], *reported["baselines"].values()])


def test_nan_and_infinity_are_printed_as_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [1.5, float("-inf")], "c": (None, "x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [None, "x"]}


def test_validate_prints_five_errors_on_five_lines_and_exits_with_2(run: Run, toy: Path, tmp_path: Path) -> None:
    file = write_study(
        tmp_path, toy, llm={"promt": "x"}, data={"dev": "nowhere.jsonl"}, training={"rungs": [1.5], "steps": "8"},
        search={"removable_layers": [9]},
    )  # fmt: skip
    done = run("validate", file)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 5)


@pytest.mark.parametrize("command", ["status", "report", "retry", "abort"])
def test_status_of_an_unlaunched_study_is_one_error_line(run: Run, toy: Path, tmp_path: Path, command: str) -> None:
    done = run(command, write_study(tmp_path, toy))
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "`prunesearch launch" in done.err


def test_every_command_names_a_missing_study_file(run: Run, tmp_path: Path) -> None:
    for command, options in all_commands().items():
        if any(parameter.name in ("study", "studies") for parameter in options.params):
            out = ["--out", tmp_path / "out"] if command == "export" else []
            done = run(*command.split(), tmp_path / "nothing", *out)
            assert (done.code, len(done.err.splitlines())) == (2, 1), (command, done.err)
            assert "there is no study file" in done.err


def test_a_broken_record_is_one_line_on_stderr(run: Run, launched: Path) -> None:
    record = load_study(launched).run_folder / "records" / "full" / "record.json"
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    done = run("report", launched)
    record.write_bytes(whole)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert str(record) in done.err
    assert "cut off" in done.err


def test_init_writes_a_file_that_validate_resolves(run: Run, toy: Path, tmp_path: Path) -> None:
    assert run("init", "mine", "--in", tmp_path).code == 0
    again = run("init", "mine", "--in", tmp_path)
    assert (again.code, "exists already" in again.err) == (2, True)
    resolved = json.loads(run("validate", write_study(tmp_path / "s", toy), "--resolved").out)
    assert resolved["training"]["warmup"] == 0.05


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StudyError(["one", "two"]), 2, "one\ntwo\n"),
        (Interrupted(signal.SIGTERM), 128 + signal.SIGTERM, "interrupted: run the same command again to continue\n"),
        (Interrupted(), 130, "interrupted: run the same command again to continue\n"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to continue\n"),
    ],
)
def test_an_error_sets_the_exit_code(
    run: Run, launched: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def failing(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(prunesearch.commands.status, "status", failing)
    done = run("status", launched)
    assert (done.code, done.out, done.err.lstrip("\n")) == (code, "", message)


def test_a_bug_keeps_its_traceback(launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(prunesearch.commands.status, "status", failing)
    monkeypatch.setattr(sys, "argv", ["prunesearch", "status", str(launched)])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_progress_lines_stay_whole_and_keep_brackets(launched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_records(load_study(launched).run_folder / "records")[0]
    reason = "[Errno 28] no space left on device, " + "and a long explanation " * 20
    failed = record.model_copy(update={"state": "failed", "reason": reason.strip(), "dev": None})
    with ProgressDisplay() as display:
        display.note("a [note] in brackets")
        display.progress("anchor, loss 2.00", 1, 8)
        display.progress("anchor, loss 1.00", 2, 8)
        display.finished(failed, 3, 4)
    printed = capsys.readouterr()
    lines = [re.sub(r"^ +0:\d\d ", "", line) for line in printed.err.splitlines()]
    assert printed.out == ""
    assert lines[:2] == ["a [note] in brackets", "anchor, loss 2.00 (1/8)"], "the same activity is not repeated at once"
    assert len(lines) == 3
    assert lines[2].endswith(reason.strip())
