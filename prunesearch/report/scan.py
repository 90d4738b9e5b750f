"""A scan as tables, a figure and a page: each layer's importance, and the interactions of pairs of layers."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from rich.console import Group
from rich.text import Text

from prunesearch.report.document import document
from prunesearch.report.formats import to_html, to_rich
from prunesearch.report.table import Shade, Table
from prunesearch.report.values import CRITERION_LABELS
from prunesearch.study.files import staged_files
from prunesearch.study.importance import Scan

Grid = list[list[float | None]]

DARK_INK, LIGHT_INK = "#222222", "#ffffff"
DARK_FROM = 0.6  # of the darkest background; there the ink is light
SETS = 3  # of each size, that are shown
NUMBERS_UP_TO = 16  # layers; in a larger figure, numbers in the cells would not be readable


def write_scan_report(folder: Path, scan: Scan) -> None:
    """Write `scan.png`, `scan.svg` and `scan.html` to the folder."""
    with staged_files(folder) as staged:
        figure = draw_scan(scan)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scan"}):
            figure.savefig(staged / "scan.png", dpi=200)
            figure.savefig(staged / "scan.svg", metadata={"Date": None})
        (staged / "scan.html").write_text(render_scan_page(scan), encoding="utf-8")


def render_scan(scan: Scan, sets: int = SETS) -> Group:
    """For a rich console. `sets`: the best sets of each size to show."""
    shown = layers_table(scan), pairs_table(scan, decimals=2), sets_table(scan, sets), correlations_table(scan)
    return Group(*(to_rich(table) for table in shown if table.rows), Text(evaluations_text(scan)))


def render_scan_page(scan: Scan) -> str:
    """A page whose maps are tables, so that a screen reader can read them, too."""
    intro = (
        f"<p>{scan.utterances} utterances of dev; the unpruned loss is {scan.unpruned_loss:.4f} nats per token. "
        f"{evaluations_text(scan)}.</p>"
    )
    shown = layers_table(scan), pairs_table(scan, decimals=3), sets_table(scan, SETS), correlations_table(scan)
    tables = [to_html(table) for table in shown if table.rows]
    return document(f"{scan.study}: scan", f"{scan.study}: importance of each layer", [intro, *tables])


def layers_table(scan: Scan) -> Table:
    """Every criterion's value for every layer."""
    columns = list(scan.table().values())
    shades = [_shares([column.get(layer) for layer in scan.removable]) for column in columns]
    rows, colours = [], []
    for i, layer in enumerate(scan.removable):
        rows.append((str(layer), *(_cell(column.get(layer), 4) for column in columns)))
        colours.append(tuple(_blue(shares[i]) for shares in shades))
    return Table(
        "layers",
        "Importance of each layer",
        ("layer", *(CRITERION_LABELS[c] for c in scan.table())),
        tuple(rows),
        "The darker a cell, the more the layer matters by that criterion (by rank).",
        shades=tuple(colours),
    )


def pairs_table(scan: Scan, decimals: int) -> Table:
    """Above the diagonal a pair's value, on it a layer's, below it the pair's value minus the sum of its two layers'."""
    criterion, matrix = pairs(scan)
    reach = _reach(matrix)
    names = tuple(map(str, scan.removable))
    return Table(
        "pairs",
        f"Pairs of layers, {CRITERION_LABELS[criterion]}",
        ("layer", *names),
        tuple((name, *(_cell(value, decimals) for value in row)) for name, row in zip(names, matrix, strict=True)),
        "Above the diagonal: removing both layers. On it: removing this layer. Below it: the pair's value minus the sum of its "
        "two layers' values (red: together worse than the sum; blue: better).",
        shades=tuple(
            tuple(_red_or_blue(v, reach) if r > c and v is not None else None for c, v in enumerate(row))
            for r, row in enumerate(matrix)
        ),
    )


def sets_table(scan: Scan, most: int) -> Table:
    """The best `most` sets of each size by the loss after the repair; without rows where that was not measured."""
    losses, residuals = scan.score("repaired_loss"), scan.score("residual")
    by_size: dict[int, list[tuple[int, ...]]] = {}
    for layers in sorted(losses, key=losses.__getitem__):
        by_size.setdefault(len(layers), []).append(layers)
    rows = [
        (str(size), " ".join(map(str, layers)), f"{losses[layers]:+.4f}", f"{residuals[layers]:.4f}", f"{len(measured)}")
        for size, measured in sorted(by_size.items())
        for layers in measured[:most]
    ]
    return Table(
        "sets",
        "Best sets of each size after the repair",
        ("layers less", "removed layers", CRITERION_LABELS["repaired_loss"], CRITERION_LABELS["residual"], "sets measured"),
        tuple(rows),
        "Nothing was trained. Loss: nats per token on dev, minus the unpruned encoder's. Residual: squared error that the "
        "repair leaves in the projector's first map, per row, on held-out recordings. Screening took "
        f"{scan.screening_seconds:.0f} s.",
        text_columns=("removed layers",),
    )


