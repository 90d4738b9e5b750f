"""When to end a trial early: it is clearly dominated by what is known at the same rung."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class AtRung:
    """A trial's dev WER (a fraction) after so many steps, and its parameters."""

    step: int
    wer: float
    params: float


def clearly_dominated(here: AtRung, others: Iterable[AtRung], margin: float) -> bool:
    """Whether another trial, no larger, was ahead by more than `margin` of WER at the same rung.

    The margin stands for what the rest of the training may still change and for the noise of a dev split: wide, so that
    a member of the front is not dropped.
    """
    return any(o.step == here.step and o.params <= here.params and o.wer + margin < here.wer for o in others)
