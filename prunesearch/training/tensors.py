"""Safetensors files of a study: written whole, and read whole or named."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all. Raises OSError when the disk is full."""
    write_atomically(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def read_tensors(path: Path, like: Mapping[str, Tensor], fix: str, complete: bool = True) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensors` wrote, for weights of the same names and shapes.

    like: the weights that the tensors are for.
    fix: what the user can do about a damaged file.
    complete: whether the file must have a tensor for each of the weights.

    Raises StudyError for a file that is cut off, or that holds other tensors.
    """
    try:
        with path.open("rb"):  # a file that may not be read, or is a folder, is named by the operating system
            tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        what = "the file is empty" if path.stat().st_size == 0 else f"the file is cut off or damaged ({error})"
        raise StudyError([f"{path}: {what}: {fix}"]) from None
    if broken := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise StudyError([f"{path}: weights must be finite numbers, got NaN or infinite values in {broken}: {fix}"])
    if reason := different(tensors, like, complete):
        raise StudyError([f"{path}: the file belongs to another system ({reason}): {fix}"])
    return tensors


def is_whole(path: Path) -> bool:
    """Whether the file exists and is as long as its header says. Its tensors are not read."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def different(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], complete: bool = True) -> str | None:
    """Why tensors do not fit the weights `like`: a name or a shape; None if they fit."""
    missing = sorted(like.keys() - tensors.keys()) if complete else []
    if names := [*missing, *sorted(tensors.keys() - like.keys())]:
        return f"{names[0]} is {'missing' if names[0] in missing else 'unexpected'}"
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape:
            return f"{name} must have the shape {tuple(like[name].shape)}, got {tuple(tensor.shape)}"
    return None
