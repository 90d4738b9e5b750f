"""The loader of all checkpoints: a model is loaded whole, as its configuration says, or refused in one line.

What is checked: the files (there, not cut, no pointers), the names and shapes of the tensors against the configuration, their
number types, and that no adapter lies among them. What no check can know: values that change no shape, such as the number of
attention heads.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import find_adapter_config_file

from prunesearch.model.checkpoint_files import (
    WEIGHTS,
    CheckpointError,
    MissingFileError,
    StoredTensor,
    adapter_error,
    hub_snapshot,
    read_header,
    refuse_adapter,
    stored_tensors,
    summary,
)

FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel", "_fsdp_wrapped_module.": "FSDP"}
SUMMED = 2**15  # values: torch sums so few in one thread, which is faster than threads that wait for a busy machine's cores
# transformers' warnings that become errors here, so that one line is all that is printed
TOLD_HERE = re.compile(r"LOAD REPORT|tied weights mapping|Model config: \w+_token_id")


@dataclass(frozen=True)
class Part:
    """What a checkpoint is loaded as."""

    name: str  # as messages call it
    prefix: str | None = None  # regular expression: what stands before the part's names in a checkpoint of more than the part
    beside: str | None = None  # regular expression: names that a checkpoint may have besides the part's


def load_checkpoint(model_class: Any, source: str | Path, revision: str | None, config: Any, part: Part, **options: Any) -> Any:
    """Load a model from the safetensors of a folder or hub name; no code that comes with it is run.

    config: the model's configuration, from `read_config`. options: for transformers' `from_pretrained`.
    Raises CheckpointError when the weights are damaged or are not those of the configuration, OSError or ValueError when there
    is no such model.
    """
    local = Path(source).is_dir()
    if getattr(config, "transformers_weights", None):
        raise CheckpointError(f"config.json must not name the weights' file (transformers_weights): rename it to {WEIGHTS}")
    stored = stored_tensors(Path(source)) if local else None
    with library_errors("the model cannot be built from its config.json and weights", local), _without_reports():
        model, report = model_class.from_pretrained(
            source,
            config=config,
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping={part.prefix: ""} if part.prefix else None,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
            **options,
        )
    if stored is None and (snapshot := hub_snapshot(source, revision)) is not None:
        stored = stored_tensors(snapshot)
    _require_fit(model, report, part)
    _require_one_source_each(model, stored or {}, part)
    return model


def read_config(source: str | Path, revision: str | None) -> Any:
    """The configuration of a folder's or hub name's model. Raises OSError or ValueError when there is none."""
    local = Path(source).is_dir()
    if local:
        refuse_adapter(Path(source))
    elif find_adapter_config_file(str(source), revision=revision or "main"):  # transformers would load the adapter's base model
        raise adapter_error("adapter_config.json")
    if local and not (Path(source) / "config.json").is_file():
        raise MissingFileError("config.json is missing: a model's folder must have one; copy it, too")
    with library_errors("config.json cannot be used", local), _without_reports():
        return AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)


@contextmanager
def library_errors(what: str, local: bool = True) -> Iterator[None]:
    """Raise a CheckpointError that starts with `what`, where a library cannot read a checkpoint.

    What the libraries raise for bad input is not documented and of any kind (KeyError, AssertionError, plain Exception). Only
    their calls belong into this context. `local`: False leaves OSError and ValueError as they are, since these say what the hub
    answered.
    """
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError) as error:
        if not local:
            raise
        raise CheckpointError(f"{what}: {summary(error)}") from error
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {summary(error)}") from error


@contextmanager
def _without_reports() -> Iterator[None]:
    """Without transformers' warnings about what the loader refuses."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "configuration_utils")]

    def is_needed(record: logging.LogRecord) -> bool:
        return not TOLD_HERE.search(record.getMessage())

    for logger in loggers:
        logger.addFilter(is_needed)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_needed)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it is not whole, OSError where there is none."""
    read_header(file)
    with library_errors(f"{file.name} is damaged"):
        return load_file(file)


# Tensors


def require_same(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises CheckpointError where `stored` has not the names and shapes of `expected`. `what` begins the message."""
    lacks, has = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    shapes = {
        (name, tuple(tensor.shape), tuple(expected[name].shape))
        for name, tensor in stored.items()
        if name in expected and tensor.shape != expected[name].shape
    }
    if found := _misfits(lacks, has, shapes, "system"):
        raise CheckpointError(f"{what} {'; '.join(found)}")


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, naming the tensor, where one has values that are not numbers or are infinite."""
    for name, tensor in state.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            continue
        flat = tensor.detach().reshape(-1)
        pieces = flat.split(SUMMED) if flat.device.type == "cpu" else (flat,)
        # fast, and not finite where one value is not; where a sum of finite values overflows, the values themselves decide
        if all(map(math.isfinite, torch.stack([piece.sum() for piece in pieces]).tolist())):
            continue
        if wrong := int((~torch.isfinite(tensor)).sum()):
            raise CheckpointError(
                f"weights must be finite numbers, got {wrong:,} NaN or infinite of {tensor.numel():,} values in {name}: "
                "take an earlier checkpoint of its training"
            )


def _misfits(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[Any, ...]], what: str) -> list[str]:
    """What does not fit, as parts of a sentence about the checkpoint, each with its number and its first tensor."""
    found = []
    if names := sorted(missing):
        found.append(f"lacks {len(names)} of the {what}'s tensors, the first is {names[0]}")
    if names := sorted(unexpected):
        found.append(f"has tensors that the {what} does not have ({len(names)}, the first is {names[0]})")
    if triples := sorted((name, tuple(stored), tuple(expected)) for name, stored, expected in mismatched):
        name, stored, expected = triples[0]
        shapes = f"{name}: {stored} where {expected} is expected"
        found.append(f"has tensors of another shape ({len(triples)}, the first is {shapes})")
    return found


def _require_fit(model: Any, report: Mapping[str, Any], part: Part) -> None:
    """Raises CheckpointError where the loading report has anything that is not listed as expected."""
    missing = set(report["missing_keys"])
    unexpected = {name for name in report["unexpected_keys"] if not (part.beside and re.match(part.beside, name))}
    found = _misfits(missing, unexpected, report["mismatched_keys"], part.name)
    if not found and not report["error_msgs"]:
        return _require_tied(model)
    wrapper = next((w for w in WRAPPERS if any(name.startswith(w) or f".{w}" in name for name in unexpected)), None)
    if wrapper:
        by = WRAPPERS[wrapper]
        fix = f"the names have {wrapper!r} in them, which {by} adds: save the model itself and not the one that {by} made"
    else:
        fix = f"config.json and weights must be of the same model{_depths(model, missing, unexpected)}"
    raise CheckpointError(f"the checkpoint {'; '.join([*found, *map(str, report['error_msgs'])])}: {fix}")


def _depths(model: Any, missing: set[str], unexpected: set[str]) -> str:
    """The number of layers in configuration and weights, where only that differs."""

    def layer_of(name: str) -> int | None:
        found = re.search(r"\b(?:layers|h|blocks)\.(\d+)\.", name)
        return int(found[1]) if found else None

    sizes = Counter(layer_of(name) for name in model.state_dict())
    sizes.pop(None, None)
    lost, more = Counter(map(layer_of, missing)), Counter(map(layer_of, unexpected))
    whole_layers = sizes and not {None} & {*lost, *more} and set({**lost, **more}.values()) <= set(sizes.values())
    stored = len(sizes) - len(lost) + len(more)
    return f" ({len(sizes)} layers in config.json, {stored} in the weights)" if whole_layers and stored != len(sizes) else ""


def _require_tied(model: Any) -> None:
    """Raises CheckpointError where the configuration ties two tensors that the checkpoint has with different values."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if loose := sorted(tied.keys() - model.all_tied_weights_keys.keys()):
        raise CheckpointError(
            f"config.json ties {loose[0]} to {tied[loose[0]]}, and the weights have different values for the two: "
            'write "tie_word_embeddings": false if both were trained'
        )


