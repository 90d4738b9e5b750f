"""Runs the command line: environment, error messages and exit codes."""

import os
import sys

import typer

USER_ERROR = 2  # click exits with 2 for wrong options, too
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_app(app: typer.Typer) -> None:
    """Run `app` on the command line's arguments.

    Exit codes: 0 for success; 2 for an error in what the user gave, with one line for each on stderr; 1 for an error in
    prunesearch, with a traceback; 128 + the signal's number after an interruption.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our own message says that the hub cannot be reached
    try:
        app()
    except KeyboardInterrupt:
        _exit_interrupted(INTERRUPTED)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            _exit_interrupted(INTERRUPTED)
        raise
    except Exception as error:
        # imported here: `prunesearch --help` must not wait for pydantic
        from prunesearch.study.errors import user_error_lines
        from prunesearch.study.interrupt import Interrupted

        if isinstance(error, Interrupted):
            _exit_interrupted(128 + error.signal if error.signal else INTERRUPTED)
        if (lines := user_error_lines(error)) is None:
            raise
        for line in lines:
            typer.echo(line, err=True)
        sys.exit(USER_ERROR)


def _exit_interrupted(code: int) -> None:
    typer.echo("interrupted: run the same command again to continue", err=True)
    sys.exit(code)
