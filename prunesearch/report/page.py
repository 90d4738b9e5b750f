"""The report as one HTML file that needs no network: verdict, interactive plot of the front, and all tables."""

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from prunesearch.report.comparison import Comparison
from prunesearch.report.document import document
from prunesearch.report.formats import to_html
from prunesearch.report.overlay import overlay_table
from prunesearch.report.pins import PANEL, full_title, pin_script, strip
from prunesearch.report.plots import BASELINE_MARKERS, STUDY_COLOURS, place, place_if_decoded
from prunesearch.report.tables import tables
from prunesearch.report.values import (
    OBJECTIVE_NOUNS,
    PARAMETER_GROUPS,
    kinds_text,
    named,
    parameters_and_changes,
    wer_percent,
)
from prunesearch.report.verdict import verdict
from prunesearch.study.record import RunRecord

SYMBOLS = {"s": "square-open", "D": "diamond-open", "^": "triangle-up-open", "v": "triangle-down-open"}


def render_page(comparison: Comparison) -> str:
    """A study's whole page. Everything that comes from data is escaped; plotly.js is inlined once."""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(comparison))
    parts = [f"<ul>{sentences}</ul>", _plot(comparison), *map(to_html, tables(comparison))]
    if comparison.complete:
        parts.append(pin_script(_plotted(comparison), comparison.rate))
    return document(comparison.study, comparison.study, parts)


def render_overlay_page(comparisons: Sequence[Comparison]) -> str:
    """A page with the fronts of several studies in one plot, and a table with one row per study."""
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
    note = "Bottom left is better. Filled marks: fronts; open marks: baselines. Point at a candidate to see its layers."
    plot = _embedded(figure, f"Fronts of {names}", note) if kept else "<p>No candidate is complete yet.</p>"
    return document(names, names, [plot, to_html(overlay_table(comparisons).about(comparisons[0].rate))])


def _plot(comparison: Comparison) -> str:
    if not comparison.complete:
        return "<p>No candidate is complete yet.</p>"
    note = (
        "Bottom left is better. Point at a candidate to see its layers, first to last: ■ kept, □ removed. "
        "Click it to compare it with another one. Drag to zoom, double-click to see everything."
    )
    noun = OBJECTIVE_NOUNS[comparison.objective]
    label = f"Dev {comparison.rate} against {noun} of every candidate; the tables below contain front and baselines."
    return f"{_embedded(_figure(comparison), label, note)}\n{PANEL}"


def _embedded(figure: go.Figure, label: str, note: str) -> str:
    """A figure with plotly.js inlined. `label` is the text for screen readers."""
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        default_height="100%",
        div_id="front",
        # a second click within this delay (ms) resets the axes instead of pinning a point, so the delay is short
        config={"displayModeBar": False, "responsive": True, "doubleClickDelay": 300},
    )
    box = f'<div class="plot" role="img" aria-label="{escape(label)}">{plot}</div>'
    return f"<figure>{box}<figcaption>{note}</figcaption></figure>"


def _plotted(comparison: Comparison) -> list[RunRecord]:
    return [r for r in (*comparison.complete, *comparison.pruned) if place_if_decoded(r, comparison.objective)]


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
            x=[p.params / 1e6 for p in comparison.published],
            y=[100 * p.wer for p in comparison.published],
            name="published",
            hovertext=[f"{escape(p.label)}<br>WER {100 * p.wer:.2f} %" for p in comparison.published],
            hoverinfo="text",
            mode="markers",
            marker={"symbol": "cross-thin-open", "size": 11, "color": grey, "line": {"width": 2}},
        )
    _add_rings(figure, comparison)
    # without front and baselines, all candidates are above the groups' limit
    focus = (*comparison.front, *comparison.baselines.values()) or comparison.complete
    shown = [place(r, comparison.objective)[1] for r in focus]
    _lay_out(figure, comparison, [*shown, *(100 * p.wer for p in comparison.published)])
    return figure


def _add(figure: go.Figure, comparison: Comparison, name: str, records: Sequence[RunRecord], **style: Any) -> None:
    """Add a trace of the records that were decoded on dev."""
    placed = [(r, p) for r in records if (p := place_if_decoded(r, comparison.objective))]
    if placed:
        xs, ys = zip(*(p for _, p in placed), strict=True)
        hover = [_hover(comparison, r) for r, _ in placed]
        keys = [r.candidate.key for r, _ in placed]
        figure.add_scatter(x=xs, y=ys, name=name, hovertext=hover, hoverinfo="text", customdata=keys, **style)


def _lay_out(figure: go.Figure, comparison: Comparison, focus: Sequence[float]) -> None:
    """Set up axes that show all WERs in `focus` (in percent), without colours of their own."""
    axis = {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False, "automargin": True}
    span = max(focus) - min(focus) or 0.1 * max(focus) or 1.0
    figure.update_layout(
        xaxis={**axis, "title": f"{OBJECTIVE_NOUNS[comparison.objective].capitalize()}, millions"},
        yaxis={**axis, "title": f"Dev {comparison.rate}, %", "range": [min(focus) - 0.15 * span, max(focus) + 0.6 * span]},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
    )


def _add_rings(figure: go.Figure, comparison: Comparison) -> None:
    """Add an invisible ring around every point; pinning shows it. Adding rings later would move the axes."""
    records = _plotted(comparison)
    xs, ys = zip(*(place_if_decoded(r, comparison.objective) for r in records), strict=True)
    figure.add_scatter(
        x=xs,
        y=ys,
        uid="pinned",
        customdata=[r.candidate.key for r in records],
        mode="markers+text",
        marker={"symbol": "circle-open", "size": 24, "line": {"width": 2.5}, "opacity": [0] * len(records)},
        text=["\u00a0"] * len(records),  # plotly removes an empty label for good
        textposition="top center",
        textfont={"size": 14, "weight": 700},
        hoverinfo="skip",
        showlegend=False,
    )


def _hover(comparison: Comparison, record: RunRecord) -> str:
    groups = zip(PARAMETER_GROUPS, parameters_and_changes(comparison, record), strict=True)
    lines = [
        f"<b>{escape(full_title(record))}</b>",
        strip(record),
        f"LoRA rank {record.lora_rank}" if record.lora_rank else "no LoRA",
        *_measured(record),
        *(f"{group} {size} M ({change})" for group, (size, change) in groups),
    ]
    return named("<br>".join(lines), comparison.rate)


def _measured(record: RunRecord) -> list[str]:
    if record.reported is None:
        return [f"WER dev {100 * rung.errors.wer:.2f} % at step {rung.step}" for rung in record.rungs[-1:]]
    split, result = record.reported
    lines = [
        f"WER dev {wer_percent(record.dev)} %, test {wer_percent(record.test)} %",
        f"S/D/I {kinds_text(result.errors)} per 100 reference words on {split}",
    ]
    if result.worst_group_wer is not None:
        lines.append(f"worst group {escape(str(result.worst_group))}: {100 * result.worst_group_wer:.2f} %")
    return lines
