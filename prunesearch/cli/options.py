"""Arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Study = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file, or a folder that contains study.toml.")]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Exported system: a folder or a hub repository.")]

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON value on stdout instead of text. Everything else goes to stderr.")
]
StorageUrl = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        envvar="PRUNESEARCH_STORAGE",
        help="Optuna storage. Default: storage.url of the study file, else a journal file in the run folder.",
    ),
]
AllowChanges = Annotated[
    bool,
    typer.Option("--allow-changes", help="Continue even though code, data, models or anchor differ from the study's start."),
]
ExportedLlm = Annotated[
    str | None,
    typer.Option("--llm", metavar="FOLDER", help="Folder or hub name of the LLM, for a system that was exported without it."),
]
Beams = Annotated[int | None, typer.Option("--beams", min=1, help="Beam size. Default: the one that the study used on test.")]

# names of earlier versions; they still work, and help does not show them
Adopt = Annotated[bool, typer.Option("--adopt", hidden=True)]
Turns = Annotated[int | None, typer.Option("--turns", min=1, hidden=True)]


class Launcher(StrEnum):
    """Where workers run."""

    local = "local"
    slurm = "slurm"


class Init(StrEnum):
    """The weights that a projector's training starts from."""

    anchor = "anchor"
    scratch = "scratch"


class TranscriptFormat(StrEnum):
    """How a transcript is printed."""

    text = "text"
    json = "json"
    srt = "srt"
