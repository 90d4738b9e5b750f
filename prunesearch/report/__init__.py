"""Records in, report out: the front, the paired differences and the tables of a study. Never trains, never proposes."""

import json
import os
import tempfile
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.mistakes import StudyError
from prunesearch.report.comparison import Best, Comparison, Contrast, Reductions, compare
from prunesearch.report.data import to_csv, to_json
from prunesearch.report.front import non_dominated, pareto_front
from prunesearch.report.statistics import Difference, paired_bootstrap
from prunesearch.report.tables import render, tables, verdict
from prunesearch.scan import read_scan

__all__ = [
    "Best",
    "Comparison",
    "Contrast",
    "Difference",
    "Reductions",
    "compare",
    "non_dominated",
    "paired_bootstrap",
    "pareto_front",
    "render",
    "to_csv",
    "to_json",
    "verdict",
    "write_report",
]


def write_report(config: StudyConfig) -> Comparison:
    """Compare the study's records and write `run/report/`: front.{png,svg,pdf} and report.{html,md,tex,csv,json}.

    All files are made beside the folder first and then moved in, so that a reader never meets half a file. Raises StudyError
    when nothing was launched yet.
    """
    from prunesearch.report.page import render_page
    from prunesearch.report.papers import to_latex, to_markdown
    from prunesearch.report.plots import write_figures

    if not (config.run_folder / "records").is_dir():
        raise StudyError([f"{config.name} has no records yet: `prunesearch launch {config.source}`"])
    scan = read_scan(config.run_folder / "scan" / "scan.json")
    comparison = compare(config.run_folder / "records", config.search.params_objective, config.name, scan)
    report = config.run_folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.run_folder, prefix=".report.") as name:
        made = Path(name)
        write_figures(comparison, made)
        (made / "report.html").write_text(render_page(comparison), encoding="utf-8")
        (made / "report.md").write_text(to_markdown(tables(comparison)), encoding="utf-8")
        (made / "report.tex").write_text(to_latex(tables(comparison)), encoding="utf-8")
        (made / "report.csv").write_text(to_csv(comparison), encoding="utf-8")
        (made / "report.json").write_text(
            json.dumps(to_json(comparison), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for file in made.iterdir():
            os.replace(file, report / file.name)
    return comparison
