"""One worker: the study is opened and held to what was pinned, the anchor and the scan are there or made, candidates are
evaluated until the budget is used."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from prunesearch.search.space import SearchSpace
from prunesearch.speech.corpus import SPLITS, fingerprint, load_corpus
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.importance import Scan, read_scan
from prunesearch.study.interrupt import Interrupt, Interrupted
from prunesearch.study.progress import ProgressListener
from prunesearch.study.record import RunRecord
from prunesearch.workers.artifacts import CHECKPOINT, ArtifactMirror, once, open_shelf
from prunesearch.workers.lease import BEAT_SECONDS, LeaseHolder, forget_worker, tell_of_worker
from prunesearch.workers.loop import TrialMonitor, work
from prunesearch.workers.optuna_study import annotate, check_writable, code_identity, open_study, pin, sampler_of
from prunesearch.workers.storage import open_storage

POOR_ANCHOR = 0.3  # dev WER beyond which what candidates differ by is mostly luck


def create(config: StudyConfig, storage: BaseStorage, trials: int | None = None, scans: bool = False) -> optuna.Study:
    """The study, with a budget that is its own, whoever works on it: `trials`, else the study file's where it has none yet.

    Where nothing is said, it never shrinks. One that was aborted goes on.
    """
    from prunesearch.model.skeleton import encoder_layers

    for split in SPLITS:
        load_corpus(config, split)  # a mistake in a manifest is told before anything is created
    space = SearchSpace.of(config, encoder_layers(config))
    study = open_study(config, storage, space)
    if "trials" not in study.user_attrs:
        annotate(study, config, space.named)
    elif scans:  # it says nothing of how far the study is to go
        return study
    budget = max(config.search.trials, study.user_attrs.get("trials", 0)) if trials is None else trials
    study.set_user_attr("trials", budget)
    if study.user_attrs.get("aborted"):
        study.set_user_attr("aborted", False)
    return study


def open_context(config: StudyConfig, listener: ProgressListener, check: Callable[[], None]) -> Any:
    from transformers.utils import logging

    from prunesearch.training.context import TrainingContext

    logging.disable_progress_bar()  # the listener tells of progress
    logging.set_verbosity_error()  # that a decoder's weights are not wanted is no news
    return TrainingContext.open(config, listener.progress, check)


class Worker:
    """A context at work on a study; of a team of processes, the leader alone talks to the storage."""

    space: SearchSpace

    def __init__(self, config: StudyConfig, listener: ProgressListener, stop: Interrupt, adopt: bool):
        self.config, self.listener, self.stop, self.adopt = config, listener, stop, adopt
        self.held: LeaseHolder | None = None  # the trial under way
        self.context: Any = None  # training.context.Workshop: torch is imported only when a worker starts
        self.storage: Any = None  # optuna's; None for those who follow
        self.study: Any = None
        self.shelf: ArtifactMirror | None = None  # where workers share no folder
        self._told = 0.0  # when the study was told what this worker does, beside trials

    @classmethod
    def open(
        cls,
        config: StudyConfig,
        url: str | None,
        listener: ProgressListener,
        stop: Interrupt,
        adopt: bool = False,
        creates: bool = True,
        trials: int | None = None,
        scans: bool = False,
    ) -> "Worker":
        """`creates`: the study, where there is none, with a budget of so many `trials`."""
        worker = cls(config, listener, stop, adopt)
        if os.environ.get("RANK", "0") == "0":  # a storage that cannot be had is told before models are loaded
            worker.storage = open_storage(url or config.storage.url, config.run_folder, listener.note, lambda: stop.requested)
            worker.shelf = open_shelf(config)
        worker.context = context = open_context(config, worker, worker.check)
        corpora = context.corpora  # a mistake in a manifest is told before anything is created
        worker.space = SearchSpace.of(config, context.depth)
        if context.team.leads:
            if worker.shelf and context.team.size > 1:
                raise StudyError(["storage.artifacts: not for processes that train together; share the run folder"])
            if creates:
                create(config, worker.storage, trials, scans)
            worker.study = open_study(config, worker.storage, worker.space, create=False)
            check_writable(worker.study)
            pin(worker.study, "code", code_identity(), adopt)
            pin(worker.study, "data", {split: fingerprint(corpora[split]) for split in SPLITS}, adopt)
        return worker

    def leave(self) -> None:
        """Nothing is done for the study any more."""
        if self._told:
            forget_worker(self.study)

    def check(self) -> None:
        """Raises Interrupted or LeaseLost: called at every step of whatever the context does."""
        self.stop.check()
        if self.held:
            self.held.check()

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        if self.held:
            self.held.does(what, done, of)
        elif self.study is not None and time.monotonic() - self._told > BEAT_SECONDS:
            self._told = time.monotonic()
            tell_of_worker(self.study, what, done, of)
        self.listener.progress(what, done, of, worker)

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        self.listener.finished(record, settled, of)

    def note(self, text: str) -> None:
        self.listener.note(text)

    def run(self) -> None:
        """Evaluate candidates until the study's budget is used."""
        from prunesearch.model.skeleton import params_of_candidates
        from prunesearch.training.recipe import evaluate

        config, context, team = self.config, self.context, self.context.team
        if config.training.init == "anchor":
            weights = self._anchor()
            if team.leads:
                pin(self.study, "anchor", {"sha256": _digest(weights)}, self.adopt)
                self._tell_of_anchor(weights.with_name("anchor.json"))

        if not team.leads:
            while (job := team.agree(None)) is not None:
                evaluate(context, *job)
            return

        def evaluated(candidate: Candidate, name: str | None, referee: TrialMonitor) -> RunRecord:
            team.agree((candidate, name))
            self.held, checkpoint = referee.held, f"records/{candidate.key}/{CHECKPOINT}"
            if self.shelf:
                self.shelf.fetch_records([candidate.key])
                self.shelf.fetch(checkpoint)
            try:
                record = evaluate(context, candidate, name, referee.on_rung, referee.make_sure)
                if self.shelf:
                    self.shelf.put_record(candidate.key)
                return record
            except Interrupted:
                if self.shelf:
                    self.shelf.put(checkpoint)
                raise
            finally:
                self.held = None

        def keep_checkpoint() -> None:
            if self.shelf and self.held:
                self.held.check()
                self.shelf.put(f"records/{self.held.key}/{CHECKPOINT}")

        count = params_of_candidates(config)

        def params_of(candidate: Candidate) -> float:
            return count(candidate).of(config.search.params_objective)

        self.study.sampler = sampler_of(config, self.space, params_of, self._scan())
        trials = self.study.user_attrs.get("trials", config.search.trials)
        work(
            self.study, self.space, evaluated, params_of, config.search.params_objective, trials, config.run_folder,
            config.training.rung_confidence, self.stop, self.listener.note, keep_checkpoint,
            on_record=lambda record, settled: self.listener.finished(record, settled, trials),
            max_worst_group_wer=config.search.max_worst_group_wer,
        )  # fmt: skip
        team.agree(None)  # the others may go home

    def _scan(self) -> Scan | None:
        """What layers are worth, where the study wants to know: measured by one worker, for all."""
        from prunesearch.report.scan import write_scan_report
        from prunesearch.training.importance_scan import scan

        config, path = self.config, "scan/scan.json"
        file = config.run_folder / path  # one that was asked for may know more than the usual one
        guided = config.search.scan and config.search.sampler not in ("random", "grid")

        def measure(make_sure: Callable[[], None] = lambda: None) -> None:
            write_scan_report(file.parent, scan(self.context))
            make_sure()
            if self.shelf:
                self.shelf.put(path)

        if guided and config.training.init == "anchor":
            if self.shelf is None:
                if not file.exists():
                    measure()  # a lock in the shared folder sees to it that one does
            else:
                shelf = self.shelf
                once(self.storage, f"{config.name} (scan)", self.stop, lambda: shelf.fetch(path), measure)
        return read_scan(file)

    def _anchor(self) -> Path:
        """The anchor's weights: trained by one worker, for all."""
        if self.shelf is None:  # a lock in the shared folder sees to it
            return Path(self.context.anchor())
        shelf, path = self.shelf, "anchor/projector.safetensors"

        def train(make_sure: Callable[[], None]) -> None:
            shelf.fetch(f"anchor/{CHECKPOINT}")
            self.context.anchor()
            make_sure()
            shelf.put("anchor/anchor.json")
            shelf.put(path)

        def keep_checkpoint() -> None:
            shelf.put(f"anchor/{CHECKPOINT}")
            if self.study.user_attrs.get("aborted"):
                self.stop.request()

        once(self.storage, f"{self.config.name} (anchor)", self.stop, lambda: shelf.fetch(path), train, keep_checkpoint)
        shelf.fetch("anchor/anchor.json")
        return Path(self.context.anchor())

    def _tell_of_anchor(self, log: Path) -> None:
        """Once in a study: how well it understands what it hears, with all of its layers, before any candidate is trained."""
        if "anchor_wer" in self.study.user_attrs or not log.exists():
            return
        wer = json.loads(log.read_text(encoding="utf-8"))["dev_wer"]
        self.study.set_user_attr("anchor_wer", round(wer, 4))
        if wer > POOR_ANCHOR:
            self.note(
                f"the anchor gets {100 * wer:.0f} % of the dev words wrong: a search from there can hardly tell candidates "
                "apart. Train it longer (anchor.steps), or with another anchor.learning_rate"
            )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
