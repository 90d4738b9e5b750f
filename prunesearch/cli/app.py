"""The command line: each command parses its arguments, makes one call into the package, and prints the result.

A command imports what it needs when it runs: `prunesearch --help` must not wait for torch. A command has one parameter per
option, so some of them have more than seven.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from prunesearch import __version__
from prunesearch.cli import exported
from prunesearch.cli.main import run_app
from prunesearch.cli.options import (
    Adopt,
    AllowChanges,
    Init,
    Json,
    Launcher,
    StorageUrl,
    Study,
    Turns,
)
from prunesearch.cli.output import counted, print_hint, print_json, print_tables
from prunesearch.cli.progress import ProgressDisplay
from prunesearch.cli.storage import storage_commands

REFRESH_SECONDS = 3  # of `status --watch`

app = typer.Typer(
    help="Find encoder layers that can be removed from a speech-LLM, and the LoRA rank that repairs the damage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"prunesearch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new study.")],
    folder: Annotated[Path, typer.Option("--in", help="Folder to create the study's folder in.")] = Path("studies"),
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Speech model that exists already: a hub name or a folder, such as of Whisper."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One manifest, to be split into train, dev and test by speaker, else by text."),
    ] = None,
) -> None:
    """Write a commented study file to start from."""
    from prunesearch.commands.init import write_study_file

    path = write_study_file(folder, name, model)
    if data is not None:
        from prunesearch.commands.init import write_splits

        typer.echo(write_splits(data, path))
    typer.echo(f"wrote {path}; edit it, then run: prunesearch validate {path.parent}")


@app.command()
def validate(
    study: Study,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the full configuration, defaults included, as JSON.")
    ] = False,
) -> None:
    """Check a study file and print all errors in it, one per line."""
    from prunesearch.study.config import load_study

    config = load_study(study)
    if resolved:
        from prunesearch.workers.urls import shown

        table = config.model_dump(mode="json")
        table["storage"]["url"] = config.storage.url and shown(config.storage.url)
        print_json(table)
    else:
        from prunesearch.model.families import describe_model

        what = describe_model(config)
        typer.echo(f"{config.source} is valid: {config.name}, {what}, fingerprint {config.fingerprint()}")


@app.command()
def plan(
    study: Study,
    seconds: Annotated[float, typer.Option(min=0.1, help="Mean length of a recording, in seconds.")] = 5.0,
    hours: Annotated[
        float | None,
        typer.Option(min=0, help="Size of the train split, in hours. Default: large enough that no recording is used twice."),
    ] = None,
    teraflops: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Speed that the GPU reaches, in 10^12 operations per second. A third of an A100's bf16 peak is 100.",
        ),
    ] = 100.0,
    as_json: Json = False,
) -> None:
    """Show parameter counts, the size of the search space, and the steps, GPU memory and hours that a study needs.

    Trains nothing and reads no recordings.
    """
    from dataclasses import asdict

    from prunesearch.commands.plan import estimate
    from prunesearch.commands.plan import plan as make_plan
    from prunesearch.study.config import load_study

    config = load_study(study, data_must_exist=False)
    made, cost = make_plan(config), estimate(config, seconds, hours, teraflops)
    if as_json:
        print_json({**made.to_json(), "estimate": asdict(cost)})
    else:
        from prunesearch.cli.tables import plan_tables

        print_tables(plan_tables(made, cost))


@app.command()
def scan(
    study: Study,
    most: Annotated[int, typer.Option(min=1, help="Largest number of layers in a set.")] = 2,
    utterances: Annotated[int, typer.Option(min=1, help="Number of dev utterances to use.")] = 64,
    loss_sets: Annotated[
        int,
        typer.Option(min=0, help="Number of multi-layer sets to measure the loss of (those with the least projector drift)."),
    ] = 128,
    wer: Annotated[bool, typer.Option("--wer", help="Also decode without each single layer.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Also run each set separately, compare the results, and time both ways.")
    ] = False,
    screened: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of sets, of all sizes, to measure after the repair; default: 80 of ten layers, 460 of 24.",
        ),
    ] = None,
    sets: Annotated[int, typer.Option(min=1, help="Number of best sets of each size to show.")] = 3,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """Measure how much the unpruned system loses without each layer, each pair, and larger sets after the repair.

    Trains only the anchor, if there is none yet.
    """
    from prunesearch.commands.scan import scan as run_scan
    from prunesearch.study.config import load_study

    with ProgressDisplay() as display:
        found = run_scan(study, most, utterances, loss_sets, wer, check, screened, storage, display)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        from prunesearch.report.scan import render_scan

        print_tables(render_scan(found, sets))
    page = load_study(study, data_must_exist=False).run_folder / "scan" / "scan.html"
    print_hint(f"scan: {page}", as_json)


@app.command()
def launch(
    study: Study,
    workers: Annotated[int, typer.Option(min=1, help="Number of worker processes on this machine, or of SLURM jobs.")] = 1,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Number of candidates in the whole study, baselines included. Default: search.trials."),
    ] = None,
    storage: StorageUrl = None,
    launcher: Annotated[Launcher, typer.Option(help="Where the workers run.")] = Launcher.local,
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="Option for sbatch, such as partition=gpu. May be repeated."),
    ] = None,
    allow_changes: AllowChanges = False,
    adopt: Adopt = False,
) -> None:
    """Start a study, or resume it. It can be killed at any time: no finished candidate is lost."""
    from prunesearch.commands.launch import launch as run
    from prunesearch.commands.status import left_out

    allow_changes = allow_changes or adopt
    if launcher is Launcher.slurm:
        from prunesearch.commands.slurm import submit

        options = {key: value for key, _, value in (option.partition("=") for option in slurm or ())}
        jobs = submit(study, workers, trials, storage, options, allow_changes)
        typer.echo(f"submitted {counted(len(jobs), 'job')}: {', '.join(jobs)}; to see the progress: prunesearch status {study}")
        return
    with ProgressDisplay() as display:
        config = run(study, workers, trials, storage, display, allow_changes)
    for split, count in left_out(config).items():
        reasons = config.run_folder / "corpus" / f"{split}.json"
        typer.echo(f"{split}: {counted(count, 'line')} left out; {reasons} lists the reasons")
    typer.echo(f"done; to see the results: prunesearch report {config.source}")


@app.command()
def worker(study: Study, storage: StorageUrl = None, allow_changes: AllowChanges = False, adopt: Adopt = False) -> None:
    """Join a study that was launched, on this machine or another, and evaluate candidates until it is complete."""
    from prunesearch.commands.worker import join

    with ProgressDisplay() as display:
        config = join(study, storage, display, allow_changes or adopt)
    typer.echo(f"done; to see the results: prunesearch report {config.source}")


@app.command()
def status(
    study: Study,
    storage: StorageUrl = None,
    watch: Annotated[
        bool, typer.Option("--watch", help=f"Refresh every {REFRESH_SECONDS} s until the study is complete, or until Ctrl-C.")
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of one worker per hour, to estimate the remaining cost.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the progress of a study: its workers and what each does, the front so far, and the remaining time."""
    from prunesearch.commands.status import status as read_status

    found = read_status(study, storage, price)
    if as_json:
        print_json(found)
        return
    from prunesearch.cli.tables import status_tables

    if not watch:
        print_tables(status_tables(found))
        return
    from rich.live import Live

    with Live(status_tables(found), auto_refresh=False) as live:
        while found["settled"] < found["trials"] and not (found["aborted"] and not found["running"]):
            time.sleep(REFRESH_SECONDS)
            found = read_status(study, storage, price)
            live.update(status_tables(found), refresh=True)


