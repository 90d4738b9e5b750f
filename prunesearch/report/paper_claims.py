"""The published claims (arXiv 2603.27981), and what this study measured: each with an interval, and a word.

A claim of a direction *holds* where the 95 % interval lies on its side of zero, and *does not hold* where it lies on the
other. A claim of a size holds where the interval lies on its side of zero and meets the published range, and does not hold
where the two do not meet. Everything else *cannot be said*.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prunesearch.report.statistics import Counts, Difference, paired_bootstrap, relative_bootstrap
from prunesearch.study.record import UtteranceResult

Word = Literal["holds", "does not hold", "cannot be said"]

KINDS = ("substitutions", "deletions", "insertions")
LORA_RANGES = {"da": (-7.0, -4.0), "nl": (-21.0, -11.0), "en": (-21.0, -11.0)}  # % of all errors
COST_RANGE = (2.0, 4.0)  # % of WER
SAVED_RANGE = (7.0, 14.0)  # % of the speech side's parameters


@dataclass(frozen=True)
class Finding:
    """One claim, for one language where it differs by language: what was published and measured, in `unit`."""

    claim: str
    language: str | None
    unit: str  # "%" or "points"
    published: tuple[float, float] | None
    measured: float
    low: float
    high: float
    word: Word
    exact: bool = False  # counted, not estimated


@dataclass(frozen=True)
class Decoded:
    """Two systems on the same utterances of a split, in the same order: the results of each training of each of them."""

    system: Sequence[Sequence[UtteranceResult]]
    reference: Sequence[Sequence[UtteranceResult]]
    alike: bool = True  # whether the trainings are the same repeats, and so had the same seeds and batches

    def of(self, language: str | None) -> "Decoded":
        if language is None:
            return self

        def only(trainings: Sequence[Sequence[UtteranceResult]]) -> list[list[UtteranceResult]]:
            return [[u for u in results if u.language == language] for results in trainings]

        return Decoded(only(self.system), only(self.reference), self.alike)

    def counts(self, kind: str) -> tuple[Counts, Counts]:
        """Errors of a kind (`errors`: all) per training and utterance, of both: (trainings, utterances) each."""
        first, second = (
            np.array([[getattr(u.errors, kind) for u in results] for results in trainings], dtype=np.int64)
            for trainings in (self.system, self.reference)
        )
        return first, second

    @property
    def words(self) -> Counts:
        return np.array([u.errors.reference_words for u in self.system[0]], dtype=np.int64)

    @property
    def languages(self) -> list[str]:
        return sorted({u.language for u in self.system[0] if u.language})


def sized(change: Difference, published: tuple[float, float]) -> Word:
    """The word for a claim that a change, in %, lies in a range on one side of zero."""
    low, high = 100 * change.low, 100 * change.high
    if low == high:  # one error, or one utterance with errors: every resample says the same
        return "cannot be said"
    if high < published[0] or low > published[1]:
        return "does not hold"
    one_side = low > 0 if published[0] > 0 else high < 0
    return "holds" if one_side else "cannot be said"


def directed(change: Difference, falls: bool) -> Word:
    """The word for a claim that something falls, or rises."""
    if change.low <= 0 <= change.high or change.low == change.high:
        return "cannot be said"
    return "holds" if (change.high < 0) == falls else "does not hold"


def findings(pairs: dict[tuple[str, str], Decoded], saved: float | None) -> Iterator[Finding]:
    """What can be measured of the claims. `pairs`: (system, reference) by baselines' names; `saved`: the share of the speech
    side's parameters that top2+lora saves against unpruned."""
    if top2 := pairs.get(("top2", "unpruned")):
        for language in _languages(top2):
            change = relative(top2.of(language), "errors")
            yield _sized("two layers cost 2–4 % of WER", language, change, COST_RANGE)
    if repaired := pairs.get(("top2+lora", "unpruned")):
        for language in _languages(repaired):
            part = repaired.of(language)
            first, second = part.counts("errors")
            change = paired_bootstrap(first, second, part.words, by_training=part.alike)
            name = "two layers less, with LoRA, beat the whole encoder without"
            yield Finding(name, language, "points", None, *_percent(change), directed(change, falls=True))
    if saved is not None:
        low, high = SAVED_RANGE
        word: Word = "holds" if low <= 100 * saved <= high else "does not hold"
        name = "two layers less, with LoRA, save 7–14 % of the parameters (of the speech side)"
        yield Finding(name, None, "%", SAVED_RANGE, *(3 * (100 * saved,)), word, exact=True)
    for system, reference in (("unpruned+lora", "unpruned"), ("top2+lora", "top2")):
        if decoded := pairs.get((system, reference)):
            languages: list[str | None] = [*decoded.languages]
            for language in languages or [None]:
                change = relative(decoded.of(language), "errors")
                published = LORA_RANGES.get(language or "", (-21.0, -4.0))
                claim = f"LoRA takes {-published[1]:g}–{-published[0]:g} % of all errors away ({system} against {reference})"
                yield _sized(claim, language, change, published)
            if "da" in decoded.languages:
                change = relative(decoded.of("da"), "insertions")
                if math.isnan(change.estimate):  # there were none to rise
                    continue
                name = f"LoRA adds insertions in Danish ({system} against {reference})"
                yield Finding(name, "da", "%", None, *_percent(change), directed(change, falls=False))


def relative(decoded: Decoded, kind: str) -> Difference:
    """How much more (or fewer) errors of a kind the system makes than the reference, as a fraction of the reference's."""
    return relative_bootstrap(*decoded.counts(kind), by_training=decoded.alike)


def _languages(decoded: Decoded) -> list[str | None]:
    """All together; and each by itself, where there are several."""
    return [None, *decoded.languages] if len(decoded.languages) > 1 else [None]


def _sized(claim: str, language: str | None, change: Difference, published: tuple[float, float]) -> Finding:
    return Finding(claim, language, "%", published, *_percent(change), sized(change, published))


def _percent(change: Difference) -> tuple[float, float, float]:
    return 100 * change.estimate, 100 * change.low, 100 * change.high
