"""Tables of layers: how often each layer is removed, and the loss without it."""

from collections.abc import Sequence

from prunesearch.report.comparison import Comparison
from prunesearch.report.table import Table
from prunesearch.report.values import CRITERION_LABELS, UNKNOWN
from prunesearch.study.front import dev_wer, pareto_front
from prunesearch.study.record import RunRecord


def layers_table(comparison: Comparison) -> Table:
    """How often each layer is removed: on the front, on each language's own front, and near the front.

    If the study was scanned, the last column is the loss without this layer.
    """
    columns = _candidates_by_column(comparison)
    depth = max((r.encoder_layers for some in columns.values() for r in some), default=0)
    alone = comparison.importance
    rows = []
    for layer in range(depth):
        cells = [_share(layer, some) for some in columns.values()]
        if alone:
            cells.append(f"{alone[layer]:.3f}" if layer in alone else UNKNOWN)
        rows.append((str(layer), *cells))
    note = (
        "Candidates with at least one removed layer. The better half by size: of all candidates with the same number of "
        "removed layers, the half of lower dev WER."
    )
    if alone:
        label = CRITERION_LABELS["delta_loss"]
        note += f" {label}: of the anchor's system without this layer alone, repaired if the study repairs, before training."
    return Table(
        "layers",
        "How often a layer is removed",
        ("layer", *columns, *([CRITERION_LABELS["delta_loss"]] if alone else [])),
        tuple(rows),
        note,
    )


def _candidates_by_column(comparison: Comparison) -> dict[str, list[RunRecord]]:
    """The candidates that each column counts."""
    complete = _with_removed_layers(comparison.complete)
    languages = sorted({language for r in complete if r.dev for language in r.dev.by_language})
    columns = {"on the front": _with_removed_layers(comparison.front)}
    for language in languages if len(languages) > 1 else ():
        front = pareto_front(comparison.complete, comparison.objective, language=language)
        columns[f"front of {language}"] = _with_removed_layers(front)
    columns["better half by size"] = [r for some in better_half_by_size(complete).values() for r in some]
    columns["all tried"] = complete
    return columns


def layers_by_size_table(comparison: Comparison) -> Table:
    """How often each layer is removed, for each number of removed layers."""
    halves = better_half_by_size(_with_removed_layers(comparison.complete))
    depth = max((r.encoder_layers for some in halves.values() for r in some), default=0)
    rows = tuple((str(layer), *(_share(layer, some) for some in halves.values())) for layer in range(depth))
    return Table(
        "layers-by-size",
        "How often a layer is removed, by number of removed layers",
        ("layer", *(f"{count} removed" for count in halves)),
        rows if len(halves) > 1 else (),
        "Of all candidates with that number of removed layers, the half of lower dev WER.",
    )


def better_half_by_size(records: Sequence[RunRecord]) -> dict[int, list[RunRecord]]:
    """For each number of removed layers, the half of the records with the lower dev WER (rounded up)."""
    found = {}
    for count in sorted({len(r.removed_layers) for r in records}):
        same = sorted((r for r in records if len(r.removed_layers) == count), key=dev_wer)
        found[count] = same[: -(-len(same) // 2)]
    return found


def _with_removed_layers(records: Sequence[RunRecord]) -> list[RunRecord]:
    return [r for r in records if r.removed_layers]


def _share(layer: int, records: Sequence[RunRecord]) -> str:
    return f"{sum(layer in r.removed_layers for r in records)} of {len(records)}" if records else UNKNOWN
