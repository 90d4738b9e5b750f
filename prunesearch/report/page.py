"""The report as one HTML file that needs no network: verdict, a front to point at, and the tables."""

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from prunesearch.report.comparison import Comparison
from prunesearch.report.overlay import overlay_table
from prunesearch.report.pins import PANEL, full_title, pin_script, strip
from prunesearch.report.plots import BASELINE_MARKERS, STUDY_COLOURS, place, place_stopped
from prunesearch.report.tables import (
    OBJECTIVES,
    Table,
    error_kinds,
    sizes,
    tables,
    title,
    verdict,
    wer_percent,
)
from prunesearch.study.record import RunRecord

SYMBOLS = {"s": "square-open", "D": "diamond-open", "^": "triangle-up-open", "v": "triangle-down-open"}

# The figure's text and hover boxes take the page's colours, so that one figure serves light and dark.
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5d5d5d; --paper: #ffffff; --line: #dddddd; --focus: #1a5fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a6a6a6; --paper: #161618; --line: #3a3a3e;
  --focus: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
figure { margin: 0 0 1.5rem; }
.plot { height: min(32rem, 80vh); overflow: hidden; }
.plot text { fill: var(--ink) !important; }
.plot .hoverlayer path { fill: var(--paper) !important; stroke: var(--soft) !important; }
.plot .tracepinned path { stroke: var(--ink) !important; }
#pins { min-height: 3rem; margin: 0 0 1.5rem; }
#pins p { margin: 0; color: var(--soft); }
#pins .scroll { margin-top: 0; }
button { font: inherit; font-size: .8rem; color: var(--ink); background: none; border: 1px solid var(--soft);
  border-radius: .3rem; padding: .1rem .6rem; min-height: 1.5rem; cursor: pointer; }
td button { margin: -.1rem 0; }
button[aria-pressed="true"] { background: var(--ink); border-color: var(--ink); color: var(--paper); }
.scroll { overflow-x: auto; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 1rem; padding-bottom: .3rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; }
td.wrap { white-space: normal; min-width: 8rem; text-align: left; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
caption small { font-weight: 400; }
#pins thead th, #pins td span { white-space: normal; overflow-wrap: anywhere; }
#pins td span { display: inline-block; text-align: left; }
#pins caption small { max-width: calc(100vw - 3rem); white-space: normal; }
@media (max-width: 30rem) { #pins table { font-size: .75rem; } #pins th, #pins td { padding: .3rem; }
  #pins th:first-child, #pins td:first-child { padding-left: 0; } }
small, figcaption { display: block; color: var(--soft); font-size: .8rem; max-width: 46rem; }
"""


def render_page(comparison: Comparison) -> str:
    """The whole page. Everything that comes from data is escaped; plotly.js is inlined once."""
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(comparison))
    parts = [f"<ul>{said}</ul>", _plot(comparison), *map(_html, tables(comparison))]
    if comparison.complete:
        parts.append(pin_script(_plotted(comparison)))
    return _document(comparison.study, parts)


def render_overlay(comparisons: Sequence[Comparison]) -> str:
    """Several studies' fronts in one plot, and a line for each study."""
    objective = comparisons[0].objective
    figure = go.Figure()
    for number, comparison in enumerate(comparisons):
        colour = STUDY_COLOURS[number % len(STUDY_COLOURS)]
        line = {"mode": "lines+markers", "line": {"shape": "hv", "width": 1.5}, "marker": {"color": colour, "size": 9}}
        _add(figure, comparison, comparison.study, list(comparison.front), **line)
        for name, record in comparison.baselines.items():
            marker = {"symbol": SYMBOLS[BASELINE_MARKERS[name]], "size": 13, "color": colour, "line": {"width": 2}}
            _add(figure, comparison, f"{comparison.study}: {name}", [record], mode="markers", marker=marker, showlegend=False)
    kept = [place(r, objective)[1] for c in comparisons for r in (*c.front, *c.baselines.values())]
    if kept:
        _lay_out(figure, comparisons[0], kept)
    names = " · ".join(c.study for c in comparisons)
    note = "Bottom left is better. Filled: fronts; open: baselines. Point at a candidate for its layers."
    plot = _embedded(figure, f"Fronts of {names}", note) if kept else "<p>No candidate is complete yet.</p>"
    return _document(names, [plot, _html(overlay_table(comparisons))])


def _document(name: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} – prunesearch</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(name)}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _plot(comparison: Comparison) -> str:
    if not comparison.complete:
        return "<p>No candidate is complete yet.</p>"
    note = (
        "Bottom left is better. Point at a candidate for its layers, first to last: ■ kept, □ removed. "
        "Click it to compare it with another. Drag to zoom, double-click to see everything."
    )
    said = f"Dev WER against {_noun(comparison)} of every candidate; the tables below hold front and baselines."
    return f"{_embedded(_figure(comparison), said, note)}\n{PANEL}"


def _embedded(figure: go.Figure, said: str, note: str) -> str:
    """A figure with plotly.js; `said` is for those who cannot see it."""
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        default_height="100%",
        div_id="front",
        # a second click within the delay resets the axes and pins nothing, so it is short
        config={"displayModeBar": False, "responsive": True, "doubleClickDelay": 300},
    )
    label = escape(said)
    return f'<figure><div class="plot" role="img" aria-label="{label}">{plot}</div><figcaption>{note}</figcaption></figure>'


