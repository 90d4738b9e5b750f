"""Workers without a common folder: what they share through an artifact store, and what only one of them does."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore

from prunesearch.commands.launch import launch
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.interrupt import Interrupt, Interrupted
from prunesearch.study.progress import NullListener
from prunesearch.study.record import RunRecord, read_records, record_folder, write_record
from prunesearch.workers import loop, retry
from prunesearch.workers.artifacts import ArtifactMirror, ArtifactStoreUnavailable, checkpoint_path
from prunesearch.workers.exclusive import ExclusiveTask, run_exclusively
from prunesearch.workers.final_test import fetch_records
from prunesearch.workers.loop import run_loop
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import WorkerTrial
from tests.conftest import write_study
from tests.servers import until
from tests.test_launch import ROOT, cli, outcomes
from tests.test_search import landscape, rules
from tests.workers_helpers import FORK, Notes, command, complete, finished, opened


def test_workers_without_a_common_folder_share_anchor_checkpoints_and_records(toy: Path, tmp_path: Path) -> None:
    storage = {"url": f"journal://{tmp_path}/journal.log", "artifacts": str(tmp_path / "artifacts")}
    settings = {"search": {"trials": 7}, "training": {"steps": 30}}
    here, there = (write_study(tmp_path / name / "s", toy, storage=storage, **settings) for name in ("here", "there"))
    alone = write_study(tmp_path / "alone" / "s", toy, **settings)
    launch(here, trials=1)
    optuna.load_study(study_name="s", storage=open_storage(storage["url"], tmp_path)).set_user_attr("trials", 7)
    worker = [sys.executable, "cli.py", "worker", str(there)]
    elsewhere = subprocess.Popen(worker, cwd=ROOT, stderr=subprocess.PIPE, text=True)
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


# S3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 bucket that exists in this process only."""
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        made = boto3.resource("s3").Bucket("studies")
        made.create()
        yield made


URL = "s3://studies/of/mine/"


def keys_in(bucket: Any) -> set[str]:
    return {each.key for each in bucket.objects.all()}


