"""Several studies on one page: their fronts in one plot, and a line for each of them."""

from collections.abc import Sequence

from prunesearch.report.comparison import Comparison
from prunesearch.report.tables import Table, millions, points, signed, title, wer_percent
from prunesearch.study.errors import StudyError


def check_comparable(comparisons: Sequence[Comparison]) -> None:
    """Raises StudyError where the studies' axes differ, or a name stands for two of them."""
    objectives = {c.study: c.objective for c in comparisons}
    if len(objectives) < len(comparisons):
        raise StudyError(["two of the studies have the same name: give one of them another (`name` in its file)"])
    if len(set(objectives.values())) > 1:
        told = ", ".join(f"{study} {objective}" for study, objective in objectives.items())
        raise StudyError([f"search.params_objective: must be the same for studies in one plot, got {told}"])


def overlay_table(comparisons: Sequence[Comparison]) -> Table:
    """For each study: its baselines, what dev chooses against the published pruning, and how far its front reaches."""
    columns = ("study", "complete", "unpruned", "top2", "top2+lora", "dev chooses", "its dev WER", "parameters")
    rows = []
    for c in comparisons:
        chosen = c.winner.system if c.winner else c.knee
        found = c.winner.difference if c.winner else None
        rows.append(
            (
                c.study,
                str(len(c.complete)),
                *(wer_percent(c.baselines[name].dev) if name in c.baselines else "–" for name in columns[2:5]),
                title(chosen) if chosen else "–",
                wer_percent(chosen.dev) if chosen else "–",
                _fewer(c) if chosen else "–",
                f"{points(found.estimate)} ({points(found.low)} to {points(found.high)})" if found else "–",
                _reach(c),
            )
        )
    return Table(
        "Studies side by side, dev WER in %",
        (*columns, "against top2+lora, points", "hypervolume"),
        tuple(rows),
        "Dev chooses the lowest WER of those that beat top2+lora at no more parameters, else the front's knee. Parameters: "
        "change against the unpruned system (of the objective's group). The difference is on test where both are decoded "
        "there, with its 95 % interval. Hypervolume: of the front, over that of the baselines alone.",
    )


def _fewer(comparison: Comparison) -> str:
    chosen = comparison.winner.system if comparison.winner else comparison.knee
    assert chosen
    if comparison.unpruned is None:
        return millions(chosen.parameters.of(comparison.objective))
    whole = comparison.unpruned.of(comparison.objective)
    return f"{signed(100 * (chosen.parameters.of(comparison.objective) / whole - 1))} %"


def _reach(comparison: Comparison) -> str:
    volumes = comparison.hypervolumes
    return f"×{volumes['front'] / volumes['baselines']:.2f}" if volumes.get("baselines") else "–"