def _require_one_source_each(model: Any, stored: Mapping[str, StoredTensor], part: Part) -> None:
    """Raises CheckpointError where two stored tensors have the same place in the model, or one holds whole numbers for a weight
    that computes with fractions (the model would compute with them as they are)."""
    state, base = model.state_dict(), model.base_model_prefix
    quantized = getattr(model.config, "quantization_config", None) is not None
    places: dict[str, str] = {}
    for name, tensor in stored.items():
        inner = re.sub(part.prefix, "", name) if part.prefix else name
        place = next((n for n in (inner, inner.removeprefix(f"{base}."), f"{base}.{inner}") if n in state), None)
        if place is None:
            continue
        if place in places:
            raise CheckpointError(f"the checkpoint has two tensors for {place}, {places[place]} and {name}: remove one")
        places[place] = name
        if state[place].is_floating_point() and tensor.dtype not in FLOATS and not quantized:
            raise CheckpointError(
                f"weights must be stored as one of {', '.join(sorted(FLOATS))}, got {tensor.dtype} for {name}: "
                "use the checkpoint before its quantisation"
            )
    if part.prefix and len({bool(re.match(part.prefix, name)) for name in places.values()}) > 1:
        outside = next(name for name in places.values() if not re.match(part.prefix, name))
        raise CheckpointError(f"the checkpoint names some of the {part.name}'s tensors without their prefix, such as {outside}")
