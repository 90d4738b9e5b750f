"""Workers as a SLURM job array, with programs in the place of SLURM's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prunesearch.commands import status as control
from prunesearch.commands.slurm import submit
from prunesearch.study.errors import StudyError
from prunesearch.study.record import read_records
from tests.conftest import write_study
from tests.servers import until
from tests.test_launch import ROOT
from tests.workers_helpers import command


def put_program(folder: Path, name: str, answer: str = "") -> Path:
    """An executable that logs its arguments and prints an answer; returns the log."""
    log = folder / f"{name}.log"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho "$@" >> "{log}"\necho "{answer}"\n')
    (folder / name).chmod(0o755)
    return log


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with SLURM's programs, which only log their arguments."""
    folder = tmp_path / "bin"
    put_program(folder, "srun")
    put_program(folder, "sbatch", "Submitted batch job 42")
    put_program(folder, "scontrol")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_the_jobs_of_an_array_work_on_the_study(toy: Path, tmp_path: Path) -> None:
    """As SLURM would run them: submitit's local executor starts the same jobs here."""
    file = write_study(tmp_path / "s", toy)
    jobs = submit(file, 2, trials=5, cluster="local")
    assert len(jobs) == 2
    until(lambda: control.status(file)["settled"] == 5, "five candidates", 120)
    assert {r.state for r in read_records(file.parent / "run" / "records")} == {"complete"}


def test_an_array_is_submitted_with_the_options_that_its_jobs_need(toy: Path, tmp_path: Path, slurm: Path) -> None:
    file = write_study(tmp_path / "s", toy)
    options = ["--slurm", "partition=gpu", "--slurm", "gpus-per-node=1", "--slurm", "time=240"]
    done = command("launch", file, "--launcher", "slurm", "--workers", 3, "--trials", 9, *options)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("submitted 3 jobs: 42_0, 42_1, 42_2; to see the progress: prunesearch status")
    (script,) = (slurm / "sbatch.log").read_text().split()
    asked = {line.removeprefix("#SBATCH --") for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "array=0-2%3",
        "job-name=prunesearch-s",
        "partition=gpu",
        "gpus-per-node=1",
        "time=240",
        "requeue",
        "signal=USR1@120",
    }
    found = control.status(file)
    assert (found["trials"], found["settled"], found["running"]) == (9, 0, [])


def test_submitting_again_does_not_lower_the_budget(toy: Path, tmp_path: Path, slurm: Path) -> None:
    file = write_study(tmp_path / "s", toy)
    for trials, budget in ((9, 9), (None, 9), (7, 7)):
        submit(file, 1, trials)
        assert control.status(file)["trials"] == budget


def test_without_slurm_it_is_one_line(toy: Path, tmp_path: Path) -> None:
    error = command("launch", write_study(tmp_path / "s", toy), "--launcher", "slurm").error
    assert error.startswith("--launcher slurm: ")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:geheim@host/db",
        "mysql+pymysql://me@host/db?password=geheim",
        "postgresql+psycopg://me:geheim${X}@host/db",
    ],
)
@pytest.mark.parametrize("in_the_file", [False, True])
def test_a_url_with_a_password_is_refused(url: str, in_the_file: bool, toy: Path, tmp_path: Path, slurm: Path) -> None:
    file = write_study(tmp_path / "s", toy, **({"storage": {"url": url}} if in_the_file else {}))
    with pytest.raises(StudyError, match="would hold the password: write") as caught:
        submit(file, 2, storage=None if in_the_file else url)
    assert "geheim" not in str(caught.value)
    assert not (file.parent / "run").exists()
    assert not (slurm / "sbatch.log").exists()


def test_the_files_of_a_job_hold_the_name_of_a_variable_and_not_its_value(
    toy: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_DATABASE", f"sqlite:///{tmp_path}/geheim.db")
    file = write_study(tmp_path / "s", toy)
    submit(file, 2, storage="${STUDY_DATABASE}")
    assert (tmp_path / "geheim.db").exists()
    written = [p.read_bytes() for p in (file.parent / "run" / "slurm").iterdir()]
    assert any(b"${STUDY_DATABASE}" in content for content in written)
    assert not any(b"geheim" in content for content in written)


JOB = "import sys; from pathlib import Path; from prunesearch.commands.slurm import Job; Job(Path(sys.argv[1]), None, False)()"


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, ["requeue 42_1"]), (signal.SIGTERM, [])])
def test_a_job_out_of_time_is_requeued_and_a_cancelled_one_is_not(
    sent: signal.Signals, requeued: list[str], toy: Path, tmp_path: Path, slurm: Path
) -> None:
    settings = {"training": {"steps": 4000, "init": "scratch"}, "search": {"sampler": "random"}}
    file = write_study(tmp_path / "s", toy, **settings)
    submit(file, 1)
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(file)],
        cwd=ROOT, env={**os.environ, "SLURM_JOB_ID": "42_1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    records = file.parent / "run" / "records"
    until(lambda: list(records.glob("*/curve.jsonl")) or job.poll() is not None, "a training")
    job.send_signal(sent)
    _, told = job.communicate(timeout=60)
    assert job.returncode == 0, told
    log = slurm / "scontrol.log"
    assert (log.read_text().splitlines() if log.exists() else []) == requeued
    found = control.status(file)
    assert found["ended"] == {"handed back": 1}
    assert found["running"] == []
    assert list(records.glob("*/checkpoint.pt")), "the requeued job goes on from there"
