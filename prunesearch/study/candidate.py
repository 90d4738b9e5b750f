"""What a study proposes: which encoder layers to remove, and how much LoRA to repair the damage with."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

BASELINE_NAMES = ("unpruned", "unpruned+lora", "top2", "top2+lora")


@dataclass(frozen=True)
class Candidate:
    """Removed layers (zero-based; kept sorted) and the rank of the LoRA on the LLM (0: none).

    `repeat` counts further trainings of the same system, each from a seed of its own: the study's seed plus `repeat`.
    Raises ValueError for a negative or repeated layer, or a negative rank or repeat.
    """

    removed_layers: tuple[int, ...] = ()
    lora_rank: int = 0
    repeat: int = 0

    def __post_init__(self) -> None:
        layers = tuple(sorted(int(i) for i in self.removed_layers))
        if layers and layers[0] < 0:
            raise ValueError(f"removed_layers must not be negative, got {layers[0]}: indices are zero-based")
        if len(set(layers)) < len(layers):
            raise ValueError(f"removed_layers must not repeat a layer, got {list(layers)}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (no LoRA) or more, got {self.lora_rank}")
        if self.repeat < 0:
            raise ValueError(f"repeat must be 0 (the first training) or more, got {self.repeat}")
        object.__setattr__(self, "removed_layers", layers)
        object.__setattr__(self, "lora_rank", int(self.lora_rank))
        object.__setattr__(self, "repeat", int(self.repeat))

    @property
    def key(self) -> str:
        """A canonical name, fit for a file: `full`, `minus-10-11`, `minus-3+lora8`, `full@1` for a first repeat."""
        layers = "minus-" + "-".join(map(str, self.removed_layers)) if self.removed_layers else "full"
        return layers + (f"+lora{self.lora_rank}" if self.lora_rank else "") + (f"@{self.repeat}" if self.repeat else "")

    @property
    def system(self) -> "Candidate":
        """What all repeats have in common."""
        return replace(self, repeat=0)

    @classmethod
    def from_key(cls, key: str) -> "Candidate":
        """The inverse of `key`. Raises ValueError for anything else."""
        if not (match := re.fullmatch(r"(?:full|minus-(\d+(?:-\d+)*))(?:\+lora(\d+))?(?:@(\d+))?", key)):
            raise ValueError(f"a candidate's key looks like full, minus-3-4, minus-3+lora8 or full@1, got {key!r}")
        return cls(tuple(int(i) for i in (match[1] or "").split("-") if i), int(match[2] or 0), int(match[3] or 0))


def baselines(encoder_layers: int, lora_rank: int) -> dict[str, Candidate]:
    """The published work's four systems: the whole encoder and the encoder less its top two layers, without and with
    LoRA. `unpruned+lora` is the control that the published comparison lacked."""
    top2 = (encoder_layers - 2, encoder_layers - 1)
    removed: Iterable[tuple[int, ...]] = ((), (), top2, top2)
    return {n: Candidate(r, lora_rank if n.endswith("+lora") else 0) for n, r in zip(BASELINE_NAMES, removed, strict=True)}
