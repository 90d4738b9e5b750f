"""A table as plain data. `report.formats` shows it in a terminal, on a page, in a README or in a paper."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shade:
    """A cell's colours, as CSS writes them (`#rrggbb`)."""

    background: str
    ink: str


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row."""

    name: str  # a short, stable one: `prunesearch report --tables NAME`
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: tuple[str, ...] = ()  # that hold text, not numbers: left-aligned, may break into lines
    pins: tuple[tuple[str, str], ...] = ()  # each row's candidate key and title, if a reader of the page can pin it
    shades: tuple[tuple[Shade | None, ...], ...] = ()  # each row's cells after the first one; empty: no colours
