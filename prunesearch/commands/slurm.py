"""Workers as a SLURM job array; a job is requeued when it is pre-empted or out of time."""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Interrupted
from prunesearch.workers.registration import check_corpora, create_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.urls import holds_secret

SIGNAL_SECONDS = 120  # a job gets SIGUSR1 this long before its time limit


@dataclass
class Job:
    """What a job of the array runs. submitit writes it to a file, so it must hold no password."""

    source: Path
    storage: str | None
    allow_changes: bool

    def __call__(self) -> None:
        from prunesearch.commands.worker import join

        try:
            join(self.source, self.storage, allow_changes=self.allow_changes)
        except Interrupted as interrupted:
            # SIGUSR1: the job's time is nearly over, and it continues when it is requeued. SIGTERM comes from scancel, or from
            # a pre-emption after which SLURM requeues the job itself
            if interrupted.signal == signal.SIGUSR1 and (job := os.environ.get("SLURM_JOB_ID")):
                subprocess.run(["scontrol", "requeue", job], check=True)


def submit(
    source: str | Path,
    workers: int,
    trials: int | None = None,
    storage: str | None = None,
    options: dict[str, str] | None = None,
    allow_changes: bool = False,
    cluster: str = "slurm",
) -> list[str]:
    """Create the study and submit `workers` jobs that join it; returns their ids. Jobs need the run folder and the storage.

    `trials`: the study's budget; None: at least the study file's, and never less than before. `options`: long options of
    sbatch, such as partition, time, gpus_per_node. Raises StudyError for errors in the user's input.
    """
    try:
        import submitit
    except ImportError:
        raise StudyError(["--launcher slurm needs submitit: pip install 'prunesearch[slurm]'"]) from None
    config = load_study(source)
    url = storage or config.storage.url
    if url and holds_secret(url):
        fix = "write ${VARIABLE} instead, or use PGPASSWORD or ~/.pgpass"
        raise StudyError([f"storage.url: the files of a job would hold the password: {fix}"])
    check_corpora(config)
    create_study(config, open_storage(url, config.run_folder), trials)
    try:
        executor = submitit.AutoExecutor(folder=config.run_folder / "slurm", cluster=cluster)
    except RuntimeError as error:
        raise StudyError([f"--launcher slurm: {error}"]) from None
    settings: dict[str, Any] = {"name": f"prunesearch-{config.name}"}
    if cluster == "slurm":
        notice = {"signal": f"USR1@{SIGNAL_SECONDS}"}
        settings |= {"slurm_additional_parameters": {"requeue": True, **notice, **(options or {})}}
    executor.update_parameters(**settings)
    with executor.batch():
        jobs = [executor.submit(Job(config.source.resolve(), storage, allow_changes)) for _ in range(workers)]
    return [str(job.job_id) for job in jobs]