def mirrors(tmp_path: Path) -> list[tuple[Path, ArtifactMirror]]:
    """Two run folders, each with its mirror of the same part of the bucket."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    return [(folder, ArtifactMirror.open(URL, "s", folder)) for folder in folders]


def test_a_file_in_a_bucket_reaches_another_machine_whole_or_not_at_all(bucket: Any, tmp_path: Path) -> None:
    (here, mine), (there, theirs) = mirrors(tmp_path)
    assert not theirs.fetch("anchor/x.bin")
    mine.put("anchor/x.bin")
    assert keys_in(bucket) == set(), "there is no such file yet"
    (here / "anchor").mkdir()
    (here / "anchor" / "x.bin").write_bytes(b"one")
    mine.put("anchor/x.bin")
    assert keys_in(bucket) == {"of/mine/s/anchor--x.bin"}
    assert theirs.fetch("anchor/x.bin")
    assert (there / "anchor" / "x.bin").read_bytes() == b"one"

    (here / "anchor" / "x.bin").write_bytes(b"another")
    os.utime(here / "anchor" / "x.bin", (1, 1))
    mine.put("anchor/x.bin")
    assert theirs.fetch("anchor/x.bin")
    assert (there / "anchor" / "x.bin").read_bytes() == b"one", "a file that is there is kept"
    assert theirs.fetch("anchor/x.bin", replace=True)
    assert (there / "anchor" / "x.bin").read_bytes() == b"another"

    stored = bucket.Object("of/mine/s/anchor--x.bin")
    stored.put(Body=stored.get()["Body"].read()[:-1])
    (there / "anchor" / "x.bin").unlink()
    assert not theirs.fetch("anchor/x.bin"), "half a file"
    theirs.remove("anchor/x.bin")
    theirs.remove("anchor/x.bin")
    assert keys_in(bucket) == set()


def test_a_record_in_a_bucket_comes_with_its_files_and_gets_its_test_errors_later(bucket: Any, tmp_path: Path) -> None:
    (here, mine), (there, theirs) = mirrors(tmp_path)
    candidate = Candidate((3,), 2)
    record = landscape(candidate)
    folder = record_folder(here / "records", candidate)
    write_record(here / "records", record)
    for name in ("dev.jsonl", "weights.safetensors", "checkpoint.pt"):
        (folder / name).write_text(name)
    mine.put(checkpoint_path(candidate))
    assert theirs.fetch(checkpoint_path(candidate))
    mine.put_record(candidate)
    names = ("record.json", "dev.jsonl", "weights.safetensors")
    assert keys_in(bucket) == {f"of/mine/s/records--{candidate.key}--{name}" for name in names}
    theirs.fetch_records([candidate, Candidate((1,))])
    assert read_records(there / "records") == [record]
    assert (record_folder(there / "records", candidate) / "dev.jsonl").read_text() == "dev.jsonl"

    tested = record.model_copy(update={"test": record.dev})
    write_record(here / "records", tested)
    (folder / "test.jsonl").write_text("test.jsonl")
    os.utime(folder / "record.json", (1, 1))
    mine.put_record(candidate)
    theirs.fetch_records([candidate])
    assert read_records(there / "records") == [tested]
    assert (record_folder(there / "records", candidate) / "test.jsonl").exists()


class StopsAtStep(NullListener):
    """Sends this process a signal while a candidate is trained."""

    def __init__(self, step: int):
        self.step = step

    def progress(self, activity: str, done: int, total: int, /, worker: int = 0) -> None:
        if "tokens/s" in activity and done > self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_workers_share_anchor_checkpoints_and_records_through_a_bucket(bucket: Any, toy: Path, tmp_path: Path) -> None:
    storage = {"url": f"journal://{tmp_path}/journal.log", "artifacts": URL}
    settings = {"search": {"trials": 3, "sampler": "random"}, "training": {"steps": 40, "checkpoint_seconds": 3600.0}}
    here, there = (write_study(tmp_path / name / "s", toy, storage=storage, **settings) for name in ("here", "there"))
    alone = write_study(tmp_path / "alone" / "s", toy, **settings)
    with pytest.raises(Interrupted):
        launch(here, listener=StopsAtStep(20))
    prefix = "of/mine/s/"
    assert keys_in(bucket) == {
        prefix + name for name in ("anchor--anchor.json", "anchor--projector.safetensors", "records--full--checkpoint.pt")
    }
    launch(there)
    curve = [json.loads(line)["step"] for line in (there.parent / "run/records/full/curve.jsonl").read_text().splitlines()]
    assert curve == [31, 40], "its training went on from the other worker's checkpoint"
    anchors = [(f.parent / "run" / "anchor" / "anchor.json").read_bytes() for f in (here, there)]
    assert anchors[0] == anchors[1], "fetched, not trained again: no two trainings take as many seconds"
    assert not any(key.endswith("checkpoint.pt") for key in keys_in(bucket))
    launch(alone)
    fetch_records(load_study(here))
    assert outcomes(here) == outcomes(there) == outcomes(alone)
    assert len(outcomes(here)) == 3


def test_a_bucket_that_does_not_exist_is_one_line_before_anything_is_trained(bucket: Any, toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, storage={"artifacts": "s3://nowhere/x"})
    for verb in ("launch", "report"):
        assert command(verb, file).error == "storage.artifacts: s3://nowhere/x cannot be reached (ClientError)"
    assert not (file.parent / "run" / "anchor").exists()


def test_a_missing_package_is_one_line(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, storage={"artifacts": URL})
    (tmp_path / "boto3.py").write_text("raise ImportError")
    done = cli("report", file, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (2, "storage.artifacts: S3 needs boto3: pip install 'prunesearch[s3]'\n")


class Shaky(FileSystemArtifactStore):
    """A store that cannot be reached the next few times."""

    failures = 0

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError
        super().write(artifact_id, content_body)


def test_a_store_that_is_away_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    (tmp_path / "store").mkdir()
    store = Shaky(str(tmp_path / "store"))
    mirror = ArtifactMirror(store, "s", tmp_path)
    (tmp_path / "x.bin").write_bytes(b"x")
    store.failures = 3
    mirror.put("x.bin")
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["s--x.bin"]
    os.utime(tmp_path / "x.bin", (1, 1))
    store.failures = 100
    with pytest.raises(ArtifactStoreUnavailable, match="ConnectionError"):
        mirror.put("x.bin")
    store.failures = 0
    mirror.put("x.bin")


def test_a_candidate_whose_files_cannot_be_stored_is_evaluated_again(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FULL_DISK_SECONDS", 0.01)
    study, heard, away = opened(config, None), Notes(), [True]

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if away:
            away.pop()
            raise ArtifactStoreUnavailable(errno.EIO, "the artifact store: EndpointConnectionError")
        return landscape(trial.candidate)

    run_loop(study, rules(config, 4), evaluate, listener=heard)
    assert finished(study) == len(complete(study)) == 4
    (note,) = heard.notes
    assert note.startswith("files cannot be read or written (the artifact store: EndpointConnectionError)")


# What only one worker does


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
