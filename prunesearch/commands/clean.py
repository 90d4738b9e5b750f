"""Remove from a study's run folder what the next launch makes again: cached encoder states and scratch files."""

import shutil
from pathlib import Path

from prunesearch.commands.status import status
from prunesearch.report.confirmation import confirmation_file
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError

MADE_AGAIN = ("features", "scratch")  # folders in a run folder


def clean(source: str | Path, storage: str | None = None, dry_run: bool = False) -> dict[Path, int]:
    """Remove a study's cached states and scratch files, and those of its confirmation; with `dry_run`, only look.

    Returns the bytes of each folder. Records, repaired maps of baselines and front, anchor, scan, reports and the storage stay.

    Raises StudyError for a study that was not launched, or that has workers at the moment.
    """
    config = load_study(source, data_must_exist=False)
    if alive := [worker for worker in status(source, storage)["running"] if worker["alive"]]:
        where = ", ".join(f"{worker['host']} (process {worker['pid']})" for worker in alive)
        fix = f"wait, or stop them: `prunesearch abort {source}`"
        raise StudyError([f"{config.name} must have no workers at work, got {len(alive)}: {where}; {fix}"])
    folders = [f for folder in _run_folders(config) for name in MADE_AGAIN if (f := folder / name).is_dir()]
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders}
    for folder in [] if dry_run else folders:
        shutil.rmtree(folder)
    return sizes


def _run_folders(config: StudyConfig) -> list[Path]:
    confirmation = confirmation_file(config)
    confirmed = [load_study(confirmation, data_must_exist=False).run_folder] if confirmation.exists() else []
    return [config.run_folder, *confirmed]
