"""Remove from a study's run folder what the next launch makes again: cached encoder states and scratch files."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from prunesearch.commands.status import status
from prunesearch.report.confirmation import confirmation_file
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError

MADE_AGAIN = ("features", "scratch")  # folders in a run folder


def clean(source: str | Path, storage: str | None = None, dry_run: bool = False) -> dict[Path, int]:
    """Remove a study's cached states and scratch files, and those of its confirmation; with `dry_run`, only look.

    Returns the bytes of each folder that has some. Records, repaired maps, anchor, scan, reports and the storage stay.

    Raises StudyError, but not with `dry_run`, for a study that was not launched, or where a worker or another command is at
    work.
    """
    config = load_study(source, data_must_exist=False)
    confirmation = confirmation_file(config)
    configs = [config, *([load_study(confirmation, data_must_exist=False)] if confirmation.exists() else [])]
    for each in [] if dry_run else configs:
        if each is config or (each.run_folder / "definition.json").exists():  # a confirmation may not be launched yet
            _require_no_worker(each, storage)
    found: dict[Path, int] = {}
    with nullcontext() if dry_run else _nobody_at_work(configs):
        for folder in (c.run_folder / name for c in configs for name in MADE_AGAIN):
            files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock"]  # a lock must stay the same file
            if files:
                found[folder] = sum(f.stat().st_size for f in files)
            for file in [] if dry_run else files:
                file.unlink()
    return found


def _require_no_worker(config: StudyConfig, storage: str | None) -> None:
    """Raises StudyError where a worker is at work on the study."""
    if alive := [worker for worker in status(config.source, storage)["running"] if worker["alive"]]:
        where = ", ".join(f"{worker['host']} (process {worker['pid']})" for worker in alive)
        fix = f"wait, or stop them: `prunesearch abort {config.source}`"
        raise StudyError([f"{config.name} must have no workers at work, got {len(alive)}: {where}; {fix}"])


@contextmanager
def _nobody_at_work(configs: list[StudyConfig]) -> Iterator[None]:
    """Hold the locks that other commands take while they compute states or decode test.

    Raises StudyError where one of them is held.
    """
    with ExitStack() as held:
        for config in configs:
            run = config.run_folder
            for lock in [run / "test.lock", *sorted(run.glob("features/*.lock"))]:
                try:
                    held.enter_context(FileLock(lock, timeout=0))
                except Timeout:
                    raise StudyError(
                        [f"{config.name}: another command is at work (it holds {lock}): wait for its end"]
                    ) from None
        yield
