"""Printing results to stdout: tables for people, JSON for programs."""

import json
import math
import sys
from typing import Any

import typer

LEAST_WIDTH = 120  # columns for tables on a terminal
PIPE_WIDTH = 160  # columns for tables in a file or pipe


def print_tables(renderable: Any) -> None:
    """Print what rich can render. A table that is wider than the terminal wraps there; no column is cut off."""
    from rich.console import Console

    Console(width=max(Console().width, LEAST_WIDTH) if sys.stdout.isatty() else PIPE_WIDTH).print(renderable)


def print_json(value: Any) -> None:
    """Print one JSON value. NaN and infinities, which JSON does not have, are printed as null."""
    typer.echo(json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_hint(text: str, as_json: bool = False) -> None:
    """Print where results are, or what to do next. With `--json`, to stderr: stdout has the JSON value only."""
    typer.echo(text, err=as_json)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(count: int, noun: str) -> str:
    """`1 line`, `2 lines`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
