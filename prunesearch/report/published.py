"""Published word error rates of the study's encoder and language, shown for orientation.

They were measured on Common Voice 22 in front of Qwen2.5-3B, after thousands of steps from scratch, without LoRA. The training
budget differs from the study's, so they do not compete.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from prunesearch.study.record import RunRecord

PAPER = "arXiv 2603.27981"
FOLLOW_UP = "Pruning for Efficiency, Paying in Fairness"


@dataclass(frozen=True)
class Published:
    """WER (a fraction) of an encoder without its top layers."""

    encoder: str
    language: str
    top_layers_removed: int
    wer: float
    source: str


NUMBERS = (
    *(Published("whisper-large-v2", "en", top, wer, FOLLOW_UP) for top, wer in ((0, 0.1518), (2, 0.1668))),
    *(
        Published("whisper-small", "da", top, wer, f"{PAPER}, preliminary")
        for top, wer in ((0, 0.4218), (2, 0.4846), (4, 0.5283), (6, 0.5674))
    ),
    Published("whisper-base", "da", 0, 0.6472, f"{PAPER}, preliminary"),
)


@dataclass(frozen=True)
class PublishedPoint:
    """Where a published system lies in a study's plot."""

    params: int  # of the study's objective, with the study's own projector
    wer: float
    label: str


def published_points(records: Iterable[RunRecord], objective: str) -> tuple[PublishedPoint, ...]:
    """The published systems of the study's encoder and language.

    Empty if the study has several languages, or no records from which the size of a layer follows.
    """
    records = list(records)
    whole = next((r for r in records if not r.removed_layers and not r.lora_rank), None)
    part = next((r for r in records if r.removed_layers), None)
    if whole is None or part is None or whole.dev is None:
        return ()
    encoder = str((whole.provenance.get("config", {}).get("encoder") or {}).get("model", "")).rsplit("/", 1)[-1]
    layer = (whole.parameters.encoder - part.parameters.encoder) // len(part.removed_layers)
    return tuple(
        PublishedPoint(
            whole.parameters.of(objective) - p.top_layers_removed * layer,
            p.wer,
            f"published{f', top {p.top_layers_removed} removed' if p.top_layers_removed else ''} ({p.source})",
        )
        for p in NUMBERS
        if p.encoder == encoder and set(whole.dev.by_language) == {p.language}
    )
