"""Several studies side by side: a table with one row per study."""

from collections.abc import Sequence

from prunesearch.report.comparison import Comparison
from prunesearch.report.table import Table
from prunesearch.report.values import UNKNOWN, millions, points, signed, title, wer_percent
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord


def check_comparable(comparisons: Sequence[Comparison]) -> None:
    """Raises StudyError if the studies have different objectives, or if two of them have the same name."""
    objectives = {c.study: c.objective for c in comparisons}
    if len(objectives) < len(comparisons):
        names = [c.study for c in comparisons]
        twice = next(name for name in names if names.count(name) > 1)
        raise StudyError([f"name: studies in one report must have different names, got {twice} more than once"])
    if len(set(objectives.values())) > 1:
        got = ", ".join(f"{objective} in {study}" for study, objective in objectives.items())
        raise StudyError([f"search.params_objective: studies in one report must have the same one, got {got}"])
    if len({c.rate for c in comparisons}) > 1:
        got = ", ".join(f"{c.rate} in {c.study}" for c in comparisons)
        raise StudyError([f"text.metric: studies in one report must count errors in the same unit, got {got}"])


def overlay_table(comparisons: Sequence[Comparison]) -> Table:
    """For each study: its baselines, the candidate chosen on dev against top2+lora, and the hypervolume of its front."""
    names = ("unpruned", "top2", "top2+lora")
    rows = []
    for c in comparisons:
        chosen, found = c.chosen, c.winner.difference if c.winner else None
        rows.append(
            (
                c.study,
                str(len(c.complete)),
                *(wer_percent(c.baselines[name].dev) if name in c.baselines else UNKNOWN for name in names),
                title(chosen) if chosen else UNKNOWN,
                wer_percent(chosen.dev) if chosen else UNKNOWN,
                _size(c, chosen) if chosen else UNKNOWN,
                f"{points(found.estimate)} ({points(found.low)} to {points(found.high)})" if found else UNKNOWN,
                _hypervolume_ratio(c),
            )
        )
    return Table(
        "studies",
        "Studies side by side, dev WER in %",
        ("study", "complete", *names, "chosen", "its dev WER", "parameters", "against top2+lora, points", "hypervolume"),
        tuple(rows),
        "Chosen: of the candidates that beat top2+lora with no more parameters, the one of lowest dev WER; if none does, the "
        "front's knee. Parameters (of the objective): change against the unpruned system. Against top2+lora: difference of WER "
        "with its 95 % interval, on test if both were decoded there. Hypervolume: of the front, over that of the baselines "
        "alone.",
        text_columns=("chosen",),
    )


def _size(comparison: Comparison, record: RunRecord) -> str:
    size = record.parameters.of(comparison.objective)
    if comparison.unpruned is None:
        return f"{millions(size)} M"
    return f"{signed(100 * (size / comparison.unpruned.of(comparison.objective) - 1))} %"


def _hypervolume_ratio(comparison: Comparison) -> str:
    volumes = comparison.hypervolumes
    return f"×{volumes['front'] / volumes['baselines']:.2f}" if volumes.get("baselines") else UNKNOWN
