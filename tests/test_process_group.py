"""Two processes that train one candidate together: they leave together, or go on together, and lose nothing."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunesearch.commands.status import abort, status
from prunesearch.study.config import load_study
from prunesearch.study.interrupt import Interrupted, LeaseLost
from prunesearch.study.record import RunRecord, read_records
from prunesearch.training.process_group import ProcessGroup
from prunesearch.workers.lease import release
from prunesearch.workers.optuna_study import open_existing_study
from tests.conftest import write_study
from tests.servers import free_port, until

ROOT = Path(__file__).parents[1]

# What each process runs: the command line, with a heartbeat that need not be waited for. It tells its id, and how it ended.
PROGRAM = """
import os, sys
from pathlib import Path
from prunesearch.workers import lease
from prunesearch.cli.app import main

lease.HEARTBEAT_SECONDS = 0.2
told = Path(os.environ["TOLD"])
told.joinpath("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code
    raise
finally:
    told.joinpath("exit-" + os.environ["RANK"]).write_text(str(code))
"""

PROCESSES = 2
SETTINGS = {
    "training": {"steps": 150, "init": "scratch", "checkpoint_seconds": 3600.0},  # only an interruption leaves a checkpoint
    "search": {"trials": 1, "sampler": "random"},
}


class Group:
    """`prunesearch launch` in two processes, which torchrun starts and watches."""

    def __init__(self, study: Path):
        self.study, self.told = study, study.parent / "told"
        self.told.mkdir(exist_ok=True)
        for old in self.told.iterdir():
            old.unlink()
        program = self.told / "program.py"
        program.write_text(PROGRAM)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOLD": str(self.told)}
        self.torchrun = subprocess.Popen(
            [*torchrun, str(program), "launch", str(study)],
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def pid(self, rank: int) -> int:
        return int((self.told / f"pid-{rank}").read_text())

    def trains(self) -> bool:
        """Whether a training has done more than twenty steps. Fails if the processes have ended instead."""
        assert self.torchrun.poll() is None, self.torchrun.communicate()[0]
        curves = (self.study.parent / "run" / "records").glob("*/curve.jsonl")
        return any(len(curve.read_text().splitlines()) > 2 for curve in curves)

    def ended(self) -> tuple[str, list[int]]:
        """What was written, and how each process ended. torchrun kills what does not end within 30 s; this tells no code."""
        output, _ = self.torchrun.communicate(timeout=120)
        files = [self.told / f"exit-{rank}" for rank in range(PROCESSES)]
        assert all(file.exists() for file in files), f"a process was killed or hung:\n{output}"
        return output, [int(file.read_text()) for file in files]

    def kill(self) -> None:
        for rank in range(PROCESSES):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if not (self.told / f"exit-{rank}").exists():
                    os.kill(self.pid(rank), signal.SIGKILL)
        self.torchrun.kill()
        self.torchrun.communicate()


@contextlib.contextmanager
def launched(study: Path) -> Iterator[Group]:
    group = Group(study)
    try:
        yield group
    finally:
        group.kill()


def outcome(study: Path) -> tuple[RunRecord, bytes]:
    (record,) = read_records(study.parent / "run" / "records")
    return record, (study.parent / "run" / "records" / record.candidate.key / "weights.safetensors").read_bytes()


def assert_the_same_outcome(study: Path, calm: Path) -> None:
    (record, weights), (expected, expected_weights) = outcome(study), outcome(calm)
    assert record.provenance["processes"] == PROCESSES
    assert record.outcome() == expected.outcome()
    assert weights == expected_weights


@pytest.fixture(scope="module")
def calm(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that no one interrupts."""
    study = write_study(tmp_path_factory.mktemp("calm") / "s", toy, **SETTINGS)
    with launched(study) as group:
        output, codes = group.ended()
    assert codes == [0, 0], output
    return study


def sigterm_to_torchrun(group: Group) -> None:
    group.torchrun.terminate()


def sigusr1_to_the_other_process(group: Group) -> None:
    os.kill(group.pid(1), signal.SIGUSR1)


def abort_from_elsewhere(group: Group) -> None:
    assert abort(group.study) == 1


@pytest.mark.parametrize(
    ("interrupt", "code"),
    [
        (sigterm_to_torchrun, 128 + signal.SIGTERM),
        (sigusr1_to_the_other_process, 128 + signal.SIGUSR1),
        (abort_from_elsewhere, 130),
    ],
)
def test_processes_leave_together_and_resume(
    interrupt: Callable[[Group], None], code: int, toy: Path, tmp_path: Path, calm: Path
) -> None:
    study = write_study(tmp_path / "s", toy, **SETTINGS)
    with launched(study) as group:
        until(group.trains, "a training")
        interrupt(group)
        output, codes = group.ended()
    assert codes == [code] * PROCESSES, output
    found = status(study)
    assert found["running"] == []
    assert found["ended"] == {"handed back": 1}
    assert [p.parent.name for p in study.parent.glob("run/records/*/checkpoint.pt")] == ["full"]
    assert not list(study.parent.glob("run/records/*/record.json")), "interrupted in mid-training"

    with launched(study) as group:
        output, codes = group.ended()
    assert codes == [0, 0], output
    assert_the_same_outcome(study, calm)
    curve = (study.parent / "run" / "records" / "full" / "curve.jsonl").read_text().splitlines()
    assert len(curve) == len(set(curve)) == 16, "the resumed run went on where the first one was"


def test_processes_that_lose_their_lease_go_on_together(toy: Path, tmp_path: Path, calm: Path) -> None:
    study = write_study(tmp_path / "s", toy, **SETTINGS)
    with launched(study) as group:
        until(group.trains, "a training")
        stored = open_existing_study(load_study(study))
        (running,) = stored.trials()
        assert release(stored, running, "lost")
        output, codes = group.ended()
    assert codes == [0, 0], output
    assert "full was given to another worker in the meantime" in output
    first, second = (t.user_attrs for t in open_existing_study(load_study(study)).trials())
    assert first["ended"] == "lost"
    assert first["candidate"] == second["candidate"] == "full"
    assert_the_same_outcome(study, calm)


REASONS = (LeaseLost(), Interrupted(signal.SIGUSR1), LeaseLost(), Interrupted())


def leave_at_a_step(rank: int, port: int, answers: Any) -> None:
    """One of two processes. At each of twelve steps, one of them has a reason to leave and the other has none."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    group, raised = ProcessGroup.join(), []
    for step in range(12):
        reason = REASONS[step % len(REASONS)]

        def check(has_one: bool = step // 2 % 2 == rank, reason: Exception = reason) -> None:
            if has_one:
                raise reason

        group.check = check
        try:
            group.check_step()
        except (Interrupted, LeaseLost) as error:
            raised.append((type(error).__name__, getattr(error, "signal", None)))
    group.disband()
    answers.put((rank, raised))


def test_the_reason_is_that_of_the_process_that_has_one() -> None:
    """The process without one may come first: it must not announce a reason of its own making."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    port = free_port()
    processes = [context.Process(target=leave_at_a_step, args=(rank, port, answers)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * PROCESSES
    expected = [(type(r).__name__, getattr(r, "signal", None)) for r in REASONS] * 3
    assert dict(answers.get() for _ in processes) == dict.fromkeys(range(PROCESSES), expected)
