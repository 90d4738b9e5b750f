"""The front as a figure for a paper: dev WER over parameters; bottom left is better."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from prunesearch.report.comparison import Comparison
from prunesearch.report.values import OBJECTIVE_LABELS, title
from prunesearch.study.front import dev_wer, latest_dev_errors
from prunesearch.study.record import RunRecord

BASELINE_MARKERS = {"unpruned": "s", "unpruned+lora": "D", "top2": "^", "top2+lora": "v"}
INK, FAINT = "#222222", "#8a8a8a"
STUDY_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito: safe for colour-blind readers
LOG_FROM = 4.0  # if the front's worst WER is more than this many times its best, the WER axis is logarithmic

Point = tuple[float, float]  # millions of parameters, WER in percent


def write_figures(figure: Figure, folder: Path, name: str = "front") -> None:
    """Write `front.png`, `front.svg` and `front.pdf`. SVG and PDF keep text as text. Equal records give equal files."""
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "front"}):
        figure.savefig(folder / f"{name}.png", dpi=200)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def _empty_plot(objective: str, rate: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(OBJECTIVE_LABELS[objective])
    axes.set_ylabel(f"Dev {rate}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def draw_fronts(comparisons: Sequence[Comparison]) -> Figure:
    """The fronts of several studies with their baselines, one colour per study."""
    figure, axes = _empty_plot(comparisons[0].objective, comparisons[0].rate)
    objective = comparisons[0].objective
    focus = [place(r, objective) for c in comparisons for r in (*c.front, *c.baselines.values())]
    if focus:
        _limit(axes, focus, focus)
    handles = []
    for number, comparison in enumerate(comparisons):
        colour = STUDY_COLOURS[number % len(STUDY_COLOURS)]
        handles.append(Line2D([], [], label=comparison.study, color=colour, marker="o", markersize=5, linewidth=1.4))
        front = [place(r, objective) for r in comparison.front]
        _draw_steps(axes, front, color=colour, linewidth=1.4)
        _scatter(axes, front, c=[colour] * len(front), s=26, zorder=4)
        for name, record in comparison.baselines.items():
            style = {"marker": BASELINE_MARKERS[name], "s": 90, "facecolors": "none", "edgecolors": colour, "linewidths": 1.2}
            _scatter(axes, [place(record, objective)], zorder=5, **style)
    kinds = [
        Line2D([], [], label=name, marker=marker, color=FAINT, markerfacecolor="none", linestyle="", markersize=7)
        for name, marker in BASELINE_MARKERS.items()
    ]
    figure.legend(handles=[*handles, *kinds], loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return figure


def draw_front(comparison: Comparison) -> Figure:
    """Front, baselines, dominated candidates and those that ended at a rung.

    Candidates far above the front are drawn at the upper edge, so that the front stays readable.
    """
    figure, axes = _empty_plot(comparison.objective, comparison.rate)
    if not comparison.complete:
        axes.text(0.5, 0.5, "no candidate is complete yet", transform=axes.transAxes, ha="center", color=FAINT)
        axes.set(xticks=[], yticks=[])
        return figure

    front, others = ([place(r, comparison.objective) for r in rs] for rs in (comparison.front, comparison.others))
    stopped = [p for r in comparison.pruned if (p := place_if_decoded(r, comparison.objective))]
    baselines = {name: place(r, comparison.objective) for name, r in comparison.baselines.items()}
    published = [(p.params / 1e6, 100 * p.wer) for p in comparison.published]
    focus = [*front, *baselines.values(), *published]
    _limit(axes, focus or others, [*front, *others, *stopped, *published])
    high = axes.get_ylim()[1]
    steps = _draw_steps(axes, front, color=INK, linewidth=1.1)
    colours = _layer_colours(comparison)
    inside = [(p, colours(r)) for p, r in zip(others, comparison.others, strict=True) if p[1] <= high]
    _scatter(axes, [p for p, _ in inside], c=[c for _, c in inside], s=20, alpha=0.45, linewidths=0, zorder=3)
    _scatter(axes, [p for p in stopped if p[1] <= high], marker="x", s=14, c=FAINT, alpha=0.5, linewidths=0.8, zorder=1)
    _scatter(axes, front, c=[colours(r) for r in comparison.front], s=44, edgecolors=INK, linewidths=0.9, zorder=5)
    for name, point in baselines.items():
        _scatter(
            axes, [point], marker=BASELINE_MARKERS[name], s=110, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=6
        )
    _scatter(axes, [p for p in published if p[1] <= high], marker="+", s=60, c=FAINT, linewidths=1.2, zorder=2)
    outside = [p for p in [*others, *stopped] if p[1] > high]
    if outside:
        edge = axes.get_xaxis_transform()
        _scatter(axes, [(x, 0.985) for x, _ in outside], marker="^", s=12, c=FAINT, alpha=0.6, linewidths=0, transform=edge)
        note = f"▴ {len(outside)} above {high:.3g} %, up to {max(y for _, y in outside):.0f} %"
        axes.text(0.995, 0.955, note, transform=axes.transAxes, ha="right", va="top", fontsize=7, color=FAINT)

    _legend(figure, others=bool(inside), stopped=bool(stopped), published=any(y <= high for _, y in published))
    _colour_bar(figure, axes, comparison)
    labels = {p: name for name, p in baselines.items()}
    if comparison.winner and comparison.winner.system.name is None:
        labels[place(comparison.winner.system, comparison.objective)] = title(comparison.winner.system)
    _label(figure, axes, labels, [*front, *baselines.values(), *(p for p, _ in inside)], steps)
    return figure


def place(record: RunRecord, objective: str) -> Point:
    return record.parameters.of(objective) / 1e6, 100 * dev_wer(record)


def place_if_decoded(record: RunRecord, objective: str) -> Point | None:
    """Where a record lies by its latest dev WER; None if it was never decoded on dev."""
    errors = latest_dev_errors(record)
    return None if errors is None else (record.parameters.of(objective) / 1e6, 100 * errors.wer)


def _limit(axes: Axes, focus: Sequence[Point], everything: Sequence[Point]) -> None:
    """Show all points of `focus` (front and baselines), and other points only as far as the focus stays readable."""
    xs = [x for x, _ in everything]
    margin = 0.06 * (max(xs) - min(xs)) or 0.02 * max(xs)
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    axes.ticklabel_format(axis="x", useOffset=False)
    best, worst = min(y for _, y in focus), max(y for _, y in focus)
    top = max(y for _, y in everything)
    if best > 0 and worst / best > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_ylim(best / 1.35, min(top, worst * 1.5) * 1.15)
    else:
        span = (worst - best) or 0.1 * worst or 1.0
        axes.set_ylim(best - 0.12 * span, min(top, worst + 0.6 * span) + 0.12 * span)


def _draw_steps(axes: Axes, front: Sequence[Point], **style: Any) -> list[Point]:
    """Draw the line through the front up to the edges of the plot, and return its points; nothing for an empty front."""
    if not front:
        return []
    steps = [(front[0][0], axes.get_ylim()[1]), *front, (axes.get_xlim()[1], front[-1][1])]
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", zorder=2, **style)
    return steps


def _scatter(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    if points:
        axes.scatter(*zip(*points, strict=True), **style)


def _palette(comparison: Comparison) -> tuple[list[int], ListedColormap]:
    """The numbers of removed layers, and a colour for each; the colour map's lightness follows their order."""
    counts = sorted({len(r.removed_layers) for r in comparison.complete})
    span = counts[-1] - counts[0]
    return counts, ListedColormap([matplotlib.colormaps["viridis"](0.95 * i / max(1, span)) for i in range(span + 1)])


