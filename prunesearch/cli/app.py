"""The command line: parse, load, call, print. Each command is one call into the package.

Nothing heavy is imported before a command runs: `prunesearch --help` must not wait for torch.
"""

import json
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunesearch import __version__

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from prunesearch.study.record import RunRecord

WATCH_SECONDS = 3
SAY_SECONDS = 30  # where there is no progress bar, what is being done is said so often

app = typer.Typer(
    help="Find the smallest speech encoder a speech-LLM can live with: layers to remove, LoRA rank to repair with.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Study = Annotated[Path, typer.Argument(metavar="STUDY", help="A study file, or a folder with a study.toml in it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
StorageUrl = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="URL", envvar="PRUNESEARCH_STORAGE", help="Optuna storage; default: the study's, a journal file."
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prunesearch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new study's name.")],
    folder: Annotated[Path, typer.Option("--in", help="Where studies live.")] = Path("studies"),
) -> None:
    """Write a commented study file to start from."""
    from prunesearch.commands.init import write_study_file

    path = write_study_file(folder, name)
    typer.echo(f"wrote {path}; edit it, then: prunesearch validate {path.parent}")


@app.command()
def validate(
    study: Study,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the full configuration, defaults and all.")] = False,
) -> None:
    """Check a study file: all mistakes at once, one line each."""
    from prunesearch.study.config import load_study

    config = load_study(study)
    if resolved:
        from prunesearch.workers.storage import shown

        table = config.model_dump(mode="json")
        table["storage"]["url"] = config.storage.url and shown(config.storage.url)
        _print_json(table)
    else:
        typer.echo(f"{config.source} is valid: {config.name}, fingerprint {config.fingerprint()}")


@app.command()
def plan(
    study: Study,
    seconds: Annotated[float, typer.Option(min=0.1, help="Mean length of a recording.")] = 5.0,
    hours: Annotated[float | None, typer.Option(min=0, help="Size of the train split; default: no epoch repeats.")] = None,
    teraflops: Annotated[
        float, typer.Option(min=0.001, help="What the GPU achieves; a third of an A100's bf16 peak is 100.")
    ] = 100.0,
    as_json: Json = False,
) -> None:
    """Show what will be run: parameters by group, the size of the space, steps, GPU memory and hours. Trains nothing."""
    from dataclasses import asdict

    from prunesearch.commands.plan import estimate
    from prunesearch.commands.plan import plan as make_plan
    from prunesearch.study.config import load_study

    config = load_study(study, data_must_exist=False)
    made, cost = make_plan(config), estimate(config, seconds, hours, teraflops)
    if as_json:
        _print_json({**made.to_json(), "estimate": asdict(cost)})
    else:
        from prunesearch.cli.tables import plan_tables

        _print(plan_tables(made, cost))


