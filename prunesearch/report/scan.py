"""A scan in tables, as a figure and as a page: what each layer is worth, and which pairs are more or less than their sum."""

import math
import os
import tempfile
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from prunesearch.report.page import STYLE, scroll_box
from prunesearch.study.importance import Scan

LABELS = {
    "delta_loss": "Δ loss, nats a token",
    "drift": "projector drift",
    "delta_wer": "Δ WER",
    "block_influence": "Block Influence",
    "frobenius_change": "relative change",
    "cka_distance": "1 − CKA",
    "angular_distance": "angular distance, π",
}
Grid = list[list[float | None]]


def write_scan_report(folder: Path, scan: Scan) -> None:
    """`scan.png`, `scan.svg` and `scan.html` in the folder."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".report.") as name:
        made = Path(name)
        figure = draw_scan(scan)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scan"}):
            figure.savefig(made / "scan.png", dpi=200)
            figure.savefig(made / "scan.svg", metadata={"Date": None})
        (made / "scan.html").write_text(render_scan_page(scan), encoding="utf-8")
        for file in made.iterdir():
            os.replace(file, folder / file.name)


def heat(scan: Scan) -> tuple[list[str], list[int], Grid]:
    """Criteria, layers, and each criterion's value for each layer."""
    table, layers = scan.table(), list(scan.removable)
    return list(table), layers, [[values.get(i) for i in layers] for values in table.values()]


def pairs(scan: Scan) -> tuple[str, list[int], Grid]:
    """The criterion that was measured for pairs, the layers, and a matrix: above the diagonal what the pair costs, on it
    what the layer costs, below it the pair's cost beyond the sum of the two."""
    criterion = "delta_loss" if scan.interactions() else "drift"
    costs, beyond = scan.score(criterion), scan.interactions(criterion)
    layers = list(scan.removable)

    def cell(row: int, column: int) -> float | None:
        if row == column:
            return costs.get((row,))
        pair = min(row, column), max(row, column)
        return (costs if row < column else beyond).get(pair)

    return criterion, layers, [[cell(r, c) for c in layers] for r in layers]


def counted(scan: Scan) -> str:
    """How much the tree saved."""
    e = scan.evaluations
    share = f"{e.tree:,} layer evaluations a batch as a tree, {e.one_by_one:,} set by set ({100 * e.tree / e.one_by_one:.1f} %)"
    if e.tree_seconds is None or not e.one_by_one_seconds:
        return share
    times = f"{e.tree_seconds:.1f} s against {e.one_by_one_seconds:.1f} s ({100 * e.tree_seconds / e.one_by_one_seconds:.1f} %)"
    return f"{share}; both ways agree, in {times}"


def correlation_rows(scan: Scan) -> list[tuple[str, str, str]]:
    return [(LABELS[a], LABELS[b], f"{rho:+.2f}") for (a, b), rho in scan.correlations().items()]


def render_scan(scan: Scan) -> Group:
    """For a rich console: heat map, pairs, correlations, counts."""
    criteria, layers, values = heat(scan)
    single = Table(title=f"{scan.study}: what each layer is worth (dark: much)", pad_edge=False)
    single.add_column("layer", justify="right")
    for criterion in criteria:
        single.add_column(LABELS[criterion], justify="right")
    shades = [_shares(row) for row in values]
    for k, layer in enumerate(layers):
        cells = [_shaded(f"{row[k]:.4f}", shade[k]) for row, shade in zip(values, shades, strict=True)]
        single.add_row(str(layer), *cells)

    criterion, _, matrix = pairs(scan)
    both = Table(
        title=f"pairs: {LABELS[criterion]}", pad_edge=False,
        caption="on the diagonal a layer, above it a pair, below it what the pair costs beyond the sum of its layers",
    )  # fmt: skip
    both.add_column("")
    for layer in layers:
        both.add_column(str(layer), justify="right")
    for layer, row in zip(layers, matrix, strict=True):
        both.add_row(str(layer), *("" if v is None else _rounded(v, 2) for v in row))

    ranks = Table(title="rank correlation of criteria, over single layers")
    for column in ("criterion", "criterion", "Spearman's ρ"):
        ranks.add_column(column, justify="left" if column == "criterion" else "right")
    for cells_ in correlation_rows(scan):
        ranks.add_row(*cells_)
    return Group(single, both, ranks, Text(counted(scan)))


