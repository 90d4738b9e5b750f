"""Workers as SLURM jobs: an array of them, requeued when they are pre-empted or out of time."""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Interrupted
from prunesearch.workers.storage import holds_secret, open_storage

SIGNAL_SECONDS = 120  # before a job's time is over, it is told


@dataclass
class Job:
    """What an array's job does; submitit pickles it, so it must not know a password."""

    source: Path
    storage: str | None
    adopt: bool

    def __call__(self) -> None:
        from prunesearch.commands.launch import join

        try:
            join(self.source, self.storage, adopt=self.adopt)
        except Interrupted as stopped:
            # its time is nearly over; what was handed back goes on in the next turn. SIGTERM is scancel's, or of a pre-emption
            # after which SLURM requeues by itself
            if stopped.signal == signal.SIGUSR1 and (job := os.environ.get("SLURM_JOB_ID")):
                subprocess.run(["scontrol", "requeue", job], check=True)


def submit(
    source: str | Path,
    workers: int,
    trials: int | None = None,
    storage: str | None = None,
    options: dict[str, str] | None = None,
    adopt: bool = False,
    cluster: str = "slurm",
) -> list[str]:
    """Create the study and submit `workers` jobs that join it; returns their ids. They need the run folder, and the storage.

    `options` are sbatch's long ones, such as partition, time, gpus_per_node. Raises StudyError for the user's mistakes.
    """
    from prunesearch.workers.worker import create

    try:
        import submitit
    except ImportError:
        raise StudyError(["--launcher slurm needs submitit: pip install 'prunesearch[slurm]'"]) from None
    config = load_study(source)
    url = storage or config.storage.url
    if url and holds_secret(url):
        fix = "write ${VARIABLE} in its place, or use PGPASSWORD or ~/.pgpass"
        raise StudyError([f"storage.url: a job's files would hold the password: {fix}"])
    create(config, open_storage(url, config.run_folder), trials or config.search.trials)
    try:
        executor = submitit.AutoExecutor(folder=config.run_folder / "slurm", cluster=cluster)
    except RuntimeError as error:
        raise StudyError([f"--launcher slurm: {error}"]) from None
    settings: dict[str, Any] = {"name": f"prunesearch-{config.name}"}
    if cluster == "slurm":
        told = {"signal": f"USR1@{SIGNAL_SECONDS}"}
        settings |= {"slurm_additional_parameters": {"requeue": True, **told, **(options or {})}}
    executor.update_parameters(**settings)
    with executor.batch():
        jobs = [executor.submit(Job(config.source.resolve(), storage, adopt)) for _ in range(workers)]
    return [str(job.job_id) for job in jobs]
