"""Workers without a common folder: what they share through an artifact store, and what only one of them does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna

from prunesearch.commands.launch import launch
from prunesearch.study.interrupt import Interrupt
from prunesearch.workers.artifacts import ArtifactMirror
from prunesearch.workers.exclusive import ExclusiveTask, run_exclusively
from prunesearch.workers.storage import open_storage
from tests.conftest import write_study
from tests.servers import until
from tests.test_launch import ROOT, outcomes
from tests.workers_helpers import FORK


def test_workers_without_a_common_folder_share_anchor_checkpoints_and_records(toy: Path, tmp_path: Path) -> None:
    storage = {"url": f"journal://{tmp_path}/journal.log", "artifacts": str(tmp_path / "artifacts")}
    settings = {"search": {"trials": 7}, "training": {"steps": 30}}
    here, there = (write_study(tmp_path / name / "s", toy, storage=storage, **settings) for name in ("here", "there"))
    alone = write_study(tmp_path / "alone" / "s", toy, **settings)
    launch(here, trials=1)
    optuna.load_study(study_name="s", storage=open_storage(storage["url"], tmp_path)).set_user_attr("trials", 7)
    command = [sys.executable, "cli.py", "worker", str(there)]
    elsewhere = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list((there.parent / "run" / "records").glob("*/checkpoint.pt")) or elsewhere.poll() is not None, "work")
    launch(here)
    _, told = elsewhere.communicate(timeout=120)
    assert elsewhere.returncode == 0, told
    launch(alone, trials=7)
    found, theirs, expected = ({k: {**v, "test": 0} for k, v in outcomes(f).items()} for f in (here, there, alone))
    assert len(found) == 7
    assert found == theirs
    both = found.keys() & expected.keys()  # together, they propose otherwise than one alone
    assert len(both) >= 4
    assert all(found[key] == expected[key] for key in both)
    anchors = [(f.parent / "run" / "anchor" / "projector.safetensors").stat().st_mtime_ns for f in (here, there)]
    assert anchors[0] < anchors[1], "the second one was fetched"


def test_half_a_stored_file_counts_as_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    mine, theirs = (ArtifactMirror.open(str(tmp_path / "artifacts"), "s", tmp_path / name) for name in ("a", "b"))
    (tmp_path / "a" / "x.bin").write_bytes(b"0123456789")
    mine.put("x.bin")
    (stored,) = (tmp_path / "artifacts").iterdir()
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1])
    assert not theirs.fetch("x.bin")
    stored.write_bytes(whole)
    assert theirs.fetch("x.bin")
    assert (tmp_path / "b" / "x.bin").read_bytes() == b"0123456789"


def test_one_of_many_workers_does_the_task_and_if_it_dies_another_one(tmp_path: Path) -> None:
    url, log, done = f"journal://{tmp_path}/journal.log", tmp_path / "log", tmp_path / "done"

    def act() -> None:
        with log.open("a") as file:
            file.write("x")
        if len(log.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        done.touch()

    def one() -> None:
        task = ExclusiveTask("s (anchor)", done.exists, lambda confirm: act())
        run_exclusively(open_storage(url, tmp_path), task, Interrupt())

    processes = [FORK.Process(target=one) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(p.exitcode or 0 for p in processes) == [-signal.SIGKILL, 0, 0, 0]
    assert log.read_text() == "xx"