@app.command()
def scan(
    study: Study,
    most: Annotated[int, typer.Option(min=1, help="Layers in a set, at most.")] = 2,
    utterances: Annotated[int, typer.Option(min=1, help="How many of dev.")] = 64,
    loss_sets: Annotated[int, typer.Option(min=0, help="Larger sets whose loss is measured: those of least drift.")] = 128,
    wer: Annotated[bool, typer.Option("--wer", help="Decode without each single layer, too.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Run each set by itself as well; compare, and time both.")] = False,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """Measure what each layer, and each pair, is worth to the anchor's system, before anything else is trained."""
    from prunesearch.commands.launch import scan as run_scan

    with _Display() as display:
        found = run_scan(study, most, utterances, loss_sets, wer, check, storage, display)
    if as_json:
        _print_json(found.model_dump(mode="json"))
    else:
        from prunesearch.report.scan import render_scan
        from prunesearch.study.config import load_study

        _print(render_scan(found))
        typer.echo(f"scan: {load_study(study, data_must_exist=False).run_folder / 'scan' / 'scan.html'}")


class Launcher(StrEnum):
    """Where workers run."""

    local = "local"
    slurm = "slurm"


Adopt = Annotated[bool, typer.Option("--adopt", help="Go on with other code, data or anchor than the study began with.")]


@app.command()
def launch(
    study: Study,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")] = 1,
    trials: Annotated[int | None, typer.Option(min=1, help="Candidates in the whole study, baselines included.")] = None,
    storage: StorageUrl = None,
    launcher: Annotated[Launcher, typer.Option(help="Where the workers run.")] = Launcher.local,
    slurm: Annotated[
        list[str] | None, typer.Option("--slurm", metavar="KEY=VALUE", help="An option of sbatch; may be repeated.")
    ] = None,
    adopt: Adopt = False,
) -> None:
    """Run a study, or go on with one. Kill it at any time: launched again, it loses nothing that was completed."""
    from prunesearch.commands.launch import launch as run
    from prunesearch.commands.status import left_out

    if launcher is Launcher.slurm:
        from prunesearch.commands.slurm import submit

        options = {key: value for key, _, value in (option.partition("=") for option in slurm or ())}
        jobs = submit(study, workers, trials, storage, options, adopt)
        typer.echo(f"submitted: {', '.join(jobs)}; `prunesearch status {study}` shows how it goes")
        return
    with _Display() as display:
        config = run(study, workers, trials, storage, display, adopt)
    for split, count in left_out(config).items():
        typer.echo(f"{count} lines of {split} were left out: {config.run_folder / 'corpus' / split}.json says which, and why")
    typer.echo(f"done: prunesearch report {config.source}")


@app.command()
def worker(study: Study, storage: StorageUrl = None, adopt: Adopt = False) -> None:
    """Join a study that was launched, from this machine or another, and work until its budget is used."""
    from prunesearch.commands.launch import join

    with _Display() as display:
        config = join(study, storage, display, adopt)
    typer.echo(f"done: prunesearch report {config.source}")


@app.command()
def status(
    study: Study,
    storage: StorageUrl = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every few seconds, until Ctrl-C.")] = False,
    price: Annotated[float | None, typer.Option(min=0, help="What a worker costs an hour, for an estimate.")] = None,
    as_json: Json = False,
) -> None:
    """Show how far a study has come: workers and what they do, the front so far, what is left."""
    from prunesearch.commands.status import status as read_status

    found = read_status(study, storage, price)
    if as_json:
        _print_json(found)
        return
    from prunesearch.cli.tables import status_tables

    if not watch:
        _print(status_tables(found))
        return
    from rich.live import Live

    with Live(status_tables(found), auto_refresh=False) as live:
        while found["settled"] < found["trials"] and not (found["aborted"] and not found["running"]):
            time.sleep(WATCH_SECONDS)
            found = read_status(study, storage, price)
            live.update(status_tables(found), refresh=True)


@app.command()
def retry(study: Study, storage: StorageUrl = None) -> None:
    """Have the candidates that failed evaluated once more, by whoever works on the study next."""
    from prunesearch.commands.status import retry as retry_failed

    keys = retry_failed(study, storage)
    typer.echo(f"to be tried again: {', '.join(keys)}" if keys else "no candidate has failed")


@app.command()
def abort(study: Study, storage: StorageUrl = None) -> None:
    """Have all workers stop at the next good moment, wherever they are. `launch` goes on."""
    from prunesearch.commands.status import abort as abort_study

    count = abort_study(study, storage)
    typer.echo(f"{count} workers are asked to stop; it may take them some seconds")


storage_commands = typer.Typer(help="What a study's storage may need.", no_args_is_help=True)
app.add_typer(storage_commands, name="storage")


@storage_commands.command("upgrade")
def storage_upgrade(study: Study, storage: StorageUrl = None) -> None:
    """Bring a database's tables to what the installed Optuna needs."""
    from prunesearch.commands.status import upgrade

    typer.echo(upgrade(study, storage))


@app.command()
def report(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY…", help="Study files, or folders with a study.toml.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to; default: run/report, for several studies: overlay.")
    ] = None,
    tables: Annotated[
        list[str] | None,
        typer.Option(
            "--tables", metavar="NAME…", help="Tables to print instead of the summary: names with commas between them, or all."
        ),
    ] = None,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """Compare the results with the baselines; print a summary and write all tables, plots, an HTML page, CSV and JSON.

    Of several studies, the fronts are drawn in one plot.
    """
    from prunesearch.commands.launch import collect
    from prunesearch.report import render, render_overlay, render_tables, to_json, write_overlay, write_report
    from prunesearch.report.tables import TABLES, checked_names
    from prunesearch.study.config import load_study

    names = checked_names(tables or ())
    configs = [load_study(study, data_must_exist=False) for study in studies]
    for config in configs:
        collect(config, storage)
    if len(configs) > 1:
        folder, stem = out or Path("overlay"), "overlay"
        comparisons = write_overlay(configs, folder)
    else:
        folder, stem = out or configs[0].run_folder / "report", "report"
        comparisons = [write_report(configs[0], out)]
    if as_json:
        made = [to_json(c) for c in comparisons]
        _print_json(made if len(made) > 1 else made[0])
        return
    if names:
        for comparison in comparisons:
            _print(render_tables(comparison, names))
    else:
        _print(render_overlay(comparisons) if len(comparisons) > 1 else render(comparisons[0]))
    typer.echo(f"report: {folder / stem}.html; as text: {stem}.md")
    if not names:
        typer.echo(f"more tables: --tables NAME (or all), of {', '.join(TABLES)}")


@storage_commands.command("proxy")
def storage_proxy(
    study: Study,
    storage: StorageUrl = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 13000,
) -> None:
    """Serve the study's database to many workers through Optuna's gRPC proxy, until Ctrl-C. There is no encryption."""
    from prunesearch.commands.status import serve

    serve(study, storage, host, port, lambda: typer.echo(f"workers may use --storage grpc://{host}:{port}", err=True))


class Init(StrEnum):
    """Where projectors start."""

    anchor = "anchor"
    scratch = "scratch"


@app.command()
def confirm(
    study: Study,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per system, each from its own seed.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps per training; default: five times the search's.")] = None,
    init: Annotated[Init | None, typer.Option("--init", help="Where projectors start; default: as in the search.")] = None,
    older_init: Annotated[Init | None, typer.Option("--from", hidden=True, help="The older name of --init.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")] = 1,
    storage: StorageUrl = None,
) -> None:
    """Train the front and the baselines again, for more steps and from several seeds, and compare with the short runs."""
    from prunesearch.commands.confirm import confirm as run
    from prunesearch.report.confirmation import compare_with_confirmation, confirmation_table
    from prunesearch.report.formats import to_rich
    from prunesearch.study.config import load_study

    start = init or older_init
    with _Display() as display:
        run(study, seeds, steps, start.value if start else None, workers, storage, display)
    found = compare_with_confirmation(load_study(study, data_must_exist=False))
    if found:
        _print(to_rich(confirmation_table(found)))


@app.command()
def export(
    study: Study,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    candidate: Annotated[str | None, typer.Option(metavar="KEY", help="Which one, such as minus-3+lora8.")] = None,
    trial: Annotated[int | None, typer.Option(min=0, metavar="N", help="Which one, by the number of its Optuna trial.")] = None,
    best_under_params: Annotated[
        float | None, typer.Option(min=0, help="The best on dev of at most so many parameters (the study's objective).")
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The front's knee; what is exported without a choice, too.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Add the LoRA to the LLM's weights.")] = False,
    with_llm: Annotated[
        bool | None, typer.Option("--llm/--no-llm", help="Write the LLM, too; default: where it comes from a folder.")
    ] = None,
    storage: StorageUrl = None,
) -> None:
    """Write a candidate as a folder that stands by itself; without a choice, the front's knee."""
    from prunesearch.commands.export import export as write
    from prunesearch.study.errors import StudyError

    if knee and (candidate, trial, best_under_params) != (None, None, None):
        raise StudyError(["--knee: it is a choice of its own; give it alone"])
    record = write(study, out, candidate, trial, best_under_params, merge, with_llm, storage)
    typer.echo(f"{record.name or record.candidate.key}: {out}; prunesearch transcribe {out} AUDIO…")


@app.command()
def measure(
    study: Study,
    candidate: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Which one; may be repeated. Default: the front and the baselines.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each is measured, after once that is not counted.")] = 5,
    utterances: Annotated[int, typer.Option(min=1, help="How many of dev.")] = 16,
    as_json: Json = False,
) -> None:
    """Measure latency, memory and file size on this machine, in turns with the unpruned system."""
    from prunesearch.commands.measure import measure as run

    with _Display() as display:
        found = run(study, candidate or (), turns, utterances, display)
    if as_json:
        from dataclasses import asdict

        _print_json(asdict(found))
    else:
        from prunesearch.cli.tables import measurement_table

        _print(measurement_table(found))


Beams = Annotated[int | None, typer.Option("--beams", min=1, help="Of the search; default: as the study decoded test.")]


class Form(StrEnum):
    """How a transcript is written."""

    text = "text"
    json = "json"
    srt = "srt"


@app.command()
def transcribe(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="An exported system, or a hub repository of one.")],
    audio: Annotated[list[str], typer.Argument(metavar="AUDIO…", help="Recordings, folders of them, or - for stdin.")],
    form: Annotated[Form, typer.Option("--format", help="How to write it.")] = Form.text,
    beams: Beams = None,
) -> None:
    """Say what is said in recordings of any length, one after the other."""
    from transformers.utils import logging

    from prunesearch.asr.recordings import recordings, written
    from prunesearch.asr.recordings import transcribe as say
    from prunesearch.asr.slam_asr import SlamAsr

    logging.disable_progress_bar()
    with recordings(audio) as files:
        asr = SlamAsr.from_pretrained(folder)
        problems = []
        for name, segments, problem in say(asr, files, beams):
            if segments is None:
                problems.append(problem)
                typer.echo(problem, err=True)
            else:
                typer.echo(written(name, segments, form.value, alone=len(files) == 1))
    if problems:
        raise typer.Exit(2)


