"""The files of a checkpoint: which there are, and what their headers say. No tensor is read."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers looks for them in this order
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LFS_POINTER = b"version https://git-lfs"
LENGTH_BYTES = 8  # a safetensors file starts with the length of its header


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is. The message says what is wrong and what to do, in one line."""


class MissingFileError(FileNotFoundError, CheckpointError):
    """A file of a checkpoint is not there."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header describes it."""

    file: Path
    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]


def weight_files(source: str | Path, revision: str | None = None) -> list[Path]:
    """The safetensors files that transformers loads for a folder or hub name: one file, or the shards that an index names.

    Raises MissingFileError when one is missing, CheckpointError when the index cannot be read.
    """
    try:
        return [_file_of(source, revision, WEIGHTS)]
    except (FileNotFoundError, EntryNotFoundError):  # the weights may be in shards
        index = _file_of(source, revision, INDEX)
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{INDEX} is damaged ({summary(error)}): copy it again") from error
    return [_file_of(source, revision, shard) for shard in shards]


def _file_of(source: str | Path, revision: str | None, name: str) -> Path:
    """A file of a folder or of a hub model (downloaded if need be). Raises OSError where the model has no such file: in a
    folder, MissingFileError."""
    folder = Path(source)
    if not folder.is_dir():
        return Path(hf_hub_download(str(source), name, revision=revision))
    if (folder / name).is_file():
        return folder / name
    if name not in (WEIGHTS, INDEX):
        raise MissingFileError(f"{name} is missing, which {INDEX} names: copy it, too")
    pickles = [pickle for pickle in PICKLES if (folder / pickle).is_file()]
    only = f", only {pickles[0]}, a pickle, which is never read: save the weights as safetensors" if pickles else ""
    raise MissingFileError(f"it has neither {WEIGHTS} nor {INDEX}{only}")


def hub_snapshot(source: str | Path, revision: str | None = None) -> Path | None:
    """The folder of this machine's cache that holds a hub model; None for a folder and for what is not in the cache."""
    if Path(source).exists():
        return None
    cached = try_to_load_from_cache(str(source), "config.json", revision=revision or "main")
    return Path(cached).parent if isinstance(cached, str) else None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model's folder, by name, from the files' headers. See `weight_files` and `read_header`."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        header = read_header(file)
        if twice := sorted(tensors.keys() & header.keys()):
            raise CheckpointError(
                f"a tensor must be stored once, got {twice[0]} in {tensors[twice[0]].file.name} and in {file.name}: "
                "copy the files of one version"
            )
        tensors |= header
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Raises CheckpointError where the file is not whole, OSError without one."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        opened.seek(LENGTH_BYTES)
        header = opened.read(length) if LENGTH_BYTES + length <= size else None
    if size == 0:
        raise CheckpointError(f"{file.name} is empty: copy it again")
    if start == LFS_POINTER:
        raise CheckpointError(f"{file.name} is a git-lfs pointer and not the weights: fetch them with `git lfs pull`")
    if header is None and start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{":
        raise CheckpointError(f"{file.name} is cut off within its header: copy it again")
    try:
        table = {name: entry for name, entry in json.loads(header or b"").items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in table.values()), default=0)
        tensors = {name: StoredTensor(file, str(e["dtype"]), tuple(map(int, e["shape"]))) for name, e in table.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{file.name} is no safetensors file, or its header is damaged: copy it again") from None
    if size != (announced := LENGTH_BYTES + length + end):
        found = "is cut off" if size < announced else "is too long"
        raise CheckpointError(f"{file.name} {found}: its header announces {announced:,} bytes, it has {size:,}; copy it again")
    return tensors


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError where an adapter lies in a model's folder: transformers would put it on without a word."""
    if found := [name for name in ADAPTER_FILES if (folder / name).is_file()]:
        raise adapter_error(found[0])


def adapter_error(found: str) -> CheckpointError:
    return CheckpointError(
        f"a model must come without an adapter, got {found}: merge it into the weights (peft's merge_and_unload, then "
        "save_pretrained to a new folder), or move the adapter's files away"
    )


def summary(error: Exception) -> str:
    """An error's message in one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = f"{lines[0]} {lines[1]}" if lines[0].endswith("':") and len(lines) > 1 else lines[0].rstrip(":,")
    return text if len(text) <= 300 else text[:299] + "…"
