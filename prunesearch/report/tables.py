"""All tables of a study's report by name, and the terminal's output."""

import difflib
from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from prunesearch.report import error_tables, layer_tables, system_tables
from prunesearch.report.comparison import Comparison
from prunesearch.report.formats import to_rich
from prunesearch.report.overlay import overlay_table
from prunesearch.report.table import Table
from prunesearch.report.verdict import verdict
from prunesearch.study.errors import StudyError

TABLES: dict[str, Callable[[Comparison], Table]] = {
    "systems": system_tables.systems_table,
    "repair": system_tables.repair_table,
    "parameters": system_tables.parameters_table,
    "removed": system_tables.removed_table,
    "contrasts": system_tables.contrasts_table,
    "paper-claims": system_tables.paper_claims_table,
    "layers": layer_tables.layers_table,
    "layers-by-size": layer_tables.layers_by_size_table,
    "languages": error_tables.languages_table,
    "lora": error_tables.lora_table,
    "pruning": error_tables.pruning_table,
    "failures": error_tables.failures_table,
    "groups": error_tables.groups_table,
    "measurement": system_tables.ratios_table,
    "confusions": error_tables.confusions_table,
    "worse": error_tables.worse_table,
    "better": error_tables.better_table,
}
ALL = "all"


def tables(comparison: Comparison) -> list[Table]:
    """The tables that have rows, in the order of TABLES."""
    return [table.about(comparison.rate) for make in TABLES.values() if (table := make(comparison)).rows]


def checked_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of tables from a user's list, in which commas may separate names, too; `all` stands for all of them.

    Raises StudyError for unknown names.
    """
    asked = [name.strip() for part in names for name in part.split(",") if name.strip()]
    unknown = [name for name in asked if name not in TABLES and name != ALL]
    if unknown:
        near = difflib.get_close_matches(unknown[0], TABLES, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise StudyError([f"--tables must be {ALL} or some of {', '.join(TABLES)}; got {', '.join(unknown)}{guess}"])
    return tuple(TABLES) if ALL in asked else tuple(dict.fromkeys(asked))


def render(comparison: Comparison) -> RenderableType:
    """One screen for a rich console: the verdict, and the front with its baselines."""
    summary = system_tables.summary_table(comparison).about(comparison.rate)
    parts: list[RenderableType] = [Text(comparison.study, style="bold"), Text("\n".join(verdict(comparison)) + "\n")]
    return Group(*parts, *([to_rich(summary)] if summary.rows else []))


def render_overlay(comparisons: Sequence[Comparison]) -> RenderableType:
    """Several studies for a rich console: a table with one row per study."""
    return to_rich(overlay_table(comparisons).about(comparisons[0].rate))


def render_tables(comparison: Comparison, names: Iterable[str]) -> RenderableType:
    """Tables for a rich console. `names` are keys of TABLES. For a table without rows, a line says so."""
    made = [TABLES[name](comparison).about(comparison.rate) for name in names]
    return Group(*(to_rich(t) if t.rows else Text(f"{t.title}: nothing to show ({comparison.study})\n") for t in made))
