"""What the closed-form repair of a candidate costs, counted from the shapes of its maps."""

from dataclasses import dataclass

from prunesearch.model.system import SpeechEncoder

TRIED = 5  # ridges of a walk
SQUARES = 8  # matrices of the width of a map's inputs that are alive at the peak of its solve, in float64


@dataclass(frozen=True)
class RepairCost:
    """Operations in the study's precision, those in fp32 or float64, and the peak of bytes beside the encoder and its copy."""

    operations: int
    precise_operations: int
    memory_bytes: int


def repair_cost(encoder: SpeechEncoder, first: int, projector: tuple[int, int, int], rows: int, encoding: int) -> RepairCost:
    """The cost at most: every layer from `first` on is kept and refitted.

    `projector`: its stack, inputs and outputs of its first map; `rows`: encoder positions that are read; `encoding`: operations
    of the whole encoder on them.
    """
    width, inner, layers = encoder.width, encoder.feed_forward_map(encoder.layers[0]).in_features, encoder.depth - first
    stack, inputs, outputs = projector
    maps = [(rows, width, width), (rows, inner, width)] * layers + [(rows // stack, inputs, outputs)]
    sums = sum(2 * n * i * (i + 2 * o) for n, i, o in maps)
    solves = sum(TRIED * (i**3 // 3 + 4 * i * i * o) for _, i, o in maps)
    widest = max(i for _, i, _ in maps)
    passes = 3 * encoding * layers // encoder.depth  # the unpruned stream, the repaired one, and its maps' inputs
    return RepairCost(passes, sums + solves, SQUARES * 8 * widest**2)
