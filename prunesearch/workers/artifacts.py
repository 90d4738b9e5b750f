"""Big files for workers that share no folder: Optuna's artifact stores, by names of our own.

What lies in a study's run folder and what the others need of it (the anchor, checkpoints, records with their utterances and
weights) is put on the shelf under its path. A file is stored with its digest in front: half a file, left by a kill, is none.
"""

import errno
import hashlib
import io
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Interrupt, LeaseLost
from prunesearch.study.record import write_atomically
from prunesearch.workers.claim import sleep
from prunesearch.workers.lease import LeaseHolder, LeaseMonitor, end_lost, give_up, kept

R = TypeVar("R")

ATTEMPTS = 6
DIGEST = 32  # bytes of SHA-256
OF_A_RECORD = ("record.json", "dev.jsonl", "test.jsonl", "weights.safetensors", "curve.jsonl")
CHECKPOINT = "checkpoint.pt"


class ArtifactStoreUnavailable(OSError):
    """The artifact store cannot be reached, whatever was tried."""


def _again(call: Callable[[], R]) -> R:
    """Try for a while. Raises ArtifactStoreUnavailable."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except ArtifactNotFound:
            raise
        except Exception as error:  # each store has its own
            if attempt + 1 == ATTEMPTS:
                raise ArtifactStoreUnavailable(errno.EIO, f"the artifact store: {type(error).__name__}") from error
        time.sleep(2**attempt * random.uniform(0.2, 0.6))
    raise AssertionError("unreachable")


class ArtifactMirror:
    """The study's part of an artifact store. Paths are relative to the run folder."""

    def __init__(self, store: Any, study: str, run_folder: Path):
        self._store, self._study, self._run_folder = store, study, run_folder
        self._put: dict[str, float] = {}  # when what was put last had been written

    @classmethod
    def open(cls, url: str, study: str, run_folder: Path) -> "ArtifactMirror":
        """`s3://bucket/prefix` (credentials and endpoint from where boto3 looks for them), or a folder. Raises StudyError."""
        if not url.startswith("s3://"):
            try:
                Path(url).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StudyError([f"storage.artifacts: {url} cannot be written ({error.strerror})"]) from None
            return cls(FileSystemArtifactStore(url), study, run_folder)
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        try:
            store = Boto3ArtifactStore(bucket_name=bucket)
            store.client.head_bucket(Bucket=bucket)
        except ImportError:
            raise StudyError(["storage.artifacts: S3 needs boto3: pip install 'prunesearch[s3]'"]) from None
        except Exception as error:
            raise StudyError([f"storage.artifacts: {url} cannot be reached ({type(error).__name__})"]) from None
        return cls(store, "/".join(filter(None, [prefix.strip("/"), study])), run_folder)

    def _name(self, path: str) -> str:
        flat = path.replace("/", "--")
        return f"{self._study}/{flat}" if isinstance(self._store, Boto3ArtifactStore) else f"{self._study}--{flat}"

    def put(self, path: str) -> None:
        """A file of the run folder, if it is there and was not put as it is now."""
        file = self._run_folder / path
        if not file.exists() or self._put.get(path) == (written := file.stat().st_mtime):
            return
        content = file.read_bytes()
        stored = hashlib.sha256(content).digest() + content
        _again(lambda: self._store.write(self._name(path), io.BytesIO(stored)))
        self._put[path] = written

    def fetch(self, path: str, renew: bool = False) -> bool:
        """Whether the file is in the run folder afterwards; one that is there already stays, unless it is to be renewed."""
        file = self._run_folder / path
        if file.exists() and not renew:
            return True

        def read() -> tuple[bytes, bytes]:
            with self._store.open_reader(self._name(path)) as reader:
                return reader.read(DIGEST), reader.read()

        try:
            digest, content = _again(read)
        except ArtifactNotFound:
            return file.exists()
        if hashlib.sha256(content).digest() != digest:
            return file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
        self._put[path] = file.stat().st_mtime
        return True

    def remove(self, path: str) -> None:
        with suppress(ArtifactNotFound):
            _again(lambda: self._store.remove(self._name(path)))

    def put_record(self, key: str) -> None:
        """All of a candidate's files; its checkpoint is not needed any more. The record comes last: where it is, all are."""
        for name in (*OF_A_RECORD[1:], OF_A_RECORD[0]):
            self.put(f"records/{key}/{name}")
        self.remove(f"records/{key}/{CHECKPOINT}")

    def fetch_records(self, keys: Iterable[str]) -> None:
        """Where another machine has decoded test in the meantime, its record takes the place of the one that is here."""
        for key in keys:
            before = self._read_bytes(key)
            for name in OF_A_RECORD:
                self.fetch(f"records/{key}/{name}", renew=name == "record.json" and b'"test":null' in before)

    def _read_bytes(self, key: str) -> bytes:
        file = self._run_folder / "records" / key / "record.json"
        return file.read_bytes().replace(b" ", b"") if file.exists() else b""


def open_shelf(config: StudyConfig) -> ArtifactMirror | None:
    """The study's shelf, where it has one. Raises StudyError."""
    return ArtifactMirror.open(config.artifacts, config.name, config.run_folder) if config.artifacts else None


def once(
    storage: BaseStorage,
    name: str,
    stop: Interrupt,
    done: Callable[[], bool],
    act: Callable[[Callable[[], None]], None],
    look: Callable[[], object] = lambda: None,
) -> None:
    """Have one worker of many do something, and the others wait for it; if that one dies, another takes over.

    `done` tells whether it was done. Each worker opens a trial in a study of its own, `name`; the lowest number acts. `act` is
    given what it must call before it writes what others read: it raises LeaseLost where this worker was too slow.
    """
    while not done():
        with suppress(LeaseLost):
            _once(storage, name, stop, done, act, look)


def _once(
    storage: BaseStorage,
    name: str,
    stop: Interrupt,
    done: Callable[[], bool],
    act: Callable[[Callable[[], None]], None],
    look: Callable[[], object],
) -> None:
    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    watch = LeaseMonitor()
    trial = study.ask()
    held = LeaseHolder(storage, trial._trial_id)
    held.renew()

    def beside() -> None:
        end_lost(study, watch)
        look()

    try:
        with kept(held, beside):
            while not done():
                stop.check()
                held.check()
                end_lost(study, watch)
                running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
                if all(trial.number <= t.number for t in running):
                    act(held.make_sure)
                    break
                sleep(0.5, stop)
    finally:
        give_up(study, storage.get_trial(trial._trial_id), "handed back")
