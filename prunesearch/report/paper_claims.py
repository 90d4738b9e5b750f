"""The paper's claims (arXiv 2603.27981) and what this study measured: each with a 95 % interval and a verdict.

A claim about a direction *holds* if the interval lies on the claimed side of zero, and *does not hold* if it lies on the
other side. A claim about a size *holds* if the interval lies on the claimed side of zero and overlaps the published range,
and *does not hold* if the two do not overlap. In all other cases the verdict is *cannot be said*.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prunesearch.report.decodings import DecodedPair
from prunesearch.report.statistics import Difference

Verdict = Literal["holds", "does not hold", "cannot be said"]
SystemNames = tuple[str, str]  # a system and its reference, by the names of baselines

# The comparisons behind the paper's claims and, last, the control that the paper lacks: LoRA on both sides.
PAPER_CONTRASTS: tuple[SystemNames, ...] = (
    ("top2", "unpruned"),
    ("top2+lora", "unpruned"),
    ("top2+lora", "unpruned+lora"),
)
FAIR_CONTROL = PAPER_CONTRASTS[-1]
LORA_CONTRASTS: tuple[SystemNames, ...] = (("unpruned+lora", "unpruned"), ("top2+lora", "top2"))

LORA_RANGES = {"da": (-7.0, -4.0), "nl": (-21.0, -11.0), "en": (-21.0, -11.0)}  # % of all errors
ANY_LORA_RANGE = (-21.0, -4.0)  # for a language that the paper does not have
PRUNING_RANGE = (2.0, 4.0)  # % of WER
SAVED_RANGE = (7.0, 14.0)  # % of the speech parameters


@dataclass(frozen=True)
class PaperClaim:
    """One claim, for one language if it differs by language: what was published, and what was measured, in `unit`."""

    claim: str
    language: str | None
    unit: str  # "%" or "points"
    published: tuple[float, float] | None
    measured: float
    low: float
    high: float
    verdict: Verdict
    exact: bool = False  # counted, not estimated


def verdict_on_size(change: Difference, published: tuple[float, float]) -> Verdict:
    """The verdict on the claim that a change lies in the published range, in %, which lies on one side of zero."""
    low, high = 100 * change.low, 100 * change.high
    if low == high:  # there is one error, or one utterance with errors: all resamples give the same value
        return "cannot be said"
    if high < published[0] or low > published[1]:
        return "does not hold"
    on_side = low > 0 if published[0] > 0 else high < 0
    return "holds" if on_side else "cannot be said"


def verdict_on_direction(change: Difference, falls: bool) -> Verdict:
    """The verdict on the claim that a value falls (or, if `falls` is false, rises)."""
    if change.low <= 0 <= change.high or change.low == change.high:
        return "cannot be said"
    return "holds" if (change.high < 0) == falls else "does not hold"


def check_paper_claims(pairs: Mapping[SystemNames, DecodedPair], saved: float | None) -> Iterator[PaperClaim]:
    """All claims that can be checked.

    `pairs`: those of PAPER_CONTRASTS and LORA_CONTRASTS that were decoded. `saved`: the fraction of the speech parameters
    that top2+lora saves against unpruned, if it is known.
    """
    if pair := pairs.get(("top2", "unpruned")):
        yield from _pruning_claims(pair)
    if pair := pairs.get(("top2+lora", "unpruned")):
        yield from _replacement_claims(pair)
    if saved is not None:
        yield _saving_claim(saved)
    for names in LORA_CONTRASTS:
        if pair := pairs.get(names):
            yield from _lora_claims(names, pair)


def _pruning_claims(pair: DecodedPair) -> Iterator[PaperClaim]:
    for language in _languages(pair):
        change = pair.in_language(language).relative_change()
        yield _claim_on_size("removing two layers raises WER by 2–4 %", language, change, PRUNING_RANGE)


def _replacement_claims(pair: DecodedPair) -> Iterator[PaperClaim]:
    for language in _languages(pair):
        change = pair.in_language(language).difference()
        claim = "two layers removed and LoRA added: lower WER than the unpruned encoder without LoRA"
        yield PaperClaim(claim, language, "points", None, *_percent(change), verdict_on_direction(change, falls=True))


def _saving_claim(saved: float) -> PaperClaim:
    percent, (low, high) = 100 * saved, SAVED_RANGE
    verdict: Verdict = "holds" if low <= percent <= high else "does not hold"
    claim = "two layers removed and LoRA added: 7–14 % fewer speech parameters"
    return PaperClaim(claim, None, "%", SAVED_RANGE, percent, percent, percent, verdict, exact=True)


def _lora_claims(names: SystemNames, pair: DecodedPair) -> Iterator[PaperClaim]:
    between = "{} against {}".format(*names)
    languages: list[str | None] = [*pair.languages] or [None]
    for language in languages:
        change = pair.in_language(language).relative_change()
        published = LORA_RANGES.get(language or "", ANY_LORA_RANGE)
        claim = f"LoRA removes {-published[1]:g}–{-published[0]:g} % of all errors ({between})"
        yield _claim_on_size(claim, language, change, published)
    if "da" in pair.languages:
        change = pair.in_language("da").relative_change("insertions")
        if not math.isnan(change.estimate):  # NaN: the reference makes no insertions
            claim = f"LoRA adds insertions in Danish ({between})"
            yield PaperClaim(claim, "da", "%", None, *_percent(change), verdict_on_direction(change, falls=False))


def _languages(pair: DecodedPair) -> list[str | None]:
    """All languages together (None) and, if there are several, each by itself."""
    return [None, *pair.languages] if len(pair.languages) > 1 else [None]


def _claim_on_size(claim: str, language: str | None, change: Difference, published: tuple[float, float]) -> PaperClaim:
    return PaperClaim(claim, language, "%", published, *_percent(change), verdict_on_size(change, published))


def _percent(change: Difference) -> tuple[float, float, float]:
    return 100 * change.estimate, 100 * change.low, 100 * change.high