@app.command()
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="An exported system, or a hub repository of one.")],
    data: Annotated[Path, typer.Option("--data", help="A manifest: JSONL with audio, text and, if any, language.")],
    beams: Beams = None,
    as_json: Json = False,
) -> None:
    """Count an exported system's word errors on a manifest."""
    from transformers.utils import logging

    from prunesearch.asr.recordings import evaluate as count
    from prunesearch.asr.slam_asr import SlamAsr

    logging.disable_progress_bar()
    found = count(SlamAsr.from_pretrained(folder), data, beams=beams)
    if as_json:
        _print_json(found)
        return
    kinds = "/".join(str(found[kind]) for kind in ("substitutions", "deletions", "insertions"))
    typer.echo(f"WER {100 * found['wer']:.2f} % ({kinds} S/D/I in {found['reference_words']} words)")
    for language, wer in found["by_language"].items():
        typer.echo(f"{language}: {100 * wer:.2f} %")


class _Display:
    """Progress bars on a terminal; elsewhere a line now and then. A line per finished candidate anywhere."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._study: TaskID | None = None
        self._tasks: dict[int, TaskID] = {}  # by worker
        self._settled = 0
        self._begin = self._said = time.monotonic()
        self._doing = ""

    def __enter__(self) -> "_Display":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._study = self._bars.add_task("candidates", total=None)
        self._tasks[0] = self._bars.add_task("loading models", total=None)
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._bars
        self._bars.stop()

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        assert self._bars
        if worker not in self._tasks:
            self._tasks[worker] = self._bars.add_task(what, total=of)
        self._bars.update(self._tasks[worker], description=what, completed=done, total=of)
        kind = what.split(",")[0]  # without the loss
        if self._bars.disable and worker == 0 and (kind != self._doing or time.monotonic() - self._said > SAY_SECONDS):
            if self._settled == 0 or kind == self._doing:  # once candidates come in, their lines tell
                self._console.print(f"{self._elapsed()} {what} ({done}/{of})", highlight=False)
                self._said = time.monotonic()
            self._doing = kind

    def finished(self, record: "RunRecord", settled: int, of: int) -> None:
        assert self._bars
        assert self._study is not None
        self._bars.update(self._study, completed=settled, total=of)
        wer = f"{100 * record.dev.errors.wer:6.2f} %" if record.dev else "   —    "
        params, label = record.parameters.speech / 1e6, record.name or record.candidate.key
        note = "" if record.state == "complete" else f"  {record.state}: {record.reason}"
        self._settled, self._said = settled, time.monotonic()
        line = f"{self._elapsed()} {settled:4d}/{of} dev WER {wer} {params:8.2f} M  {label}{note}"
        self._console.print(line, highlight=False)

    def note(self, text: str) -> None:
        self._console.print(f"{self._elapsed()} {text}", highlight=False, markup=False)

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
        return f"{minutes:3d}:{seconds:02d}"


def _print(renderable: Any) -> None:
    from rich.console import Console

    # a table that is too wide for the terminal wraps there: better than columns that are not shown
    Console(width=max(Console().width, 120) if sys.stdout.isatty() else 160).print(renderable)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Run the command line. Exit codes: 0; 2 for the user's mistakes, one line each; 1 for ours, with a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a hub that cannot be reached is told once, by us
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("stopped: launch again to go on", err=True)
        sys.exit(130)
    except Exception as error:
        # looked up late: their modules must not be imported for --help
        from prunesearch.study.errors import StudyError
        from prunesearch.study.interrupt import Interrupted

        if isinstance(error, Interrupted):
            typer.echo("stopped: launch again to go on", err=True)
            sys.exit(128 + (error.signal or 2))
        if not isinstance(error, StudyError):
            raise
        for line in error.lines:
            typer.echo(line, err=True)
        sys.exit(2)