@app.command()
def retry(study: Study, storage: StorageUrl = None) -> None:
    """Re-queue failed candidates for the next available worker."""
    from prunesearch.commands.status import retry as retry_failed

    keys = retry_failed(study, storage)
    typer.echo(f"re-queued: {', '.join(keys)}" if keys else "no candidate has failed")


@app.command()
def abort(study: Study, storage: StorageUrl = None) -> None:
    """Ask all workers of a study, on all machines, to save their work and stop. `launch` resumes the study."""
    from prunesearch.commands.status import abort as abort_study

    count = abort_study(study, storage)
    typer.echo(f"asked {counted(count, 'worker')} to stop; this can take some seconds")


@app.command()
def clean(
    study: Study,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """Remove what the next launch makes again: cached encoder states and scratch files. All results stay."""
    from prunesearch.commands.clean import clean as clean_study

    sizes = clean_study(study, storage, dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "bytes": {str(folder): size for folder, size in sizes.items()}})
        return
    for folder, size in sizes.items():
        typer.echo(f"{'would remove' if dry_run else 'removed'} {folder}: {size / 1e6:,.1f} MB")
    if not sizes:
        typer.echo("there is nothing to remove")


app.add_typer(storage_commands, name="storage")


@app.command()
def report(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY…", help="Study files, or folders that contain study.toml.")],
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

    Of several studies, the fronts are drawn in one plot. If run/report cannot be written, the summary is printed all the same.
    """
    from prunesearch.commands.report import report as make_report
    from prunesearch.report import render, render_overlay, render_tables, to_json
    from prunesearch.report.tables import TABLES, checked_names

    names = checked_names(tables or ())
    reported = make_report(studies, out, storage)
    comparisons = reported.comparisons
    if reported.not_written:
        typer.echo(reported.not_written, err=True)
    if as_json:
        made = [to_json(c) for c in comparisons]
        print_json(made if len(made) > 1 else made[0])
        return
    if names:
        for comparison in comparisons:
            print_tables(render_tables(comparison, names))
    else:
        print_tables(render_overlay(comparisons) if len(comparisons) > 1 else render(comparisons[0]))
    if reported.page:
        print_hint(f"report: {reported.page}.html; as text: {reported.page}.md")
    if not names:
        print_hint(f"more tables: --tables NAME (or all), of {', '.join(TABLES)}")


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

    chosen = init or older_init
    with ProgressDisplay() as display:
        run(study, seeds, steps, chosen.value if chosen else None, workers, storage, display)
    found = compare_with_confirmation(load_study(study, data_must_exist=False))
    if found:
        print_tables(to_rich(confirmation_table(found)))


@app.command()
def export(
    study: Study,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    candidate: Annotated[
        str | None, typer.Option(metavar="KEY", help="Export the candidate with this key, such as minus-3+lora8.")
    ] = None,
    trial: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Export the candidate of the Optuna trial with this number.")
    ] = None,
    best_under_params: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Export the candidate of lowest dev WER with at most this many parameters (see search.params_objective).",
        ),
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="Export the knee of the front. This is the default.")] = False,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge", help="Merge the LoRA into the LLM's weights; default: for a [model], which is exported whole."
        ),
    ] = None,
    with_llm: Annotated[
        bool | None,
        typer.Option("--llm/--no-llm", help="Write the LLM, too. Default: only if the study loads it from a folder."),
    ] = None,
    storage: StorageUrl = None,
) -> None:
    """Write a candidate as a self-contained folder. Default: the knee of the front."""
    from prunesearch.commands.export import export as write
    from prunesearch.study.errors import StudyError

    if knee and (candidate, trial, best_under_params) != (None, None, None):
        raise StudyError(["--knee cannot be combined with --candidate, --trial or --best-under-params: give one of them"])
    record = write(study, out, candidate, trial, best_under_params, merge, with_llm, storage)
    typer.echo(f"exported {record.name or record.candidate.key} to {out}; to use it: prunesearch transcribe {out} AUDIO…")


@app.command()
def measure(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="Study file, a folder that contains study.toml, or an exported system.")
    ],
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Key of a candidate to measure. May be repeated. Default: the front and the baselines."
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs per system, after one warm-up run.")] = 5,
    turns: Turns = None,
    utterances: Annotated[int, typer.Option(min=1, help="Number of dev utterances to use.")] = 16,
    data: Annotated[
        Path | None, typer.Option("--data", help="Of an exported system: the manifest whose first recordings are used.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Of an exported system: the system to compare with.")
    ] = None,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """Measure latency, memory and file size on this machine, relative to the unpruned system.

    An exported system is measured without its study, beside another one (--against), on a manifest (--data).
    """
    from prunesearch.commands.measure_folders import is_exported, measure_folders
    from prunesearch.study.errors import StudyError

    runs = runs if turns is None else turns
    with ProgressDisplay() as display:
        if is_exported(study):
            if data is None or candidate:
                raise StudyError(["an exported system is measured with --data MANIFEST, and without --candidate"])
            found = measure_folders(study, data, against, runs, utterances, display)
        else:
            from prunesearch.commands.measure import measure as run

            if data or against:
                raise StudyError([f"--data and --against are for an exported system, {study} is none: leave them out"])
            found = run(study, candidate or (), runs, utterances, display, storage)
    if as_json:
        from dataclasses import asdict

        print_json(asdict(found))
    else:
        from prunesearch.cli.tables import measurement_table

        print_tables(measurement_table(found))


exported.add_commands(app)


def main() -> None:
    """The entry point of `prunesearch`."""
    run_app(app)
