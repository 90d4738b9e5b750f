"""Workers as a SLURM job array."""

from pathlib import Path

import pytest

from prunesearch.commands import status as control
from prunesearch.commands.slurm import submit
from prunesearch.study.errors import StudyError
from prunesearch.study.record import read_records
from tests.conftest import write_study
from tests.servers import until


def test_the_jobs_of_an_array_work_on_the_study_and_hold_no_password(toy: Path, tmp_path: Path) -> None:
    """As SLURM would run them: submitit's local executor starts the same jobs here."""
    file = write_study(tmp_path / "s", toy)
    with pytest.raises(StudyError, match="would hold the password"):
        submit(file, 2, storage="postgresql://me:secret@host/db", cluster="local")
    jobs = submit(file, 2, trials=5, cluster="local")
    assert len(jobs) == 2
    until(lambda: control.status(file)["settled"] == 5, "five candidates", 120)
    assert {r.state for r in read_records(file.parent / "run" / "records")} == {"complete"}
