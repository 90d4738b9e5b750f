"""The tables as text to paste: Markdown for a README, LaTeX (booktabs) for a paper."""

from collections.abc import Sequence

from prunesearch.report.tables import Table

SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "→": r"$\to$", "×": r"$\times$",
    "●": r"$\bullet$", "★": r"$\star$", "ρ": r"$\rho$", "τ": r"$\tau$", "Δ": r"$\Delta$",
}  # fmt: skip


def to_markdown(tables: Sequence[Table]) -> str:
    """One after the other, each under its title."""
    return "\n".join(map(_markdown, tables))


def to_latex(tables: Sequence[Table]) -> str:
    """One `table` environment each; needs the booktabs package."""
    return "% \\usepackage{booktabs}\n" + "\n".join(map(_latex, tables))


def _markdown(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = row(["---", *("---:" for _ in table.columns[1:])])
    lines = [f"### {table.title}", "", row(table.columns), ruler, *map(row, table.rows), ""]
    return "\n".join([*lines, f"{table.note}\n" if table.note else ""])


def _latex(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "    " + " & ".join(map(_escaped, cells)) + r" \\"

    columns = "l" + "r" * (len(table.columns) - 1)
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering\small",
            f"  \\caption{{{_escaped(table.title)}. {_escaped(table.note)}}}",
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


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)