def _layer_colours(comparison: Comparison) -> Any:
    counts, palette = _palette(comparison)
    return lambda record: palette(len(record.removed_layers) - counts[0])


def _colour_bar(figure: Figure, axes: Axes, comparison: Comparison) -> None:
    counts, palette = _palette(comparison)
    numbers = range(counts[0], counts[0] + palette.N)
    norm = BoundaryNorm([n - 0.5 for n in (*numbers, numbers[-1] + 1)], palette.N)
    scale = matplotlib.cm.ScalarMappable(norm, palette)
    bar = figure.colorbar(scale, ax=axes, ticks=numbers[:: max(1, len(numbers) // 8)], pad=0.02, aspect=30)
    bar.set_label("Encoder layers removed")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, which="both")


def _legend(figure: Figure, others: bool, stopped: bool, published: bool) -> None:
    kinds = [
        (True, "front", {"marker": "o", "color": INK, "markerfacecolor": "#cccccc", "markersize": 6, "linewidth": 1.1}),
        (others, "dominated", {"marker": "o", "color": FAINT, "alpha": 0.6, "linestyle": "", "markersize": 4.5}),
        (stopped, "ended at a rung", {"marker": "x", "color": FAINT, "alpha": 0.7, "linestyle": "", "markersize": 4}),
        (published, "published", {"marker": "+", "color": FAINT, "linestyle": "", "markersize": 8}),
        (True, "baseline", {"marker": "s", "color": INK, "markerfacecolor": "none", "linestyle": "", "markersize": 8}),
    ]
    handles = [Line2D([], [], label=label, **style) for shown, label, style in kinds if shown]  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8)


def _label(figure: Figure, axes: Axes, labels: dict[Point, str], points: Sequence[Point], steps: Sequence[Point]) -> None:
    """Write each label where it covers least, and closer to its own point than to another labelled point.

    Tries eight directions at growing distances, and takes the first free place.
    """
    figure.draw_without_rendering()  # only the layout decides where points lie
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (axes.transData.transform(points) if points else ())]
    corners: Any = axes.transData.transform(steps) if steps else ()
    taken += [Bbox.from_extents(x, y - 2, next_x, y + 2) for (x, y), (next_x, _) in itertools.pairwise(corners)]
    written: list[Bbox] = []
    places = dict(zip(labels, axes.transData.transform(list(labels)), strict=True)) if labels else {}
    for point, text in sorted(labels.items()):
        best: tuple[int, Any] | None = None
        for distance in (9, 15, 24, 36):
            for dx, dy in ((1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7), (0, 1), (0, -1)):
                note = axes.annotate(
                    text,
                    point,
                    (dx * distance, dy * distance),
                    textcoords="offset points",
                    ha="left" if dx > 0 else "right" if dx < 0 else "center",
                    va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                    fontsize=8,
                    color=INK,
                    zorder=7,
                    arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkB": 5} if distance > 15 else None,
                )
                box = _text_box(note, renderer)
                covered = box.count_overlaps(taken) + 4 * box.count_overlaps(written)
                covered += 9 * (not _within(box, axes.get_window_extent(renderer)))
                covered += 4 * any(_gap(box, at) < _gap(box, places[point]) for other, at in places.items() if other != point)
                if best is None or covered < best[0]:
                    if best:
                        best[1].remove()
                    best = (covered, note)
                else:
                    note.remove()
            if best and best[0] == 0:
                break
        assert best is not None
        written.append(_text_box(best[1], renderer))


def _gap(box: Bbox, point: Any) -> float:
    """The distance between a point and a box, in pixels."""
    return math.hypot(max(box.x0 - point[0], 0, point[0] - box.x1), max(box.y0 - point[1], 0, point[1] - box.y1))


def _text_box(note: Annotation, renderer: Any) -> Bbox:
    """The box of a label's text, without the line that leads to its point."""
    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _within(inner: Bbox, outer: Bbox) -> bool:
    return bool(outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1)
