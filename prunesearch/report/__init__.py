"""Records in, report out: the front, the paired differences and the tables of a study. Never trains, never proposes."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prunesearch.report.comparison import Best, Comparison, Contrast, Reductions, compare
from prunesearch.report.data import to_csv, to_json
from prunesearch.report.overlay import check_comparable, overlay_table
from prunesearch.report.statistics import Difference, paired_bootstrap
from prunesearch.report.tables import render, tables, verdict
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.front import non_dominated, pareto_front
from prunesearch.study.importance import read_scan
from prunesearch.study.measurement import read_measurement

__all__ = [
    "Best",
    "Comparison",
    "Contrast",
    "Difference",
    "Reductions",
    "compare",
    "comparison_of",
    "non_dominated",
    "paired_bootstrap",
    "pareto_front",
    "render",
    "to_csv",
    "to_json",
    "verdict",
    "write_overlay",
    "write_report",
]


def write_report(config: StudyConfig, folder: Path | None = None) -> Comparison:
    """Compare the study's records and write front.{png,svg,pdf} and report.{html,md,tex,csv,json} to the folder (default:
    `run/report/`).

    Raises StudyError when nothing was launched yet.
    """
    from prunesearch.report.formats import to_latex, to_markdown
    from prunesearch.report.page import render_page
    from prunesearch.report.plots import draw_front, write_figures

    comparison = comparison_of(config)
    with _moved_in(folder or config.run_folder / "report") as made:
        write_figures(draw_front(comparison), made)
        _write(made / "report.html", render_page(comparison))
        _write(made / "report.md", to_markdown(tables(comparison)))
        _write(made / "report.tex", to_latex(tables(comparison)))
        _write(made / "report.csv", to_csv([comparison]))
        _write(made / "report.json", _as_json(to_json(comparison)))
    return comparison


def write_overlay(configs: Sequence[StudyConfig], folder: Path) -> list[Comparison]:
    """Several studies side by side: overlay.{png,svg,pdf,html,md,tex,csv,json} in the folder.

    Raises StudyError where they cannot be compared, or nothing was launched yet.
    """
    from prunesearch.report.formats import to_latex, to_markdown
    from prunesearch.report.page import render_overlay
    from prunesearch.report.plots import draw_fronts, write_figures

    comparisons = [comparison_of(config) for config in configs]
    check_comparable(comparisons)
    table = [overlay_table(comparisons)]
    with _moved_in(folder) as made:
        write_figures(draw_fronts(comparisons), made, "overlay")
        _write(made / "overlay.html", render_overlay(comparisons))
        _write(made / "overlay.md", to_markdown(table))
        _write(made / "overlay.tex", to_latex(table))
        _write(made / "overlay.csv", to_csv(comparisons))
        _write(made / "overlay.json", _as_json([to_json(c) for c in comparisons]))
    return comparisons


def comparison_of(config: StudyConfig) -> Comparison:
    """A study's records, compared. Raises StudyError when nothing was launched yet."""
    if not (config.run_folder / "records").is_dir():
        raise StudyError([f"{config.name} has no records yet: `prunesearch launch {config.source}`"])
    folder, search = config.run_folder, config.search
    scan, measured = read_scan(folder / "scan" / "scan.json"), read_measurement(folder / "measure.json")
    limit = search.max_worst_group_wer
    return compare(folder / "records", search.params_objective, config.name, scan, limit, measured)


@contextmanager
def _moved_in(folder: Path) -> Iterator[Path]:
    """A place to make files that then move into the folder, so that a reader never meets half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".report.") as name:
        made = Path(name)
        yield made
        for file in made.iterdir():
            os.replace(file, folder / file.name)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _as_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
