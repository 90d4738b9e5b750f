"""Records in, report out: the front, paired differences and tables of a study. This room never trains and never proposes."""

import json
from collections.abc import Sequence
from pathlib import Path

from prunesearch.report.comparison import Best, Comparison, Contrast, Reductions, compare
from prunesearch.report.data import to_csv, to_json
from prunesearch.report.overlay import check_comparable, overlay_table
from prunesearch.report.statistics import Difference, paired_bootstrap
from prunesearch.report.tables import render, render_overlay, render_tables, tables
from prunesearch.report.verdict import verdict
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.files import staged_files
from prunesearch.study.front import non_dominated, pareto_front
from prunesearch.study.importance import read_scan
from prunesearch.study.measurement import read_measurement
from prunesearch.study.record import read_records

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
    "render_overlay",
    "render_tables",
    "report_folder",
    "to_csv",
    "to_json",
    "verdict",
    "write_comparison",
    "write_overlay",
    "write_report",
]


def write_report(config: StudyConfig, folder: Path | None = None) -> Comparison:
    """Compare the study's records, and write front.{png,svg,pdf} and report.{html,md,tex,csv,json}.

    `folder` is where to write; by default it is `run/report/`. Raises StudyError if the study was not launched yet, or if the
    folder cannot be written to.
    """
    comparison = comparison_of(config)
    write_comparison(comparison, folder or report_folder(config))
    return comparison


def report_folder(config: StudyConfig) -> Path:
    """Where a study's report is written by default."""
    return config.run_folder / "report"


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write front.{png,svg,pdf} and report.{html,md,tex,csv,json}. Raises NotWritable if the folder cannot be written to."""
    from prunesearch.report.formats import to_latex, to_markdown
    from prunesearch.report.page import render_page
    from prunesearch.report.plots import draw_front, write_figures

    with staged_files(folder) as staged:
        write_figures(draw_front(comparison), staged)
        _write(staged / "report.html", render_page(comparison))
        _write(staged / "report.md", to_markdown(tables(comparison)))
        _write(staged / "report.tex", to_latex(tables(comparison)))
        _write(staged / "report.csv", to_csv([comparison]))
        _write(staged / "report.json", _as_json(to_json(comparison)))


def write_overlay(configs: Sequence[StudyConfig], folder: Path) -> list[Comparison]:
    """Compare several studies, and write overlay.{png,svg,pdf,html,md,tex,csv,json} to the folder.

    Raises StudyError if the studies cannot be compared, if one was not launched yet, or if the folder cannot be written to.
    """
    from prunesearch.report.formats import to_latex, to_markdown
    from prunesearch.report.page import render_overlay_page
    from prunesearch.report.plots import draw_fronts, write_figures

    comparisons = [comparison_of(config) for config in configs]
    check_comparable(comparisons)
    table = [overlay_table(comparisons).about(comparisons[0].rate)]
    with staged_files(folder) as staged:
        write_figures(draw_fronts(comparisons), staged, "overlay")
        _write(staged / "overlay.html", render_overlay_page(comparisons))
        _write(staged / "overlay.md", to_markdown(table))
        _write(staged / "overlay.tex", to_latex(table))
        _write(staged / "overlay.csv", to_csv(comparisons))
        _write(staged / "overlay.json", _as_json([to_json(c) for c in comparisons]))
    return comparisons


def comparison_of(config: StudyConfig) -> Comparison:
    """Compare the study's records as they are now. Raises StudyError if the study was not launched yet."""
    folder, search = config.run_folder, config.search
    if not (folder / "records").is_dir():
        raise StudyError([f"{config.name} has no records yet: `prunesearch launch {config.source}`"])
    read_records(folder / "records", config.name)  # a renamed study, or a record of another one, is named
    return compare(
        folder / "records",
        search.params_objective,
        config.name,
        scan=read_scan(folder / "scan" / "scan.json", config.name),
        max_worst_group_wer=search.max_worst_group_wer,
        measured=read_measurement(folder / "measure.json"),
    )


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _as_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
