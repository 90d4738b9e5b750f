"""A table as plain data. `report.formats` shows it in a terminal, on a page, in a README or in a paper."""

from dataclasses import dataclass, replace

from prunesearch.report.values import named


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

    def about(self, rate: str) -> "Table":
        """The same table in a study whose error rate is called so."""
        columns, text_columns = (tuple(named(c, rate) for c in names) for names in (self.columns, self.text_columns))
        title, note = named(self.title, rate), named(self.note, rate)
        return replace(self, title=title, note=note, columns=columns, text_columns=text_columns)
