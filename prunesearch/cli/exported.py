"""Commands that work on an exported system instead of a study: transcribe and evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from prunesearch.cli.options import Beams, ExportedLlm, Folder, Json, TranscriptFormat
from prunesearch.cli.output import print_json


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (transcribe, evaluate):
        app.command()(command)


def transcribe(
    folder: Folder,
    audio: Annotated[list[str], typer.Argument(metavar="AUDIO…", help="Recordings, folders of recordings, or - for stdin.")],
    transcript_format: Annotated[
        TranscriptFormat, typer.Option("--format", help="Format of the transcripts.")
    ] = TranscriptFormat.text,
    language: Annotated[
        str | None, typer.Option("--language", help="Spoken in the recordings, such as da, for models that take one.")
    ] = None,
    beams: Beams = None,
    llm: ExportedLlm = None,
) -> None:
    """Transcribe recordings of any length."""
    from transformers.utils import logging

    from prunesearch.asr.auto import AutoAsr
    from prunesearch.asr.recordings import format_transcript, recordings, transcribe_files

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of how its own Whisper calls its own generation
    with recordings(audio) as files:
        asr = AutoAsr.from_pretrained(folder, llm=llm)
        failed = False
        for transcript in transcribe_files(asr, files, beams, language):
            if transcript.problem is not None:
                failed = True
                typer.echo(transcript.problem, err=True)
            else:
                typer.echo(format_transcript(transcript, transcript_format.value, with_name=len(files) > 1))
    if failed:
        raise typer.Exit(2)


def evaluate(
    folder: Folder,
    data: Annotated[Path, typer.Option("--data", help="Manifest: JSONL with audio, text and, optionally, language.")],
    beams: Beams = None,
    llm: ExportedLlm = None,
    as_json: Json = False,
) -> None:
    """Measure an exported system's WER on a manifest."""
    from transformers.utils import logging

    from prunesearch.asr.auto import AutoAsr
    from prunesearch.asr.scoring import score_manifest

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of how its own Whisper calls its own generation
    found = score_manifest(AutoAsr.from_pretrained(folder, llm=llm), data, beams=beams)
    if as_json:
        print_json(found)
        return
    kinds = "/".join(str(found[kind]) for kind in ("substitutions", "deletions", "insertions"))
    rate, unit = found["metric"].upper(), "characters" if found["metric"] == "cer" else "words"
    typer.echo(f"{rate} {100 * found['wer']:.2f} % ({kinds} S/D/I in {found['reference_words']} {unit})")
    for language, wer in found["by_language"].items():
        typer.echo(f"{language}: no reference words" if wer is None else f"{language}: {100 * wer:.2f} %")
