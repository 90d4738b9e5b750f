"""What a reader gets of a comparison: a screen, tables, files, JSON and CSV."""

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from prunesearch.report import (
    compare,
    comparison_of,
    render,
    render_tables,
    to_csv,
    to_json,
    verdict,
    write_overlay,
    write_report,
)
from prunesearch.report.data import RECORD_KEYS
from prunesearch.report.error_tables import failures_table, groups_table
from prunesearch.report.formats import to_html, to_latex, to_markdown, to_rich
from prunesearch.report.layer_tables import layers_by_size_table, layers_table
from prunesearch.report.overlay import check_comparable, overlay_table
from prunesearch.report.page import render_page
from prunesearch.report.plots import draw_front, draw_fronts, write_figures
from prunesearch.report.system_tables import summary_table, systems_table
from prunesearch.report.table import Shade, Table
from prunesearch.report.tables import TABLES, checked_names, tables
from prunesearch.study.candidate import BASELINE_NAMES, Candidate
from prunesearch.study.errors import StudyError
from prunesearch.study.files import staged_files
from prunesearch.study.record import SplitResult, read_records, write_record
from tests.report_records import FOUND, add, add_baselines, add_results, add_study, give_to_study, heard, study, wer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    add_study(tmp_path / "records")
    return tmp_path / "records"


