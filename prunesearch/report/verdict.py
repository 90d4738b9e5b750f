"""The result of a study so far, in sentences."""

from collections.abc import Iterator

from prunesearch.report.comparison import Comparison, Contrast
from prunesearch.report.paper_claims import FAIR_CONTROL
from prunesearch.report.values import OBJECTIVE_NOUNS, millions, named, points, title, wer_percent
from prunesearch.study.front import within_group_limit


def verdict(comparison: Comparison) -> tuple[str, ...]:
    """The number of candidates, whether any of them beats the baseline top2+lora, and how the baselines differ."""
    contrasts = (_difference(c) for c in comparison.differences if c.difference is not None)
    sentences = (_counts(comparison), *_winner(comparison), *contrasts)
    return tuple(named(sentence, comparison.rate) for sentence in sentences)


def _counts(comparison: Comparison) -> str:
    counts = (
        f"Candidates: {len(comparison.complete)} complete, {len(comparison.pruned)} ended at a rung, "
        f"{len(comparison.failed)} failed; {len(comparison.front)} on the front."
    )
    if not (limit := comparison.max_worst_group_wer):
        return counts
    above = sum(not within_group_limit(r, limit) for r in comparison.complete)
    return f"{counts} {above} are excluded because their worst group's dev WER is above {100 * limit:g} %."


def _winner(comparison: Comparison) -> Iterator[str]:
    noun = OBJECTIVE_NOUNS[comparison.objective]
    name = comparison.to_beat
    if name not in comparison.baselines:
        yield f"Nothing can be compared with {name} yet: it is not evaluated."
        return
    to_beat, winner = comparison.baselines[name], comparison.winner
    size = to_beat.parameters.of(comparison.objective)
    if winner is None:
        yield (
            f"Nothing found beats {name}: no candidate has at most {millions(size)} M {noun} and a dev WER below "
            f"{wer_percent(to_beat.dev)} %."
        )
        return
    saved = size - winner.system.parameters.of(comparison.objective)
    fewer = f"{millions(saved)} M fewer {noun}" if saved else f"the same number of {noun}"
    count = len(comparison.dominating)
    beat = f"{count} candidates beat {name}: they have" if count > 1 else f"One candidate beats {name}: it has"
    yield (
        f"{beat} no more {noun} and a lower dev WER. {'The best' if count > 1 else 'This'} is {title(winner.system)}, with "
        f"{fewer} and a dev WER of {wer_percent(winner.system.dev)} % instead of {wer_percent(to_beat.dev)} %."
    )
    if winner.system.name:
        yield f"{winner.system.name} is a baseline, too."
    if winner.difference is None:
        yield "The difference has no interval, because the utterances of both are not stored."
        return
    yield _difference(winner)
    if winner.split == "dev":
        yield "The candidate was also chosen on dev, so this difference is biased in its favour; decode test for a fair one."


def _difference(contrast: Contrast) -> str:
    system, reference, found = title(contrast.system), title(contrast.reference), contrast.difference
    assert found is not None
    size = f"{points(found.estimate)} points (95 % interval {points(found.low)} to {points(found.high)})"
    control = (contrast.system.name, contrast.reference.name) == FAIR_CONTROL
    note = " This is the fair control: LoRA on both sides." if control else ""
    if found.verdict in ("lower", "higher"):
        return f"On {contrast.split}, {system} has a {found.verdict} WER than {reference}: {size}.{note}"
    return f"On {contrast.split}, {found.verdict} between {system} and {reference}: {size}.{note}"
