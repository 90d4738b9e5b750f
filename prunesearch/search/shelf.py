"""Big files for workers that share no folder: Optuna's artifact stores, by names of our own.

What lies in a study's run folder and what the others need of it (the anchor, checkpoints, records with their utterances and
weights) is put on the shelf under its path. A file is stored with its digest in front: half a file, left by a kill, is none.
"""

import hashlib
import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from prunesearch.mistakes import StudyError
from prunesearch.search.claims import sleep
from prunesearch.search.leases import Held, Watch, end_lost, give_up, kept
from prunesearch.stopping import Stop

DIGEST = 32  # bytes of SHA-256
OF_A_RECORD = ("record.json", "dev.jsonl", "test.jsonl", "weights.safetensors", "curve.jsonl")
CHECKPOINT = "checkpoint.pt"


class Shelf:
    """The study's part of an artifact store. Paths are relative to the run folder."""

    def __init__(self, store: Any, study: str, run_folder: Path):
        self._store, self._study, self._run_folder = store, study, run_folder
        self._put: dict[str, float] = {}  # when what was put last had been written

    @classmethod
    def open(cls, url: str, study: str, run_folder: Path) -> "Shelf":
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
        self._store.write(self._name(path), io.BytesIO(hashlib.sha256(content).digest() + content))
        self._put[path] = written

    def fetch(self, path: str) -> bool:
        """Whether the file is in the run folder afterwards; one that is there already stays."""
        file = self._run_folder / path
        if file.exists():
            return True
        try:
            with self._store.open_reader(self._name(path)) as reader:
                digest, content = reader.read(DIGEST), reader.read()
        except ArtifactNotFound:
            return False
        if hashlib.sha256(content).digest() != digest:
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.fetched")
        partial.write_bytes(content)
        partial.replace(file)
        self._put[path] = file.stat().st_mtime
        return True

    def remove(self, path: str) -> None:
        with suppress(ArtifactNotFound):
            self._store.remove(self._name(path))

    def put_record(self, key: str) -> None:
        """All of a candidate's files; its checkpoint is not needed any more. The record comes last: where it is, all are."""
        for name in (*OF_A_RECORD[1:], OF_A_RECORD[0]):
            self.put(f"records/{key}/{name}")
        self.remove(f"records/{key}/{CHECKPOINT}")

    def fetch_records(self, keys: Iterable[str]) -> None:
        for key in keys:
            for name in OF_A_RECORD:
                self.fetch(f"records/{key}/{name}")


def once(storage: BaseStorage, name: str, stop: Stop, done: Callable[[], bool], act: Callable[[], None]) -> None:
    """Have one worker of many do something, and the others wait for it; if that one dies, another takes over.

    `done` tells whether it was done. Each worker opens a trial in a study of its own, `name`; the lowest number acts.
    """
    if done():
        return
    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    watch = Watch()
    trial = study.ask()
    held = Held(storage, trial._trial_id)
    held.renew()

    try:
        with kept(held, lambda: end_lost(study, watch)):
            while not done():
                stop.check()
                held.check()
                end_lost(study, watch)
                running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
                if trial.number == min(t.number for t in running):
                    act()
                    break
                sleep(0.5, stop)
    finally:
        give_up(study, storage.get_trial(trial._trial_id), "handed back")