def _rounded(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # zero has no sign


def _shares(values: list[float | None]) -> list[float]:
    """0 for the least, 1 for the greatest; by rank, since one layer often dwarfs the others."""
    known = sorted(v for v in values if v is not None)
    return [0.0 if v is None or len(known) < 2 else known.index(v) / (len(known) - 1) for v in values]


def _shaded(text: str, share: float) -> Text:
    red, green, blue = (round(255 * c) for c in matplotlib.colormaps["Blues"](0.1 + 0.7 * share)[:3])
    return Text(text, Style(color="white" if share > 0.6 else "black", bgcolor=f"rgb({red},{green},{blue})"))


def draw_scan(scan: Scan) -> Figure:
    """Both maps side by side."""
    criteria, layers, values = heat(scan)
    figure = Figure(figsize=(max(9.0, 0.55 * len(layers) + 5), max(4.2, 0.3 * len(layers) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    _map(left, [list(row) for row in zip(*map(_shares, values), strict=True)], "Blues", None)
    left.set_xticks(range(len(criteria)), [LABELS[c] for c in criteria], rotation=35, ha="right", fontsize=8)
    left.set_title("each layer, ranked (dark: worth most)", fontsize=10)
    if len(layers) <= 16:
        for y in range(len(layers)):
            for x, row in enumerate(values):
                value, share = row[y], _shares(row)[y]
                text = "" if value is None else f"{value:.2f}"
                left.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if share > 0.6 else "#222222")

    criterion, _, matrix = pairs(scan)
    beyond: Grid = [[v if r > c else None for c, v in enumerate(row)] for r, row in enumerate(matrix)]
    reach = max((abs(v) for row in beyond for v in row if v is not None), default=0.0) or 1.0
    image = _map(right, beyond, "RdBu_r", TwoSlopeNorm(0.0, -reach, reach))
    right.set_xticks(range(len(layers)), [str(i) for i in layers], fontsize=8)
    right.set_title(f"pairs beyond the sum of their layers, {LABELS[criterion]}", fontsize=10)
    if len(layers) <= 16:
        for r, row in enumerate(beyond):
            for c, v in enumerate(row):
                if v is not None:
                    strong = abs(v) > 0.6 * reach
                    colour = "white" if strong else "#222222"
                    right.text(c, r, _rounded(v, 2), ha="center", va="center", fontsize=7, color=colour)
    bar = figure.colorbar(image, ax=right, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    for axes in (left, right):
        axes.set_yticks(range(len(layers)), [str(i) for i in layers], fontsize=8)
        axes.set_ylabel("layer")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def _map(axes: Axes, values: Grid | list[list[float]], colours: str, norm: TwoSlopeNorm | None) -> matplotlib.image.AxesImage:
    shown = [[math.nan if v is None else v for v in row] for row in values]
    if norm:
        return axes.imshow(shown, cmap=colours, norm=norm, aspect="auto")
    return axes.imshow(shown, cmap=colours, vmin=-0.1, vmax=1.25, aspect="auto")


def render_scan_page(scan: Scan) -> str:
    """One file that needs no network: the maps as tables, so that a screen reader can read them too."""
    criteria, layers, values = heat(scan)
    shades = [_shares(row) for row in values]
    single = [
        [
            (f"{row[k]:.4f}", _css("Blues", 0.1 + 0.7 * shade[k], shade[k] > 0.6))
            for row, shade in zip(values, shades, strict=True)
        ]
        for k in range(len(layers))
    ]
    criterion, _, matrix = pairs(scan)
    below = [abs(v) for r, row in enumerate(matrix) for c, v in enumerate(row) if v is not None and r > c]
    reach = max(below, default=0.0) or 1.0

    def pair_cell(r: int, c: int, v: float | None) -> tuple[str, str]:
        if v is None:
            return "", ""
        return _rounded(v, 3), _css("RdBu_r", 0.5 + 0.45 * v / reach, abs(v) > 0.6 * reach) if r > c else ""

    both = [[pair_cell(r, c, v) for c, v in enumerate(row)] for r, row in enumerate(matrix)]
    names = [str(i) for i in layers]
    caption = (
        f"Pairs, {LABELS[criterion]}: above the diagonal the pair, on it the layer, below it the pair beyond its layers' sum"
    )
    correlations = [[(b, ""), (rho, "")] for _, b, rho in correlation_rows(scan)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(scan.study)}: scan – prunesearch</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(scan.study)}: what each layer is worth</h1>\n"
        f"<p>{scan.utterances} utterances of dev; the unpruned loss is {scan.unpruned_loss:.4f} nats a token. "
        f"{escape(counted(scan))}.</p>\n"
        + _grid("Each layer (dark: worth most)", "layer", [LABELS[c] for c in criteria], names, single)
        + _grid(caption, "layer", names, names, both)
        + _grid(
            "Rank correlation of criteria, over single layers",
            "criterion", ["criterion", "Spearman's ρ"], [a for a, _, _ in correlation_rows(scan)], correlations,
        )
        + "\n</main></body></html>\n"
    )  # fmt: skip


def _css(colours: str, at: float, dark: bool) -> str:
    red, green, blue = (round(255 * c) for c in matplotlib.colormaps[colours](at)[:3])
    return f"background:rgb({red},{green},{blue});color:{'#fff' if dark else '#222'}"


def _grid(caption: str, corner: str, columns: list[str], names: list[str], cells: list[list[tuple[str, str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in (corner, *columns))
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td style="{style}">{escape(text)}</td>' if style else f"<td>{escape(text)}</td>" for text, style in row)
        + "</tr>"
        for name, row in zip(names, cells, strict=True)
    )
    table = f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return scroll_box(caption, table) + "\n"
