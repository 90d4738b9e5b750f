"""Command lines as documents and deployment files write them, checked against the command line interface."""

from collections.abc import Iterator, Sequence
from typing import Any

import typer

from prunesearch.cli.app import app


def leaf_commands(command: Any = None) -> Iterator[Any]:
    """Every command that does something, such as `launch` and `storage proxy`."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield command
        return
    for inner in command.commands.values():
        yield from leaf_commands(inner)


def find_command(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """The command that `prunesearch ARGUMENTS…` runs, and what is left for it. Raises ValueError where there is none."""
    command, rest = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in command.commands:
            raise ValueError(f"prunesearch has no command {name!r}, only {', '.join(command.commands)}")
        command = command.commands[name]
    return command, rest


def check_flags(arguments: Sequence[str]) -> None:
    """Raises where the command does not exist, or a flag is not one of its own; required arguments may be missing."""
    command, rest = find_command(arguments)
    known = flags(command)
    for word in rest:
        name = word.split("=")[0]
        if name.startswith("-") and name not in ("-", "--") and name not in known:
            raise ValueError(f"{' '.join(arguments)!r}: {command.name} has no {name}, only {', '.join(sorted(known))}")


def check_whole(arguments: Sequence[str]) -> None:
    """Raises where the line could not be run: as check_flags, and where an argument is missing, too many or of a wrong type."""
    check_flags(arguments)
    command, rest = find_command(arguments)
    command.make_context(command.name, rest)  # parses, converts and checks; runs nothing


def flags(command: Any) -> set[str]:
    """`--json`, `--no-llm`, …, without hidden ones, which are old names."""
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    names = [name for parameter in shown for name in (*parameter.opts, *parameter.secondary_opts)]
    return {name for name in names if name.startswith("-")} | {"--help", "-h"}


def variables(command: Any) -> set[str]:
    """The environment variables that an option may be set by."""
    found: set[str] = set()
    for parameter in command.params:
        named = parameter.envvar or ()
        found |= {named} if isinstance(named, str) else set(named)
    return found
