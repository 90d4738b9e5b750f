"""Several workers on this machine, each a process of its own; one that dies is replaced."""

import multiprocessing
import pickle
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Flag, Interrupt, Interrupted
from prunesearch.study.progress import ProgressListener
from prunesearch.study.record import RunRecord
from prunesearch.workers.storage import open_storage
from prunesearch.workers.worker import Worker, create

MOST_REPLACED = 3  # times the number of workers
_TELLING = threading.Lock()  # a worker's two threads share one pipe


@dataclass
class _Relay:
    """A worker process' listener: what it is told, the process that started it tells its own. One may stop listening."""

    number: int
    listener: Connection

    def _send(self, *message: Any) -> None:
        with _TELLING, suppress(OSError):  # nobody is there any more; the work goes on
            self.listener.send(message)

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        self._send("progress", what, done, of, self.number)

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        self._send("finished", record, settled, of)

    def note(self, text: str) -> None:
        self._send("note", f"worker {self.number}: {text}")


def _work_in_own_process(source: Path, relay: _Relay, workers: int, storage: str | None, flag: Flag, adopt: bool) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(relay.number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    stop = Interrupt(flag)
    try:
        with stop.on_signals():
            worker = Worker.open(load_study(source), storage, relay, stop, adopt, creates=False)
            worker.run()
            worker.leave()
    except StudyError as error:
        print(*error.lines, sep="\n", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):  # the process that started this one says so
        sys.exit(130)


def run_workers(
    config: StudyConfig,
    workers: int,
    trials: int | None,
    storage: str | None,
    listener: ProgressListener,
    stop: Interrupt,
    adopt: bool,
) -> None:
    """Create the study here, then let the processes work, and tell the listener what they tell."""
    url = storage or config.storage.url
    if url and url.startswith("sqlite"):
        listener.note("SQLite loses trials when several workers write: the default journal file does not, nor does PostgreSQL")
    create(config, open_storage(url, config.run_folder, listener.note, lambda: stop.requested), trials)
    context = multiprocessing.get_context("spawn")
    flag = context.RawValue("b", 0)
    shared = Interrupt(flag)
    processes: list[Any] = []
    listening: dict[Connection, Any] = {}
    replaced = 0

    def start(number: int) -> None:
        here, there = context.Pipe(duplex=False)
        arguments = (config.source, _Relay(number, there), workers, storage, flag, adopt)
        process = context.Process(target=_work_in_own_process, args=arguments, name=f"worker {number}")
        process.start()
        there.close()  # the worker has its own: when it ends, so does the pipe
        processes.append(process)
        listening[here] = process

    with shared.on_signals(listener.note):
        try:
            for number in range(workers):
                start(number)
            while listening:
                for connection in wait(list(listening)):
                    assert isinstance(connection, Connection)
                    try:
                        call, *told = connection.recv()
                    except (EOFError, OSError, pickle.UnpicklingError):  # it has ended, in the middle of a message perhaps
                        process = listening.pop(connection)
                        process.join()
                        if process.exitcode in (0, 2, 130) or shared.requested:
                            continue
                        listener.note(f"{process.name} ended ({_ending(process.exitcode)}); its candidate goes to the next")
                        if replaced < MOST_REPLACED * workers:  # a candidate that crashes workers has failed before that
                            replaced += 1
                            start(int(process.name.split()[-1]))
                    else:
                        getattr(listener, call)(*told)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join()
    stop.check()
    shared.check()
    if any(p.exitcode == 2 for p in processes):
        raise StudyError(["a worker could not go on, for the reason above"])
    if not any(p.exitcode == 0 for p in processes):  # who ends well has seen the study complete
        raise RuntimeError(f"the workers ended ({_ending(processes[-1].exitcode)}); launch again to go on")


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
