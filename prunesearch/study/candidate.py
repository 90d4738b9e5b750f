"""A candidate: which encoder layers to remove, and the rank of the LoRA that repairs the damage."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

BASELINE_NAMES = ("unpruned", "unpruned+lora", "top2", "top2+lora")

_KEY = re.compile(r"(?:full|minus-(\d+(?:-\d+)*))(?:\+lora(\d+))?(?:@(\d+))?", re.ASCII)


@dataclass(frozen=True)
class Candidate:
    """A set of removed encoder layers and a LoRA rank.

    removed_layers: zero-based indices in any order; they are stored sorted.
    lora_rank: rank of the LoRA on the LLM; 0 means no LoRA.
    repeat: 0 for the first training of a system. A further training of the same system has repeat 1, 2, … and
        uses the seed `study seed + repeat`.

    Raises ValueError if a layer is negative or occurs twice, or if the rank or repeat is negative.
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
        """The candidate's only spelling, safe as a file name: `full`, `minus-10-11`, `minus-3+lora8`, `full@1`."""
        layers = "minus-" + "-".join(map(str, self.removed_layers)) if self.removed_layers else "full"
        return layers + (f"+lora{self.lora_rank}" if self.lora_rank else "") + (f"@{self.repeat}" if self.repeat else "")

    @property
    def system(self) -> "Candidate":
        """The first training (repeat 0) of the same layers and rank. All repeats of a system share it."""
        return replace(self, repeat=0)

    @classmethod
    def from_key(cls, key: str) -> "Candidate":
        """The candidate whose `key` is exactly `key`.

        Keys from a storage or a command line become folder names, so no second spelling is accepted. Raises ValueError
        if `key` is not a key (`top2`, `../../x`) or is another spelling of one (`minus-4-3`, `minus-03`, `full+lora0`).
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"a candidate's key must look like full, minus-3-4, minus-3+lora8 or full@1, got {key!r}")
        candidate = cls(tuple(int(i) for i in (match[1] or "").split("-") if i), int(match[2] or 0), int(match[3] or 0))
        if candidate.key != key:
            raise ValueError(
                "a candidate's key must list layers in rising order, without leading zeros and without +lora0 or @0, "
                f"got {key!r}: write {candidate.key!r}"
            )
        return candidate


def baselines(encoder_layers: int, lora_rank: int) -> dict[str, Candidate]:
    """The four baselines by name: the unpruned encoder, and the encoder without its top two layers, each without and
    with LoRA.

    Three of them are the systems of arXiv 2603.27981; `unpruned+lora` is the control that its comparison lacked.
    """
    top2 = (encoder_layers - 2, encoder_layers - 1)
    removed: Iterable[tuple[int, ...]] = ((), (), top2, top2)
    return {n: Candidate(r, lora_rank if n.endswith("+lora") else 0) for n, r in zip(BASELINE_NAMES, removed, strict=True)}


def count_candidates(removable_layers: int, max_removed: int, ranks: int) -> int:
    """Number of candidates that lose at most `max_removed` of `removable_layers` layers, with one of `ranks` LoRA ranks."""
    return sum(math.comb(removable_layers, k) for k in range(max_removed + 1)) * ranks
