"""One worker: it opens the study, checks that its records will be comparable, makes anchor and scan or waits for them, and
evaluates candidates until the study's budget is used."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from prunesearch.model.skeleton import params_of_candidates
from prunesearch.search.screening_choice import next_to_screen
from prunesearch.search.space import SearchSpace
from prunesearch.speech.corpus import fingerprint
from prunesearch.speech.overlap import shared_recordings
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.files import read_json
from prunesearch.study.importance import Scan, read_scan
from prunesearch.study.interrupt import Interrupt, Interrupted, LeaseLost
from prunesearch.study.progress import ProgressListener
from prunesearch.study.record import RunRecord
from prunesearch.workers.artifacts import CHECKPOINT, ArtifactMirror, checkpoint_path, open_artifacts
from prunesearch.workers.exclusive import ExclusiveTask, run_exclusively
from prunesearch.workers.lease import HEARTBEAT_SECONDS, announce_worker, retract_worker
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import check_writable, code_identity, lock_provenance, open_study, sampler_of
from prunesearch.workers.registration import create_study
from prunesearch.workers.retry import RetryingStorage
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import StudyRules, WorkerTrial

if TYPE_CHECKING:  # torch is imported only when a worker opens
    from prunesearch.training.context import TrainingContext
    from prunesearch.training.process_group import ProcessGroup

POOR_ANCHOR = 0.3  # dev WER above which differences between candidates are mostly chance


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker joins a study. `storage`: a URL; None is the study file's. `creates`: create the study if there is none,
    with a budget of `trials`. `scan_only`: the worker scans, and changes nothing of the study's budget.
    """

    storage: str | None = None
    allow_changes: bool = False
    creates: bool = True
    trials: int | None = None
    scan_only: bool = False


def open_context(
    config: StudyConfig, report_progress: Callable[[str, int, int], None], check: Callable[[], None]
) -> "TrainingContext":
    """Load the study's models. `check` is called often; it may raise Interrupted or LeaseLost."""
    from transformers.utils import logging

    from prunesearch.training.context import TrainingContext
    from prunesearch.training.process_group import ProcessGroup

    logging.disable_progress_bar()  # the listener shows progress
    logging.set_verbosity_error()  # the decoder's weights are left out on purpose: no warning
    group = ProcessGroup.join()
    group.check = check
    return TrainingContext.open(config, report_progress, group)


