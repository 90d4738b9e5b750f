"""Several workers on this machine, each in a process of its own; a worker that dies is replaced."""

import multiprocessing
import pickle
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError, user_error_lines
from prunesearch.study.interrupt import Flag, Interrupt, Interrupted
from prunesearch.study.progress import ProgressListener
from prunesearch.study.record import RunRecord
from prunesearch.workers.registration import check_corpora, create_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.worker import Worker, WorkerOptions

MOST_REPLACED = 3  # times the number of workers
EXPECTED_EXITS = (0, 2, 130)  # the budget is used; an error in the user's input; interrupted
_SENDING = threading.Lock()  # two threads of a worker share one pipe


@dataclass
class _Relay:
    """The progress listener of a worker process: sends every report to the process that started it."""

    number: int
    listener: Connection

    def _send(self, *message: Any) -> None:
        with _SENDING, suppress(OSError):  # that process has ended; this one continues
            self.listener.send(message)

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        self._send("progress", what, done, of, self.number)

    def finished(self, record: RunRecord, finished: int, of: int) -> None:
        self._send("finished", record, finished, of)

    def note(self, text: str) -> None:
        self._send("note", f"worker {self.number}: {text}")


def _work(source: Path, options: WorkerOptions, relay: _Relay, workers: int, flag: Flag) -> None:
    """What a worker process runs."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(relay.number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    interrupt = Interrupt(flag)
    try:
        with interrupt.on_signals():
            worker = Worker.open(load_study(source), options, relay, interrupt)
            worker.run()
            worker.close()
    except (Interrupted, KeyboardInterrupt):  # the process that started this one prints that
        sys.exit(130)
    except Exception as error:
        if (lines := user_error_lines(error)) is None:
            raise
        print(*lines, sep="\n", file=sys.stderr)
        sys.exit(2)


@dataclass
class _Pool:
    """The worker processes, and the pipes through which they report."""

    source: Path
    options: WorkerOptions
    workers: int
    flag: Any  # a byte that all processes share
    context: SpawnContext
    processes: list[BaseProcess] = field(default_factory=list)
    pipes: dict[Connection, BaseProcess] = field(default_factory=dict)
    replaced: int = 0

    def start(self, number: int) -> None:
        here, there = self.context.Pipe(duplex=False)
        arguments = (self.source, self.options, _Relay(number, there), self.workers, self.flag)
        process = self.context.Process(target=_work, args=arguments, name=f"worker {number}")
        process.start()
        there.close()  # the worker has its own end: the pipe ends with it
        self.processes.append(process)
        self.pipes[here] = process

    def relay_until_all_end(self, listener: ProgressListener, interrupt: Interrupt) -> None:
        """Pass reports on to the listener. A worker that dies is replaced; its candidate goes to the next worker."""
        while self.pipes:
            for pipe in wait(list(self.pipes)):
                assert isinstance(pipe, Connection)
                try:
                    call, *told = pipe.recv()
                except (EOFError, OSError, pickle.UnpicklingError):  # the process has ended, perhaps within a message
                    self._ended(self.pipes.pop(pipe), listener, interrupt)
                else:
                    getattr(listener, call)(*told)

    def _ended(self, process: BaseProcess, listener: ProgressListener, interrupt: Interrupt) -> None:
        process.join()
        if process.exitcode in EXPECTED_EXITS or interrupt.requested:
            return
        listener.note(f"{process.name} ended ({_ending(process.exitcode)}); another worker continues its candidate")
        if self.replaced < MOST_REPLACED * self.workers:  # a candidate that crashes its workers fails before that
            self.replaced += 1
            self.start(int(process.name.split()[-1]))

    def end(self, kill: bool) -> None:
        for process in self.processes:
            if kill:
                process.kill()
            process.join()


def run_workers(
    config: StudyConfig, workers: int, options: WorkerOptions, listener: ProgressListener, interrupt: Interrupt
) -> None:
    """Create the study here, let the worker processes evaluate candidates, and pass on their reports.

    Raises StudyError if a worker found an error in the user's input, Interrupted after a signal, and RuntimeError if all
    workers crashed.
    """
    url = options.storage or config.storage.url
    if url and url.startswith("sqlite"):
        listener.note("SQLite loses trials when several workers write to it; the default journal file and PostgreSQL do not")
    check_corpora(config, listener.note)
    storage = open_storage(url, config.run_folder, listener.note, lambda: interrupt.requested)
    create_study(config, storage, options.trials)
    context = multiprocessing.get_context("spawn")
    flag = context.RawValue("b", 0)
    pool = _Pool(config.source, replace(options, creates=False), workers, flag, context)
    shared, kill = Interrupt(flag), True
    with shared.on_signals(listener.note):
        try:
            for number in range(workers):
                pool.start(number)
            pool.relay_until_all_end(listener, shared)
            kill = False
        finally:
            pool.end(kill)
    interrupt.check()
    shared.check()
    if any(p.exitcode == 2 for p in pool.processes):
        raise StudyError(["a worker could not continue, for the reason above"])
    if not any(p.exitcode == 0 for p in pool.processes):  # a worker that ends with 0 has seen the study complete
        raise RuntimeError(f"the workers ended ({_ending(pool.processes[-1].exitcode)}); launch the study again to continue")


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
