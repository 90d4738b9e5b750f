"""Which utterances form a batch: the same for every candidate of a study."""

import random
from collections.abc import Sequence

MEGABATCH = 50  # batches whose utterances are sorted by length together: enough to waste little, few enough to mix


def plan_batches(lengths: Sequence[float], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of utterance indices. Each epoch has a new order; utterances of similar length share a batch.

    An epoch's last batch may be smaller. The result depends on the arguments only.
    """
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < steps:
        rng = random.Random(f"{seed} {epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), MEGABATCH * batch_size):
            together = sorted(order[start : start + MEGABATCH * batch_size], key=lambda i: lengths[i])
            batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
        rng.shuffle(batches)
        plan += batches
        epoch += 1
    return plan[:steps]


def by_length(lengths: Sequence[float], batch_size: int) -> list[list[int]]:
    """Every index once, in batches of similar length, the longest first: if memory is too small, that shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
