"""Digests of model weights, so that a study can tell whether it still has the models that it started with.

A digest covers the weights as they are stored: names, dtypes, shapes and bytes of the tensors, in the order of their names.
It does not depend on how the tensors are spread over files.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, cat, uint8

from prunesearch.model.checkpoint import library_errors, require_finite
from prunesearch.model.checkpoint_files import hub_snapshot, read_header, weight_files
from prunesearch.model.hub import loading_error
from prunesearch.study.config import StudyConfig
from prunesearch.study.model_config import ModelSection

DIGITS = 16  # hexadecimal digits of the SHA-256 that are kept, as of other digests in a study
CHUNK_BYTES = 2**26
SAMPLES = 16  # values of a tensor that `sampled_digest` reads


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The digest of named tensors, such as a module's `state_dict()`."""
    digest = hashlib.sha256()
    for name in sorted(state):
        _update(digest, name, state[name])
    return digest.hexdigest()[:DIGITS]


def model_digest(config: StudyConfig, part: ModelSection, prefix: str | None = None) -> str:
    """The digest of one of the study's models; for `prefix`, see `digest_of_source`.

    A hub model that is not in the local cache is downloaded.

    Raises StudyError when there is no such model.
    """
    source = config.locate(part.source)
    try:
        return digest_of_source(source, part.revision, prefix)
    except (OSError, ValueError) as error:
        raise loading_error(part, source, error) from error


def digest_of_source(source: str | Path, revision: str | None = None, prefix: str | None = None) -> str:
    """The digest of a folder's or hub model's safetensors. One tensor is read at a time, and no model is built.

    `prefix` is a regular expression such as `model.encoder.ENCODER_PREFIX`: where some names match, only these tensors count,
    under the rest of their names. So an encoder-only folder and a full checkpoint with the same encoder have the same digest.
    Each tensor is read here, so this is also where values that are no numbers are found.
    Raises OSError when there is no such model or it has no safetensors, CheckpointError when they are damaged or not finite.
    """
    stored: dict[str, tuple[Path, str]] = {}  # name that counts -> file, name in it
    files = weight_files(source, revision)
    for file in files:
        stored |= {name: (file, name) for name in read_header(file)}
    if prefix and (matching := {name: at for name, at in stored.items() if re.match(prefix, name)}):
        stored = {re.sub(prefix, "", name): at for name, at in matching.items()}
    digest = hashlib.sha256()
    with library_errors("the weights are damaged"):
        opened = {file: safe_open(file, framework="pt") for file in files}
    for name in sorted(stored):
        file, name_in_file = stored[name]
        tensor = opened[file].get_tensor(name_in_file)
        require_finite({name: tensor})
        _update(digest, name, tensor)
    return digest.hexdigest()[:DIGITS]


def sampled_digest(state: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and a few values of each tensor, whatever their dtype: other weights have another one.

    It reads next to nothing, so that it can be taken at every start; it does not find a change of single values.
    """
    names = sorted(state)
    flat = [state[name].detach().reshape(-1) for name in names]
    values = cat([tensor[:: max(len(tensor) // SAMPLES, 1)][:SAMPLES] for tensor in flat]).double().cpu()
    shapes = "".join(f"{name} {tuple(state[name].shape)}\n" for name in names)
    return hashlib.sha256(shapes.encode() + values.numpy().tobytes()).hexdigest()[:DIGITS]


def hub_commits(config: StudyConfig) -> dict[str, str]:
    """The hub's commit hashes of the study's models, as this machine's cache has them, to be shown beside their digests.

    Folders and what is not in the cache are left out.
    """
    commits = {name: hub_commit(config.locate(part.source), part.revision) for name, part in config.models.items()}
    return {name: commit for name, commit in commits.items() if commit}


def hub_commit(source: str | Path, revision: str | None = None) -> str | None:
    """The hub's commit hash of a model, as this machine's cache has it; None for a folder and for what is not in the cache."""
    snapshot = hub_snapshot(source, revision)
    return snapshot.name if snapshot else None  # <cache>/<model>/snapshots/<commit>


def _update(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add one tensor: a line that describes it, then its bytes."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    stored = tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data
    for first in range(0, len(stored), CHUNK_BYTES):
        digest.update(stored[first : first + CHUNK_BYTES])
