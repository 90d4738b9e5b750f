"""Digests of model weights, so that a study can tell whether it still has the models that it started with.

A digest covers the weights as they are stored: names, dtypes, shapes and bytes of the tensors, in the order of their names.
It does not depend on how the tensors are spread over files.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor, uint8

from prunesearch.model.encoder import ENCODER_PREFIX
from prunesearch.model.hub import loading_error
from prunesearch.study.config import EncoderConfig, LlmConfig, StudyConfig

DIGITS = 16  # hexadecimal digits of the SHA-256 that are kept, as of other digests in a study
CHUNK_BYTES = 2**26
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers looks for them in this order


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The digest of named tensors, such as a module's `state_dict()`."""
    digest = hashlib.sha256()
    for name in sorted(state):
        _update(digest, name, state[name])
    return digest.hexdigest()[:DIGITS]


def model_digest(config: StudyConfig, part: EncoderConfig | LlmConfig) -> str:
    """The digest of the study's encoder or LLM. A hub model that is not in the local cache is downloaded.

    Raises StudyError when there is no such model.
    """
    source = config.locate(part.model)
    try:
        return digest_of_source(source, part.revision, ENCODER_PREFIX if isinstance(part, EncoderConfig) else None)
    except (OSError, ValueError) as error:
        raise loading_error(part, source, error) from error


def digest_of_source(source: str | Path, revision: str | None = None, prefix: str | None = None) -> str:
    """The digest of a folder's or hub model's safetensors. One tensor is read at a time, and no model is built.

    `prefix` is a regular expression such as `ENCODER_PREFIX`: where some tensors' names match, only these count, under the
    rest of their names. So an encoder-only folder and a full checkpoint with the same encoder have the same digest.
    Raises OSError when there is no such model or it has no safetensors.
    """
    stored: dict[str, tuple[Path, str]] = {}  # name that counts -> file, name in it
    files = weight_files(source, revision)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: (file, name) for name in tensors.keys()}  # noqa: SIM118 (it is no mapping)
    if prefix and (matching := {name: at for name, at in stored.items() if re.match(prefix, name)}):
        stored = {re.sub(prefix, "", name): at for name, at in matching.items()}
    digest = hashlib.sha256()
    opened = {file: safe_open(file, framework="pt") for file in files}
    for name in sorted(stored):
        file, name_in_file = stored[name]
        _update(digest, name, opened[file].get_tensor(name_in_file))
    return digest.hexdigest()[:DIGITS]


def weight_files(source: str | Path, revision: str | None = None) -> list[Path]:
    """The safetensors files that transformers loads for a folder or hub name: one file, or the shards that an index names.

    Raises OSError when there is none.
    """
    try:
        return [_file_of(source, revision, WEIGHTS)]
    except (FileNotFoundError, EntryNotFoundError):  # the weights may be in shards
        index = _file_of(source, revision, INDEX)
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [_file_of(source, revision, shard) for shard in shards]


def hub_commit(source: str | Path, revision: str | None = None) -> str | None:
    """The hub's commit hash of a model, as this machine's cache has it; None for a folder and for what is not in the cache."""
    if Path(source).exists():
        return None
    cached = try_to_load_from_cache(str(source), "config.json", revision=revision or "main")
    return Path(cached).parent.name if isinstance(cached, str) else None  # <cache>/<model>/snapshots/<commit>/config.json


def _file_of(source: str | Path, revision: str | None, name: str) -> Path:
    """A file of a folder or of a hub model (downloaded if need be). Raises OSError where the model has no such file."""
    if not Path(source).is_dir():
        return Path(hf_hub_download(str(source), name, revision=revision))
    if not (file := Path(source) / name).is_file():
        raise FileNotFoundError(f"it has neither {WEIGHTS} nor {INDEX}" if name == INDEX else f"{name} is missing")
    return file


def _update(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add one tensor: a line that describes it, then its bytes."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    stored = tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data
    for first in range(0, len(stored), CHUNK_BYTES):
        digest.update(stored[first : first + CHUNK_BYTES])
