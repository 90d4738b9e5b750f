"""Weights of a SLAM-ASR system that was trained elsewhere: a projector, and perhaps a LoRA on the LLM.

Read are an export of this package, a projector as safetensors, and PyTorch checkpoints of two layouts: the published authors'
`{"projector": …, "lora": …}` (arXiv 2603.27981), and SLAM-LLM's `model.pt`, one table with `encoder_projector.` before the
projector's names. Of a pickle, nothing but tensors is read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunesearch.model.checkpoint import library_errors, read_tensors, require_finite, require_same
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.digest import weights_digest

# the projector's names in the published code and in SLAM-LLM, and here
NAMES = {"linear1": "up", "linear2": "down", "layer_norm": "norm"}
PROJECTOR_PREFIX = r"^(module\.|_orig_mod\.)?(encoder_projector|projector)\."
LORA_NAME = re.compile(r"^(?:llm\.)?(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight$")
EXPORT = "slam.json"
_LEFT_OUT = (
    "an anchor is a projector and a LoRA; a trained encoder or LLM is given as encoder.model or llm.model, and what was "
    "frozen is left out of the file"
)


@dataclass(frozen=True)
class TrainedWeights:
    """`projector`: by this package's names. `lora`: for each layer of the LLM, by its name, its two factors A and B.

    `alpha_per_rank`: LoRA's scale; None where the checkpoint does not tell it.
    """

    projector: Mapping[str, Tensor]
    lora: Mapping[str, tuple[Tensor, Tensor]]
    alpha_per_rank: float | None = None

    def digest(self) -> str:
        factors = {
            f"{name}.{side}": tensor for name, pair in self.lora.items() for side, tensor in zip("AB", pair, strict=True)
        }
        return weights_digest({**self.projector, **factors})

    def for_projector(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The projector's weights. Raises CheckpointError where they do not fit `own`, the study's projector.

        SLAM-LLM's projector has no LayerNorm at its end, which cannot be imitated here.
        """
        require_same(self.projector, own, "the trained projector")
        return {name: tensor.to(own[name]) for name, tensor in self.projector.items()}

    @torch.no_grad()
    def merge_lora(self, model: Any, alpha_per_rank: float) -> None:
        """Add the LoRA to the LLM's weights, in place. Raises CheckpointError where it does not fit the LLM."""
        modules = dict(model.named_modules())
        for name, (a, b) in self.lora.items():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or weight.shape != (b.shape[0], a.shape[1]):
                found = "no such layer" if weight is None else f"a layer of {tuple(weight.shape)}"
                raise CheckpointError(
                    f"its LoRA adapts {name} with {(b.shape[0], a.shape[1])}, and the LLM has {found}: "
                    "llm.model must be the LLM that the LoRA was trained on"
                )
            scale = self.alpha_per_rank if self.alpha_per_rank is not None else alpha_per_rank
            weight += (scale * (b.to(weight.device).float() @ a.to(weight.device).float())).to(weight.dtype)


def read_trained_weights(source: Path) -> TrainedWeights:
    """The weights in an export's folder, a safetensors file or a PyTorch checkpoint.

    Raises OSError where there is none, CheckpointError where it is damaged or of another layout.
    """
    if source.is_dir():
        return _of_export(source)
    if source.suffix == ".safetensors":
        return _sorted(read_tensors(source))
    with library_errors(f"{source.name} cannot be read as tensors (a pickle's other content is never run)"):
        content = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"must hold a table of tensors, got {type(content).__name__}")
    if isinstance(content.get("projector"), dict):
        _require_read(content, {"projector", "lora"})
        lora = content.get("lora") or {}
        if not isinstance(lora, dict):
            raise CheckpointError(f"its lora must be a table of tensors, got {type(lora).__name__}")
        table = {**{f"projector.{name}": tensor for name, tensor in content["projector"].items()}, **lora}
        if other := [name for name, tensor in table.items() if not isinstance(tensor, Tensor)]:
            raise CheckpointError(f"its {other[0]} must be a tensor, got {type(table[other[0]]).__name__}")
        return _sorted(table)
    inner = next((name for name in ("model", "state_dict") if isinstance(content.get(name), dict)), None)
    if inner is not None:
        _require_read(content, {inner})
        content = content[inner]
    return _sorted({name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)})


def _require_read(content: Mapping[str, Any], read: set[str]) -> None:
    """Raises CheckpointError where a table beside those that are read has weights, too. An optimizer's are not that."""
    for name, value in content.items():
        if name not in read and isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()):
            raise CheckpointError(f"holds weights that would not be read, {name!r}: {_LEFT_OUT}")


def _of_export(folder: Path) -> TrainedWeights:
    if not (folder / EXPORT).is_file():
        raise CheckpointError(f"must be a file, or a folder that `prunesearch export` wrote: it has no {EXPORT}")
    with library_errors(f"{EXPORT} is damaged"):
        settings = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
    if settings.get("removed_layers"):
        removed = ", ".join(map(str, settings["removed_layers"]))
        raise CheckpointError(f"must be of the unpruned encoder, got an export without its layers {removed}")
    if settings.get("merged"):
        raise CheckpointError("its LoRA is merged into its own LLM: export it again without --merge")
    tensors = read_tensors(folder / "projector.safetensors")
    adapter = folder / "adapter" / "adapter_model.safetensors"
    found = _sorted({**tensors, **(read_tensors(adapter) if adapter.is_file() else {})})
    return TrainedWeights(found.projector, found.lora, settings["llm"]["lora_alpha_per_rank"])


def _sorted(tensors: Mapping[str, Tensor]) -> TrainedWeights:
    """Projector and LoRA of one table. Raises CheckpointError where it has no projector, or half of a LoRA."""
    factors: dict[str, dict[str, Tensor]] = {}
    projector: dict[str, Tensor] = {}
    prefixed = any(re.match(PROJECTOR_PREFIX, name) for name in tensors)
    for name, tensor in tensors.items():
        if match := LORA_NAME.match(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif re.match(PROJECTOR_PREFIX, name) or not prefixed:
            part, _, rest = re.sub(PROJECTOR_PREFIX, "", name).partition(".")
            projector[f"{NAMES.get(part, part)}.{rest}"] = tensor
    if left := [name for name in tensors if prefixed and not (LORA_NAME.match(name) or re.match(PROJECTOR_PREFIX, name))]:
        raise CheckpointError(f"holds weights that would not be read, {left[0]!r} the first: {_LEFT_OUT}")
    if not projector:
        raise CheckpointError("has no projector: its names must begin with projector. or encoder_projector.")
    if halves := sorted(name for name, pair in factors.items() if pair.keys() != {"A", "B"}):
        raise CheckpointError(f"has one factor only of the LoRA on {halves[0]}: it is damaged")
    require_finite(tensors)
    return TrainedWeights(projector, {name: (pair["A"], pair["B"]) for name, pair in sorted(factors.items())})