def shown(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "cli.py", "report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# --- one screen ---


def add_long_front(records: Path) -> None:
    """Candidates that get better with every step in size, most of them on the front."""
    add_baselines(records)
    sizes = [Candidate(tuple(range(removed)), rank) for removed in range(1, 6) for rank in range(7, 0, -1)]
    for errors, candidate in enumerate(sizes, 2):
        add(records, candidate, errors, test=errors)


def test_a_report_fits_one_screen_however_long_the_front_is(tmp_path: Path) -> None:
    add_long_front(tmp_path)
    comparison = compare(tmp_path, "speech_params", "s")
    assert len(comparison.front) > 20
    lines = shown(render(comparison), width=110).splitlines()
    assert len(lines) <= 38  # and two more that say where the rest is
    assert all(len(line) <= 110 for line in lines)
    flat = " ".join(" ".join(lines).split())
    assert all(sentence in flat for sentence in verdict(comparison))


def test_a_thinned_front_keeps_its_ends_the_baselines_and_the_chosen_candidate(tmp_path: Path) -> None:
    add_long_front(tmp_path)
    comparison = compare(tmp_path, "speech_params", "s")
    table = summary_table(comparison)
    assert len(table.rows) <= 16
    listed = [(row[0].split(" ")[0], row[1], row[2]) for row in table.rows]
    assert {name for name, _, _ in listed} == {"found", *BASELINE_NAMES}
    for record in (comparison.front[0], comparison.front[-1], comparison.chosen, comparison.knee):
        assert record is not None
        what = " ".join(map(str, record.removed_layers)) or "–", str(record.lora_rank or "–")
        assert what in [row[1:] for row in listed]
    assert f"{len(comparison.front_and_baselines) - len(table.rows)} more members of the front" in table.note


def test_the_screen_shows_systems_with_their_wer_and_size(records: Path) -> None:
    rows = {row[0]: row[1:] for row in summary_table(compare(records, "speech_params", "s")).rows}
    dev, test = f"{100 * wer(2):.2f}", f"{100 * wer(1):.2f}"
    assert rows["found ● ★"] == ("1 2", "4", dev, test, "11.04", f"−{100 * (1 - 11.04 / 14):.2f} %")
    assert rows["unpruned"][4:] == ("14.00", "0.00 %")
    assert rows.keys() == {"found ● ★", "top2 ●", "top2+lora", "unpruned", "unpruned+lora ●"}


def test_the_command_prints_the_screen_and_says_where_the_rest_is(tmp_path: Path) -> None:
    config = study(tmp_path)
    add_study(config.run_folder / "records")
    done = report(config.source)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 40
    assert [title for make in TABLES.values() if (title := make(comparison_of(config)).title) in done.stdout] == []
    assert str(config.run_folder / "report" / "report.html") in done.stdout
    assert all(name in done.stdout for name in TABLES)


def test_the_command_prints_the_tables_that_are_asked_for(tmp_path: Path) -> None:
    config = study(tmp_path)
    add_study(config.run_folder / "records")
    done = report(config.source, "--tables", "layers,removed", "--tables", "groups")
    assert done.returncode == 0, done.stderr
    assert "How often a layer is removed" in done.stdout
    assert "Best candidate at each number of removed layers" in done.stdout
    assert "WER in % by group: nothing to show" in done.stdout
    assert "Candidates:" not in done.stdout


def test_an_unknown_table_is_one_line_that_lists_the_known_ones(tmp_path: Path) -> None:
    config = study(tmp_path)
    add_study(config.run_folder / "records")
    done = report(config.source, "--tables", "layer,systems")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert all(name in done.stderr for name in TABLES)
    assert "did you mean layers?" in done.stderr
    assert not (config.run_folder / "report").exists()


def test_names_of_tables_may_be_repeated_and_all_stands_for_all() -> None:
    assert checked_names([]) == ()
    assert checked_names(["lora, layers", "lora"]) == ("lora", "layers")
    assert checked_names(["lora,all"]) == tuple(TABLES)


def test_every_table_has_the_name_of_its_key(records: Path) -> None:
    comparison = compare(records, "speech_params", "s")
    assert {name: make(comparison).name for name, make in TABLES.items()} == {name: name for name in TABLES}
    text = " ".join(shown(render_tables(comparison, TABLES), width=200).split())
    assert [title for make in TABLES.values() if (title := make(comparison).title) not in text] == []


# --- tables ---


def test_several_trainings_of_a_system_are_marked(records: Path) -> None:
    add(records, Candidate((1, 2), 4, repeat=1), 3, test=2)
    assert "found ● ★ ×2" in [row[0] for row in systems_table(compare(records, "speech_params", "s")).rows]


def test_error_kinds_on_dev_are_marked(records: Path) -> None:
    add(records, Candidate((2, 3)), 4)
    kinds = {row[1]: row[5] for row in systems_table(compare(records, "speech_params", "s")).rows}
    assert kinds["1 2"] == f"{100 * wer(1):.1f}/0.0/0.0"
    assert kinds["2 3"] == f"{100 * wer(4):.1f}/0.0/0.0 *"


def test_layer_counts_equal_their_definition(tmp_path: Path) -> None:
    for layers, errors in (((), 1), ((1,), 1), ((2,), 4), ((1, 2), 2), ((0, 1), 9)):
        add(tmp_path, Candidate(layers), errors)
    comparison = compare(tmp_path, "speech_params", "s")
    made = layers_table(comparison)
    assert made.columns == ("layer", "on the front", "front of da", "front of nl", "better half by size", "all tried")
    found = {row[0]: row[1:] for row in made.rows}
    assert found["1"] == ("2 of 2", "2 of 2", "2 of 2", "2 of 2", "3 of 4")
    assert found["5"] == ("0 of 2", "0 of 2", "0 of 2", "0 of 2", "0 of 4")
    by_size = layers_by_size_table(comparison)
    assert by_size.columns == ("layer", "1 removed", "2 removed")
    assert by_size.rows[1] == ("1", "1 of 1", "1 of 1")
    scanned = layers_table(replace(comparison, importance={1: 0.25}))
    assert (scanned.columns[-1], scanned.rows[1][-1], scanned.rows[2][-1]) == ("Δ loss, nats per token", "0.250", "–")


def test_the_report_shows_groups_where_a_study_has_them(records: Path) -> None:
    for key in ("full", "minus-4-5"):
        record = next(r for r in read_records(records) if r.candidate.key == key)
        results = [heard("a", "one two", "one two", "x"), heard("b", "one two", "one", "y")]
        write_record(records, record.model_copy(update={"test": SplitResult.of(results)}))
        (records / key / "test.jsonl").unlink()
    rows = groups_table(compare(records, "speech_params", "s")).rows
    assert {row[:5] for row in rows} == {(name, "test", "y", "50.00", "50.00") for name in ("unpruned", "top2")}


def test_a_system_with_empty_hypotheses_is_in_the_failures_table(records: Path) -> None:
    record = next(r for r in read_records(records) if r.candidate.key == "full")
    results = [heard("a", "one two", "")]
    write_record(records, record.model_copy(update={"test": SplitResult.of(results)}))
    (records / "full" / "test.jsonl").unlink()
    rows = {row[0]: row[1:] for row in failures_table(compare(records, "speech_params", "s")).rows}
    assert rows["unpruned"] == ("test", "0.0", "100.0", "–", "–", "0.000", "–")


def test_a_narrow_terminal_cuts_off_no_number() -> None:
    numbers = Table("wide", "Wide", ("name", *"abcdefghijkl"), (("row", *["12345"] * 12),))
    assert [shown(to_rich(numbers), width=60).count(digit) for digit in "12345"] == [12] * 5


def test_tables_can_be_pasted_into_a_readme_and_a_paper(records: Path) -> None:
    made = tables(compare(records, "speech_params", "s"))
    markdown, latex = to_markdown(made), to_latex(made)
    assert markdown.count("### ") == latex.count(r"\begin{tabular}") == len(made)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == sum(1 + len(t.rows) for t in made)
    assert not re.search(r"(?<!\\)%", latex.split("\n", 1)[1])
    cells = [len(t.columns) for t in made for _ in range(1 + len(t.rows))]
    assert [row.count(" & ") + 1 for row in rows] == cells
    assert [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in markdown.splitlines() if line.startswith("|")] == [
        len(t.columns) for t in made for _ in range(2 + len(t.rows))
    ]


def test_html_escapes_cells_and_keeps_pins_and_colours() -> None:
    table = Table(
        "t",
        "<T>",
        ("name", "value"),
        (("a<b", "1&2"),),
        "note >",
        pins=(('k"', "n"),),
        shades=((Shade("#123456", "#ffffff"),),),
    )
    html = to_html(table)
    assert "&lt;T&gt;" in html
    assert '<th scope="row">a&lt;b</th>' in html
    assert '<td style="background:#123456;color:#ffffff">1&amp;2</td>' in html
    assert 'data-pin="k&quot;"' in html
    assert "<small>note &gt;</small>" in html


# --- what is written ---


def test_json_keys_are_stable(records: Path) -> None:
    data = json.loads(json.dumps(to_json(compare(records, "speech_params", "s"))))
    assert tuple(data) == (
        *("study", "objective", "candidates", "verdict", "baselines", "front", "dominating", "best_by_removed", "claims"),
        *("lora_changes", "layer_changes", "anatomy", "measured", "knee", "hypervolume", "differences"),
    )
    assert all(tuple(r) == RECORD_KEYS for r in [*data["front"], *data["baselines"].values()])
    (winner,) = data["dominating"]
    assert tuple(winner["difference_to_top2_lora"]) == ("split", "estimate", "low", "high", "verdict")
    assert (winner["errors_split"], winner["reference_words"], winner["removed_layers"]) == ("test", 600, [1, 2])
    assert set(winner["dev_wer_by_language"]) == {"da", "nl"}
    assert data["best_by_removed"]["1"]["tried"] == 1
    assert data["best_by_removed"]["1"]["test_wer"] is None
    assert data["best_by_removed"]["1"]["errors_split"] == "dev"
    assert data["differences"]["top2 - unpruned"]["verdict"] == "higher"
    claim_keys = ("claim", "language", "unit", "published", "measured", "low", "high", "word", "exact")
    assert {tuple(claim) for claim in data["claims"]} == {claim_keys}
    change_keys = ("system", "against", "split", "language", "errors", "substitutions", "deletions", "insertions")
    assert {tuple(change) for change in (*data["lora_changes"], *data["layer_changes"])} == {change_keys}
    assert tuple(data["anatomy"]) == ("system", "against", "split", "confusions", "worse", "better")


def test_csv_holds_every_complete_record(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    rows = list(csv.DictReader(io.StringIO(to_csv([found]))))
    assert [row["key"] for row in rows] == [r.candidate.key for r in found.complete]
    assert rows[1]["removed_layers"] == "1 2"
    assert float(rows[1]["dev_wer"]) == pytest.approx(wer(2))


def test_the_written_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    config = study(tmp_path, "<script>alert('&')</script> [bold]")
    add_study(config.run_folder / "records")
    give_to_study(config.run_folder / "records", config.name)
    comparison = write_report(config)
    written = config.run_folder / "report"
    names = {"front.png", "front.svg", "front.pdf", "report.html", "report.csv", "report.json", "report.md", "report.tex"}
    assert {f.name for f in written.iterdir()} == names
    assert {f.name for f in config.run_folder.iterdir()} == {"records", "report"}
    assert (written / "front.png").read_bytes().startswith(b"\x89PNG")
    assert (written / "front.pdf").read_bytes().startswith(b"%PDF")
    svg = (written / "front.svg").read_text(encoding="utf-8")
    assert re.search(r"<text[^>]*>top2\+lora</text>", svg)
    html = (written / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert not re.search(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)\s*=", html)
    assert not re.search(r"@import|url\(['\"]?http", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    assert html.count("plotly.js v") == 1
    assert '<th scope="row">' in html
    assert "■□□■■■" in html or r"\u25a0\u25a1\u25a1\u25a0\u25a0\u25a0" in html
    assert "[bold]" in shown(render(comparison))


def test_without_baselines_or_records_the_report_is_short_but_works(tmp_path: Path) -> None:
    empty = compare(tmp_path / "nowhere", "speech_params", "s")
    add(tmp_path, Candidate((1,), 4), 2)
    for comparison in (empty, compare(tmp_path, "total_params", "s")):
        assert shown(render(comparison)).startswith("s\n")
        assert json.dumps(to_json(comparison))
        assert to_csv([comparison]).startswith("study,name,key,")
        assert "</html>" in render_page(comparison)
        assert draw_front(comparison).axes


@pytest.mark.parametrize("with_baselines", [False, True])
def test_a_front_may_be_empty_because_of_the_groups_limit(tmp_path: Path, with_baselines: bool) -> None:
    results = [heard("a", "one two", "one two", "x"), heard("b", "one two", "one", "y")]
    for name, candidate in (("unpruned", Candidate()), (None, Candidate((1,)))):
        add_results(tmp_path, candidate, results, name=name if with_baselines else None)
    comparison = compare(tmp_path, "speech_params", "s", max_worst_group_wer=0.1)
    assert (comparison.front, len(comparison.complete)) == ((), 2)
    assert "2 are excluded" in shown(render(comparison))
    assert "Plotly.newPlot" in render_page(comparison)
    assert draw_front(comparison).axes
    assert draw_fronts([comparison, comparison]).axes
    assert overlay_table([comparison]).rows[0][0] == "s"


def test_a_failed_report_leaves_the_older_one(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("older")
    with contextlib.suppress(ZeroDivisionError), staged_files(tmp_path) as staged:
        (staged / "report.html").write_text("newer")
        raise ZeroDivisionError
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("report.html", "older")]
    with staged_files(tmp_path) as staged:
        (staged / "report.html").write_text("newer")
        assert (tmp_path / "report.html").read_text() == "older"
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("report.html", "newer")]


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    config = study(tmp_path)
    add_study(config.run_folder / "records")
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="must be a folder that can be written to") as caught:
        write_report(config, tmp_path / "file" / "report")
    assert len(caught.value.lines) == 1


def test_far_outliers_leave_the_front_readable(records: Path) -> None:
    before = draw_front(compare(records, "speech_params", "s")).axes[0].get_ylim()
    add(records, Candidate((0, 5), 4), 30)
    figure = draw_front(compare(records, "speech_params", "s"))
    assert figure.axes[0].get_ylim()[1] < 2 * before[1]
    assert any(f"up to {100 * wer(30):.0f} %" in text.get_text() for text in figure.axes[0].texts)


def test_equal_records_give_equal_figures(records: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_figures(draw_front(compare(records, "speech_params", "s")), tmp_path / name)
        made.append([f.read_bytes() for f in sorted((tmp_path / name).iterdir())])
    assert made[0] == made[1]


def test_importing_the_report_loads_no_plotting_and_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'optuna', 'matplotlib', 'plotly', 'scipy'}"
    code = f"import sys, prunesearch.report; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- several studies ---


def test_several_studies_are_written_side_by_side(tmp_path: Path) -> None:
    configs = []
    for name in ("a", "b"):
        configs.append(study(tmp_path / name, name))
        add_study(configs[-1].run_folder / "records")
        give_to_study(configs[-1].run_folder / "records", name)
    write_overlay(configs, tmp_path / "out")
    kinds = {"png", "svg", "pdf", "html", "md", "tex", "csv", "json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"overlay.{kind}" for kind in kinds}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "overlay.csv").read_text())))
    assert {row["study"] for row in rows} == {"a", "b"}
    table = overlay_table([comparison_of(config) for config in configs])
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert table.rows[0][1:] == table.rows[1][1:]
    assert FOUND.key in table.rows[0]
    page = (tmp_path / "out" / "overlay.html").read_text()
    assert "<caption>Studies side by side" in page
    assert "Plotly.newPlot" in page


def test_studies_with_different_objectives_or_equal_names_are_refused(records: Path) -> None:
    one = compare(records, "speech_params", "a")
    for other, said in ((one, "got a more than once"), (compare(records, "total_params", "b"), "params_objective")):
        with pytest.raises(StudyError, match=said):
            check_comparable([one, other])