class Worker:
    """Evaluates a study's candidates. In a group of processes, only the main process uses the storage."""

    space: SearchSpace
    context: "TrainingContext"

    def __init__(self, config: StudyConfig, options: WorkerOptions, listener: ProgressListener, interrupt: Interrupt):
        self.config, self.options, self.listener, self.interrupt = config, options, listener, interrupt
        self.trial: WorkerTrial | None = None  # the one that is being evaluated
        self._storage: RetryingStorage | None = None  # of the main process, like the next two
        self._stored: StoredStudy | None = None
        self._artifacts: ArtifactMirror | None = None  # None where workers share the run folder
        self._announced = 0.0  # when the study was told what this worker does while it has no trial

    @classmethod
    def open(cls, config: StudyConfig, options: WorkerOptions, listener: ProgressListener, interrupt: Interrupt) -> "Worker":
        """Open storage, models and corpora, then the study.

        Raises StudyError for an error in the user's input, as early as it can be known.
        """
        worker = cls(config, options, listener, interrupt)
        if os.environ.get("RANK", "0") == "0":  # before models are loaded, which takes longer
            url = options.storage or config.storage.url
            worker._storage = open_storage(url, config.run_folder, listener.note, lambda: interrupt.requested)
            worker._artifacts = open_artifacts(config)
        worker.context = open_context(config, worker.report_progress, worker.check)
        worker.space = SearchSpace.of(config, worker.context.depth)
        corpora = worker.context.corpora  # an error in a manifest is reported before anything is created
        if worker.context.group.is_main_process:
            for line in shared_recordings(corpora) if options.creates else ():  # else its creator has said so
                listener.note(line)
            worker._open_study({split: fingerprint(corpora[split]) for split in config.data.splits})
        return worker

    def _open_study(self, data: dict[str, Any]) -> None:
        config, options = self.config, self.options
        if self._artifacts and self.context.group.size > 1:
            raise StudyError(["storage.artifacts: not for processes that train together; share the run folder"])
        if options.creates:
            create_study(config, self.storage, options.trials, options.scan_only)
        self._stored = open_study(config, self.storage, self.space, create=False)
        check_writable(self.stored)
        identities: dict[str, dict[str, Any]] = {"code": code_identity(), "models": self.context.model_digests, "data": data}
        for what, value in identities.items():
            lock_provenance(self.stored, what, value, options.allow_changes)

    @property
    def storage(self) -> RetryingStorage:
        assert self._storage is not None, "only the main process has a storage"
        return self._storage

    @property
    def stored(self) -> StoredStudy:
        assert self._stored is not None, "only the main process has the study"
        return self._stored

    def close(self) -> None:
        """Remove this worker from those that `status` shows."""
        if self._announced:
            retract_worker(self.stored)

    def check(self) -> None:
        """Raises Interrupted or LeaseLost. Called at every step of training, decoding and encoding."""
        self.interrupt.check()
        if self.trial:
            self.trial.check()

    def report_progress(self, what: str, done: int, of: int) -> None:
        if self.trial:
            self.trial.working_on(what, done, of)
        elif self._stored is not None and time.monotonic() - self._announced > HEARTBEAT_SECONDS:
            self._announced = time.monotonic()
            announce_worker(self.stored, what, done, of)
        self.listener.progress(what, done, of)

    # Evaluation

    def run(self) -> None:
        """Evaluate candidates until the study's budget is used. Raises Interrupted."""
        group = self.context.group
        if self.config.training.init == "anchor" and not self.context.system.is_trained:
            self._lock_anchor(self._anchor())
        if not group.is_main_process:
            self._follow()
            return
        rules = self._rules()
        self.stored.study.sampler = sampler_of(self.config, self.space, rules.params_of, self._scan())
        interrupt = _GroupInterrupt(self.interrupt, group) if group.size > 1 else self.interrupt
        try:
            run_loop(self.stored, rules, self._evaluate, interrupt, self.listener, self._store_checkpoint)
        except Interrupted as reason:
            group.leave(reason)
        group.broadcast(None)  # nothing is left to evaluate
        group.disband()

    def _rules(self) -> StudyRules:
        config, count = self.config, params_of_candidates(self.config)
        objective = config.search.params_objective
        return StudyRules(
            space=self.space,
            params_of=partial(count.of, objective),
            objective=objective,
            trials=self.stored.attrs.get("trials", config.search.trials),
            rung_confidence=config.training.rung_confidence,
            max_worst_group_wer=config.search.max_worst_group_wer,
        )

    def _evaluate(self, trial: WorkerTrial) -> RunRecord:
        """Train and score a trial's candidate, in the main process. Raises Interrupted and LeaseLost."""
        from prunesearch.training.recipe import train_and_score

        artifacts = self._artifacts
        self.context.group.broadcast((trial.candidate, trial.name))
        self.trial = trial
        try:
            if artifacts:
                artifacts.fetch_records([trial.candidate])
                artifacts.fetch(checkpoint_path(trial.candidate))
            record = train_and_score(self.context, trial.candidate, trial)
            if artifacts:
                artifacts.put_record(trial.candidate)
            return record
        except Interrupted:
            if artifacts:
                artifacts.put(checkpoint_path(trial.candidate))
            raise
        finally:
            self.trial = None

    def _follow(self) -> None:
        """Evaluate what the main process claims, in the other processes of its group. Raises Interrupted."""
        from prunesearch.training.recipe import Unmonitored, train_and_score

        group = self.context.group
        while True:
            try:
                claimed = group.broadcast(None)
                if claimed is None:
                    group.disband()
                    return
                candidate, name = claimed
                train_and_score(self.context, candidate, Unmonitored(name))
            except LeaseLost:  # the main process claims another candidate
                continue

    def _store_checkpoint(self) -> None:
        if self._artifacts and (trial := self.trial):
            trial.check()
            self._artifacts.put(checkpoint_path(trial.candidate))

    # Anchor and scan: made by one worker, for all

    def _anchor(self) -> Path:
        from prunesearch.training.anchor import train_anchor

        if self._artifacts is None:  # a lock in the shared folder decides which worker trains it
            return train_anchor(self.context)
        artifacts, path = self._artifacts, "anchor/projector.safetensors"

        def train(confirm: Callable[[], None]) -> None:
            artifacts.fetch(f"anchor/{CHECKPOINT}")
            train_anchor(self.context)
            confirm()
            artifacts.put("anchor/anchor.json")
            artifacts.put(path)

        def store_checkpoint() -> None:
            artifacts.put(f"anchor/{CHECKPOINT}")
            if self.stored.attrs.get("aborted"):
                self.interrupt.request()

        task = ExclusiveTask(f"{self.config.name} (anchor)", lambda: artifacts.fetch(path), train, store_checkpoint)
        run_exclusively(self.storage, task, self.interrupt)
        artifacts.fetch("anchor/anchor.json")
        return train_anchor(self.context)

    def _lock_anchor(self, weights: Path) -> None:
        """Lock the study to the anchor, and warn once if its dev WER is too high."""
        if not self.context.group.is_main_process:
            return
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        lock_provenance(self.stored, "anchor", {"sha256": digest}, self.options.allow_changes)
        log = weights.with_name("anchor.json")
        if "anchor_wer" in self.stored.attrs or not log.exists():
            return
        try:
            wer = read_json(log, _AnchorLog, "how well the anchor does is not checked").dev_wer
        except StudyError as error:
            self.listener.note(str(error))
            return
        self.stored.set_attr("anchor_wer", round(wer, 4))
        if wer > POOR_ANCHOR:
            self.listener.note(
                f"the anchor gets {100 * wer:.0f} % of the dev words wrong: from such an anchor, candidates can hardly be told "
                "apart. Train it longer (anchor.steps) or with another anchor.learning_rate"
            )

    def _scan(self) -> Scan | None:
        """The scan, which is made first if the study's sampler uses one and there is none. None without a scan."""
        from prunesearch.report.scan import write_scan_report
        from prunesearch.training.importance_scan import importance_scan

        config, path = self.config, "scan/scan.json"
        file = config.run_folder / path  # a scan that a person asked for may hold more than the default one
        wanted = config.search.scan and config.search.sampler not in ("random", "grid") and config.training.init == "anchor"
        if not wanted:
            return read_scan(file, config.name)
        if self._artifacts is None:
            if not file.exists():  # a lock in the shared folder decides which worker scans
                write_scan_report(file.parent, importance_scan(self.context, choose=next_to_screen))
            return read_scan(file, config.name)
        artifacts = self._artifacts

        def measure(confirm: Callable[[], None]) -> None:
            write_scan_report(file.parent, importance_scan(self.context, choose=next_to_screen))
            confirm()
            artifacts.put(path)

        task = ExclusiveTask(f"{config.name} (scan)", lambda: artifacts.fetch(path), measure)
        run_exclusively(self.storage, task, self.interrupt)
        return read_scan(file, config.name)


class _AnchorLog(BaseModel):
    """What is needed here of the file that `training.anchor` writes."""

    dev_wer: float


class _GroupInterrupt(Interrupt):
    """The interrupt of a group's main process: its check also notices that another process has to leave."""

    def __init__(self, own: Interrupt, group: "ProcessGroup"):
        super().__init__()
        self._own, self._group = own, group

    @property
    def requested(self) -> bool:
        return self._own.requested

    def request(self) -> None:
        self._own.request()

    def check(self) -> None:
        self._group.check_anywhere()