def _plotted(comparison: Comparison) -> list[RunRecord]:
    return [r for r in (*comparison.complete, *comparison.pruned) if place_stopped(r, comparison.objective)]


def _noun(comparison: Comparison) -> str:
    return OBJECTIVES[comparison.objective].split(" (")[0]


def _figure(comparison: Comparison) -> go.Figure:
    figure = go.Figure()
    grey, ink = "#8a8a8a", "#3b6fb6"
    stopped = {"symbol": "x-thin-open", "color": grey, "size": 6}
    _add(figure, comparison, "ended at a rung", comparison.pruned, mode="markers", marker=stopped)
    dominated = {"color": grey, "size": 7, "opacity": 0.6}
    _add(figure, comparison, "dominated", comparison.others, mode="markers", marker=dominated)
    line = {"shape": "hv", "color": ink, "width": 1.5}
    _add(figure, comparison, "front", comparison.front, mode="lines+markers", line=line, marker={"color": ink, "size": 10})
    for name, record in comparison.baselines.items():
        marker = {"symbol": SYMBOLS[BASELINE_MARKERS[name]], "size": 15, "color": "#d55e00", "line": {"width": 2}}
        _add(figure, comparison, name, [record], mode="markers", marker=marker)
    if comparison.published:
        figure.add_scatter(
            x=[m.params / 1e6 for m in comparison.published],
            y=[100 * m.wer for m in comparison.published],
            name="published",
            hovertext=[f"{escape(m.label)}<br>WER {100 * m.wer:.2f} %" for m in comparison.published],
            hoverinfo="text",
            mode="markers",
            marker={"symbol": "cross-thin-open", "size": 11, "color": grey, "line": {"width": 2}},
        )
    _add_rings(figure, comparison)
    shown = [place(r, comparison.objective)[1] for r in (*comparison.front, *comparison.baselines.values())]
    _lay_out(figure, comparison, [*shown, *(100 * m.wer for m in comparison.published)])
    return figure


def _add(figure: go.Figure, comparison: Comparison, name: str, records: Sequence[RunRecord], **style: Any) -> None:
    """A trace of the records that have a place."""
    placed = [(r, p) for r in records if (p := place_stopped(r, comparison.objective))]
    if placed:
        xs, ys = zip(*(p for _, p in placed), strict=True)
        hover = [_hover(comparison, r) for r, _ in placed]
        keys = [r.candidate.key for r, _ in placed]
        figure.add_scatter(x=xs, y=ys, name=name, hovertext=hover, hoverinfo="text", customdata=keys, **style)


