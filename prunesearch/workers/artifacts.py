"""Big files for workers that share no folder, kept in one of Optuna's artifact stores under names of our own.

A file of the study's run folder that other workers need (the anchor, a checkpoint, a record with its utterances and weights) is
stored under its path. Each stored file begins with its digest, so that a partial file, left by a killed writer, is recognised.
"""

import errno
import hashlib
import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically
from prunesearch.workers.retry import bounded

R = TypeVar("R")

ATTEMPTS = 6
DIGEST_BYTES = 32  # SHA-256
RECORD_FILES = ("record.json", "dev.jsonl", "test.jsonl", "weights.safetensors", "encoder.safetensors", "curve.jsonl")
CHECKPOINT = "checkpoint.pt"


class ArtifactStoreUnavailable(OSError):
    """The artifact store could not be reached in several attempts."""


def _repeated(call: Callable[[], R]) -> R:
    """The call's result, after several attempts. Raises ArtifactNotFound, and ArtifactStoreUnavailable for any other error."""
    try:
        return bounded(ATTEMPTS, lambda error: not isinstance(error, ArtifactNotFound), longest_wait=20)(call)
    except ArtifactNotFound:
        raise
    except Exception as error:
        raise ArtifactStoreUnavailable(errno.EIO, f"the artifact store: {type(error).__name__}") from error


def checkpoint_path(candidate: Candidate) -> str:
    """A candidate's checkpoint, relative to the run folder."""
    return f"records/{candidate.key}/{CHECKPOINT}"


class ArtifactMirror:
    """The study's part of an artifact store. Paths are relative to the run folder."""

    def __init__(self, store: Any, prefix: str, run_folder: Path):
        self._store, self._prefix, self._run_folder = store, prefix, run_folder
        self._stored: dict[str, float] = {}  # path -> modification time of the file that was stored last

    @classmethod
    def open(cls, url: str, study: str, run_folder: Path) -> "ArtifactMirror":
        """`s3://bucket/prefix` (boto3 finds credentials and endpoint), or a folder. Raises StudyError."""
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
        return f"{self._prefix}/{flat}" if isinstance(self._store, Boto3ArtifactStore) else f"{self._prefix}--{flat}"

    def put(self, path: str) -> None:
        """Store a file of the run folder, if it exists and has changed since it was stored last."""
        file = self._run_folder / path
        if not file.exists() or self._stored.get(path) == (modified := file.stat().st_mtime):
            return
        content = file.read_bytes()
        stored = hashlib.sha256(content).digest() + content
        _repeated(lambda: self._store.write(self._name(path), io.BytesIO(stored)))
        self._stored[path] = modified

    def fetch(self, path: str, replace: bool = False) -> bool:
        """Copy a file from the store to the run folder; returns whether the folder has the file now.

        A file that is there already is kept, unless `replace` is set. A stored file with a wrong digest counts as missing.
        """
        file = self._run_folder / path
        if file.exists() and not replace:
            return True
        try:
            digest, content = _repeated(lambda: self._read(path))
        except ArtifactNotFound:
            return file.exists()
        if hashlib.sha256(content).digest() != digest:
            return file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
        self._stored[path] = file.stat().st_mtime
        return True

    def _read(self, path: str) -> tuple[bytes, bytes]:
        with self._store.open_reader(self._name(path)) as reader:
            return reader.read(DIGEST_BYTES), reader.read()

    def remove(self, path: str) -> None:
        """Remove a file from the store, if it is there."""
        with suppress(ArtifactNotFound):
            _repeated(lambda: self._store.remove(self._name(path)))

    def put_record(self, candidate: Candidate) -> None:
        """Store all files of a candidate and remove its checkpoint. The record comes last: if it is there, all files are."""
        for name in (*RECORD_FILES[1:], RECORD_FILES[0]):
            self.put(f"records/{candidate.key}/{name}")
        self.remove(checkpoint_path(candidate))

    def fetch_records(self, candidates: Iterable[Candidate]) -> None:
        """Fetch the candidates' files. A record without test errors is replaced: another machine may have decoded test."""
        for candidate in candidates:
            record = self._run_folder / "records" / candidate.key / "record.json"
            untested = record.exists() and b'"test":null' in record.read_bytes().replace(b" ", b"")
            for name in RECORD_FILES:
                self.fetch(f"records/{candidate.key}/{name}", replace=untested and name == "record.json")


def open_artifacts(config: StudyConfig) -> ArtifactMirror | None:
    """The study's artifact store, if it has one. Raises StudyError."""
    return ArtifactMirror.open(config.artifacts, config.name, config.run_folder) if config.artifacts else None