def correlations_table(scan: Scan) -> Table:
    return Table(
        "correlations",
        "Rank correlation of criteria over single layers",
        ("criterion", "other criterion", "Spearman's ρ"),
        tuple((CRITERION_LABELS[a], CRITERION_LABELS[b], f"{rho:+.2f}") for (a, b), rho in scan.correlations().items()),
        text_columns=("other criterion",),
    )


def evaluations_text(scan: Scan) -> str:
    """A sentence: how many layer evaluations (and seconds, if measured) the tree saved."""
    e = scan.evaluations
    share = (
        f"{e.tree:,} layer evaluations per batch as a tree instead of {e.one_by_one:,} set by set "
        f"({100 * e.tree / e.one_by_one:.1f} %)"
    )
    if e.tree_seconds is None or not e.one_by_one_seconds:
        return share
    times = (
        f"{e.tree_seconds:.1f} s instead of {e.one_by_one_seconds:.1f} s ({100 * e.tree_seconds / e.one_by_one_seconds:.1f} %)"
    )
    return f"{share}; both ways give the same values, in {times}"


def pairs(scan: Scan) -> tuple[str, Grid]:
    """The criterion that was measured for pairs, and the matrix that `pairs_table` shows."""
    criterion = next(c for c in (scan.criterion, "delta_loss", "drift") if scan.interactions(c))
    values, beyond_sum = scan.score(criterion), scan.interactions(criterion)

    def cell(row: int, column: int) -> float | None:
        if row == column:
            return values.get((row,))
        pair = min(row, column), max(row, column)
        return (values if row < column else beyond_sum).get(pair)

    return criterion, [[cell(r, c) for c in scan.removable] for r in scan.removable]


def draw_scan(scan: Scan) -> Figure:
    """Two maps side by side: criteria of single layers, and the interactions of pairs."""
    layers = list(scan.removable)
    figure = Figure(figsize=(max(9.0, 0.55 * len(layers) + 5), max(4.2, 0.3 * len(layers) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    _draw_layers(left, scan)
    bar = figure.colorbar(_draw_pairs(right, scan), ax=right, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    for axes in (left, right):
        axes.set_yticks(range(len(layers)), [str(i) for i in layers], fontsize=8)
        axes.set_ylabel("layer")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def _draw_layers(axes: Axes, scan: Scan) -> None:
    table, layers = scan.table(), list(scan.removable)
    columns = [[values.get(i) for i in layers] for values in table.values()]
    shares = [_shares(column) for column in columns]
    axes.imshow([list(row) for row in zip(*shares, strict=True)], cmap="Blues", vmin=-0.1, vmax=1.25, aspect="auto")
    axes.set_xticks(range(len(table)), [CRITERION_LABELS[c] for c in table], rotation=35, ha="right", fontsize=8)
    axes.set_title("each layer, by rank (dark: important)", fontsize=10)
    if len(layers) <= NUMBERS_UP_TO:
        for x, (column, its_shares) in enumerate(zip(columns, shares, strict=True)):
            for y, (value, share) in enumerate(zip(column, its_shares, strict=True)):
                axes.text(x, y, _cell(value, 2), ha="center", va="center", fontsize=7, color=_ink(share))


def _draw_pairs(axes: Axes, scan: Scan) -> matplotlib.image.AxesImage:
    criterion, matrix = pairs(scan)
    reach, layers = _reach(matrix), list(scan.removable)
    beyond_sum = [[v if r > c and v is not None else math.nan for c, v in enumerate(row)] for r, row in enumerate(matrix)]
    image = axes.imshow(beyond_sum, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -reach, reach), aspect="auto")
    axes.set_xticks(range(len(layers)), [str(i) for i in layers], fontsize=8)
    axes.set_title(f"pairs minus the sum of their layers, {CRITERION_LABELS[criterion]}", fontsize=10)
    if len(layers) <= NUMBERS_UP_TO:
        for r, row in enumerate(beyond_sum):
            for c, v in enumerate(row[:r]):
                if not math.isnan(v):
                    axes.text(c, r, _cell(v, 2), ha="center", va="center", fontsize=7, color=_ink(abs(v) / reach))
    return image


def _cell(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: zero has no sign


def _shares(values: Sequence[float | None]) -> list[float]:
    """0 for the least value, 1 for the greatest, by rank: one layer's value is often much greater than all others."""
    known = sorted(v for v in values if v is not None)
    return [0.0 if v is None or len(known) < 2 else known.index(v) / (len(known) - 1) for v in values]


def _reach(matrix: Grid) -> float:
    """The greatest absolute value below the diagonal, which gets the strongest colour; 1 if all are zero or unknown."""
    return max((abs(v) for r, row in enumerate(matrix) for v in row[:r] if v is not None), default=0.0) or 1.0


def _blue(share: float) -> Shade:
    return Shade(_colour("Blues", 0.1 + 0.7 * share), _ink(share))


def _red_or_blue(value: float, reach: float) -> Shade:
    return Shade(_colour("RdBu_r", 0.5 + 0.45 * value / reach), _ink(abs(value) / reach))


def _ink(strength: float) -> str:
    return LIGHT_INK if strength > DARK_FROM else DARK_INK


def _colour(colours: str, at: float) -> str:
    return matplotlib.colors.to_hex(matplotlib.colormaps[colours](at))
