"""Render a table for a terminal (rich), a page (HTML), a README (Markdown) or a paper (LaTeX with booktabs)."""

from collections.abc import Sequence
from html import escape

from rich import box
from rich.style import Style
from rich.table import Table as RichTable
from rich.text import Text

from prunesearch.report.table import Shade, Table

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "→": r"$\to$", "×": r"$\times$",
    "●": r"$\bullet$", "★": r"$\star$", "ρ": r"$\rho$", "τ": r"$\tau$", "Δ": r"$\Delta$", "π": r"$\pi$",
}  # fmt: skip


def to_rich(table: Table) -> RichTable:
    """For a terminal. Where the terminal is too narrow, cells break into lines; nothing is cut off."""
    shown = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text(table.note, style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column, is_text in zip(table.columns, _are_text(table), strict=True):
        shown.add_column(Text(column), justify="left" if is_text else "right", overflow="fold")
    for row, shades in zip(table.rows, _shades(table), strict=True):
        shown.add_row(*(Text(cell, _rich_style(shade)) for cell, shade in zip(row, (None, *shades), strict=True)))
    return shown


def to_markdown(tables: Sequence[Table]) -> str:
    """One after the other, each under its title."""
    return "\n".join(map(_markdown, tables))


def to_latex(tables: Sequence[Table]) -> str:
    """One `table` environment per table; needs the booktabs package."""
    return "% \\usepackage{booktabs}\n" + "\n".join(map(_latex, tables))


def to_html(table: Table) -> str:
    """A table in a scroll box, its note below it. A row that can be pinned has a pin button after its name."""
    are_text = _are_text(table)[1:]
    first, *others = table.columns
    heads = [f'<th scope="col"{_html_class(text)}>{escape(name)}</th>' for name, text in zip(others, are_text, strict=True)]
    pin = '<th scope="col">pin</th>' if table.pins else ""
    head = f'<tr><th scope="col">{escape(first)}</th>{pin}{"".join(heads)}</tr>'
    buttons = [f"<td>{_pin_button(key, title)}</td>" for key, title in table.pins] or [""] * len(table.rows)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{button}{_html_cells(row[1:], are_text, shades)}</tr>'
        for row, button, shades in zip(table.rows, buttons, _shades(table), strict=True)
    )
    whole = f"<table><caption>{escape(table.title)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"
    note = f"<small>{escape(table.note)}</small>" if table.note else ""
    return scroll_box(table.title, whole) + note


def scroll_box(label: str, table: str) -> str:
    """A box that scrolls by itself, with the mouse or the keyboard, if its table is wider than the page."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _are_text(table: Table) -> list[bool]:
    """For each column, whether it holds text, not numbers. The first one names the row."""
    return [i == 0 or column in table.text_columns for i, column in enumerate(table.columns)]


def _shades(table: Table) -> Sequence[Sequence[Shade | None]]:
    return table.shades or [[None] * (len(table.columns) - 1)] * len(table.rows)


def _rich_style(shade: Shade | None) -> Style | str:
    return Style(color=shade.ink, bgcolor=shade.background) if shade else ""


def _html_class(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _html_cells(cells: Sequence[str], are_text: Sequence[bool], shades: Sequence[Shade | None]) -> str:
    parts = []
    for cell, is_text, shade in zip(cells, are_text, shades, strict=True):
        look = _html_class(is_text)
        look += f' style="background:{shade.background};color:{shade.ink}"' if shade else ""
        parts.append(f"<td{look}>{escape(cell)}</td>")
    return "".join(parts)


def _pin_button(key: str, title: str) -> str:
    label = f"pin {escape(title)}"
    return f'<button type="button" data-pin="{escape(key)}" aria-pressed="false" aria-label="{label}">pin</button>'


def _markdown(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = row(["---" if is_text else "---:" for is_text in _are_text(table)])
    lines = [f"### {table.title}", "", row(table.columns), ruler, *map(row, table.rows), ""]
    return "\n".join([*lines, f"{table.note}\n" if table.note else ""])


def _latex(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "    " + " & ".join(map(_latex_escaped, cells)) + r" \\"

    columns = "".join("l" if is_text else "r" for is_text in _are_text(table))
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering\small",
            f"  \\caption{{{_latex_escaped(table.title)}. {_latex_escaped(table.note)}}}",
            f"  \\begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            row(table.columns),
            r"    \midrule",
            *map(row, table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_escaped(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)