def _lay_out(figure: go.Figure, comparison: Comparison, focus: Sequence[float]) -> None:
    """Axes that show all WERs in `focus` (percent), and no colours of their own."""
    axis = {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False, "automargin": True}
    span = max(focus) - min(focus) or 0.1 * max(focus) or 1.0
    figure.update_layout(
        xaxis={**axis, "title": f"{_noun(comparison).capitalize()}, millions"},
        yaxis={**axis, "title": "Dev WER, %", "range": [min(focus) - 0.15 * span, max(focus) + 0.6 * span]},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
    )


def _add_rings(figure: go.Figure, comparison: Comparison) -> None:
    """A ring around every point, to be seen once it is pinned: rings that came and went would move the axes."""
    records = _plotted(comparison)
    xs, ys = zip(*(place_stopped(r, comparison.objective) for r in records), strict=True)
    figure.add_scatter(
        x=xs,
        y=ys,
        uid="pinned",
        customdata=[r.candidate.key for r in records],
        mode="markers+text",
        marker={"symbol": "circle-open", "size": 24, "line": {"width": 2.5}, "opacity": [0] * len(records)},
        text=["\u00a0"] * len(records),  # plotly would take an empty label away for good
        textposition="top center",
        textfont={"size": 14, "weight": 700},
        hoverinfo="skip",
        showlegend=False,
    )


def _hover(comparison: Comparison, record: RunRecord) -> str:
    groups = zip(("encoder", "speech", "total"), sizes(comparison, record), strict=True)
    lines = [
        f"<b>{escape(full_title(record))}</b>",
        strip(record),
        f"LoRA rank {record.lora_rank}" if record.lora_rank else "no LoRA",
        *_measured(record),
        *(f"{group} {size} M ({change})" for group, (size, change) in groups),
    ]
    return "<br>".join(lines)


def _measured(record: RunRecord) -> list[str]:
    if record.dev is None:
        return [f"WER dev {100 * rung.errors.wer:.2f} % at step {rung.step}" for rung in record.rungs[-1:]]
    wers = f"WER dev {wer_percent(record.dev)} %, test {wer_percent(record.test)} %"
    kinds = f"S/D/I {error_kinds(record)}".removesuffix(" *")
    split = record.test or record.dev
    worst = []
    if split.worst_group_wer is not None:
        worst.append(f"worst group {escape(str(split.worst_group))}: {100 * split.worst_group_wer:.2f} %")
    return [wers, f"{kinds} per 100 reference words on {'test' if record.test else 'dev'}", *worst]


def scroll_box(label: str, table: str) -> str:
    """A table that scrolls by itself where it is wider than the page; by keyboard, too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _html(table: Table) -> str:
    columns = table.columns[1:]

    def row(cells: tuple[str, ...], pin: str) -> str:
        first, *rest = map(escape, cells)
        wraps = [' class="wrap"' if column == "removed" or (table.prose and i > 0) else "" for i, column in enumerate(columns)]
        tail = "".join(f"<td{wrap}>{cell}</td>" for wrap, cell in zip(wraps, rest, strict=True))
        return f'<tr><th scope="row">{first}</th>{pin}{tail}</tr>'

    pins = [f"<td>{_pin_button(r)}</td>" for r in table.records] or [""] * len(table.rows)
    names = (table.columns[0], *(["pin"] if table.records else []), *columns)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "\n".join(map(row, table.rows, pins))
    note = f"<small>{escape(table.note)}</small>" if table.note else ""
    whole = f"<table><caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return scroll_box(table.title, whole) + note


def _pin_button(record: RunRecord) -> str:
    key, name = escape(record.candidate.key), escape(title(record))
    return f'<button type="button" data-pin="{key}" aria-pressed="false" aria-label="pin {name}">pin</button>'
