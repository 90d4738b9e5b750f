"""What all candidates of a study share: models, corpora, cached states, and the budget."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from prunesearch.model.families import family_of
from prunesearch.model.system import Reader, SpeechEncoder, SpeechProjector, SpeechSystem, Target
from prunesearch.speech.corpus import Utterance, checked_corpus
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import Split, StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import UtteranceResult
from prunesearch.training.batches import plan_batches
from prunesearch.training.decode import Decoder, scored
from prunesearch.training.device import pick_dtype
from prunesearch.training.finetune import Budget
from prunesearch.training.process_group import ProcessGroup
from prunesearch.training.states import Progress, StateCache, StateStore
from prunesearch.training.streams import Group, Streams, batches_of
from prunesearch.training.tracker import tracker_for

HELD_OUT = 8  # one in so many of the utterances that a repair draws is held out
MOST_HELD_OUT = 64


def _silent(what: str, done: int, of: int) -> None:
    pass


@dataclass
class TrainingContext:
    """What a worker trains with. Models are loaded when it is opened; corpora and states when they are first needed."""

    config: StudyConfig
    group: ProcessGroup
    dtype: torch.dtype
    system: SpeechSystem
    report_progress: Progress = _silent

    @classmethod
    def open(
        cls, config: StudyConfig, report_progress: Progress = _silent, group: ProcessGroup | None = None
    ) -> "TrainingContext":
        """Load the study's models. `group.check` is called often, and may raise Interrupted or LeaseLost.
        `report_progress` gets an activity, the units done, and their total.

        Raises StudyError when a model cannot be loaded.
        """
        group = group or ProcessGroup.join()
        dtype = pick_dtype(config.training.precision, group.device)
        tracker_for(config, "")  # a missing package is told before models are loaded
        family = family_of(config)
        system = family.system().load(config, dtype).to(group.device)
        if config.training.gradient_checkpointing:
            system.recompute_activations()
        context = cls(config, group, dtype, system, report_progress)
        if outside := [i for i in config.removable(context.depth) if i >= context.depth]:
            raise StudyError([f"search.removable_layers: must lie in [0, {context.depth}), got {outside[0]}"])
        return context

    def progress(self, what: str, done: int, of: int) -> None:
        """Report that `done` of `of` units are finished. Raises Interrupted or LeaseLost if this process has to leave."""
        self.group.check_anywhere()
        self.main_progress(what, done, of)

    def main_progress(self, what: str, done: int, of: int) -> None:
        """Report progress without that check, for code that all processes run in step."""
        if self.group.is_main_process:
            self.report_progress(what, done, of)

    @property
    def encoder(self) -> SpeechEncoder:
        """The unpruned encoder."""
        return self.system.encoder

    @property
    def device(self) -> torch.device:
        return self.group.device

    @property
    def records(self) -> Path:
        return self.config.run_folder / "records"

    @property
    def depth(self) -> int:
        """The number of the unpruned encoder's layers."""
        return self.encoder.depth

    @property
    def shared_depth(self) -> int:
        """The number of first layers that no candidate loses: their states are the same for all."""
        return self.config.shared_layers(self.depth)

    # Corpora and budgets

    @cached_property
    def corpora(self) -> dict[Split, list[Utterance]]:
        """The study's splits. Raises StudyError for recordings that cannot be used, unless the study skips those."""
        window = self.encoder.window_seconds
        splits = self.config.data.splits
        corpora = {split: checked_corpus(self.config, split, self.progress, window).utterances for split in splits}
        spoken = {u.language for split in splits if split != "repair" for u in corpora[split]}
        for language in sorted(spoken, key=str):
            self.system.target("", language)  # an unknown one is told now
        return corpora

    @cached_property
    def targets(self) -> list[Target]:
        """What is to be written for each utterance of train."""
        return [self.target(u) for u in self.corpora["train"]]

    def target(self, utterance: Utterance) -> Target:
        """What is to be written for an utterance."""
        return self.system.target(utterance.target, utterance.language, utterance.seconds)

    def _budget(self, steps: int, rate: float, lora_rate: float, purpose: str, repeat: int = 0) -> Budget:
        held_out = set(self.held_out)
        pool = [i for i in range(len(self.corpora["train"])) if i not in held_out]
        seconds = [self.corpora["train"][i].seconds for i in pool]
        seed = int.from_bytes(hashlib.sha256(f"{self.config.seed + repeat} {purpose}".encode()).digest()[:3])
        plan = plan_batches(seconds, self.config.training.batch_size, steps, seed)
        return Budget([[pool[i] for i in batch] for batch in plan], rate, lora_rate, seed)

    def budget(self, repeat: int = 0) -> Budget:
        """The budget of every baseline and candidate; a repeat has as many steps, on batches of its own."""
        training = self.config.training
        lora_rate = training.lora_learning_rate or training.learning_rate
        budget = self._budget(training.steps, training.learning_rate, lora_rate, "candidate", repeat)
        return replace(budget, held_out=self.held_out if training.interpolate and training.steps else ())

    @property
    def trains_anchor(self) -> bool:
        """Whether an anchor is trained: not where all start from scratch, nor where there are trained weights already."""
        config = self.config
        return config.training.init == "anchor" and not self.system.is_trained and config.anchor.weights is None

    @cached_property
    def anchor_budget(self) -> Budget:
        anchor = self.config.anchor
        return self._budget(anchor.steps, anchor.learning_rate, anchor.learning_rate, "anchor")

    @property
    def repair_split(self) -> Split:
        """The split that repairs are fitted on."""
        return "repair" if self.config.data.repair else "train"

    @cached_property
    def repair_utterances(self) -> list[int]:
        """The utterances that repairs are fitted on, drawn by the study's seed; none if nothing is repaired."""
        return [] if self.config.training.repair == "none" else self._sample(self.repair_split)

    @cached_property
    def held_out(self) -> list[int]:
        """Utterances of train that no batch draws. How far a training goes is chosen on them; if repairs are fitted on train,
        ridges are, too. None where the study chooses neither.
        """
        training = self.config.training
        if not training.interpolate and (training.repair == "none" or self.repair_split != "train"):
            return []
        return _part_held_out(self._sample("train"))

    def _sample(self, split: Split) -> list[int]:
        """Utterances of a split, some of which are to be held out. Raises StudyError for a split that is too small for that."""
        if (count := len(self.corpora[split])) < HELD_OUT:
            reason = f"training.repair and training.interpolate hold one in {HELD_OUT} out"
            raise StudyError([f"data.{split}: must have at least {HELD_OUT} utterances, got {count}: {reason}"])
        most = min(self.config.training.repair_utterances, count)
        return random.Random(f"{self.config.seed} repair").sample(range(count), most)

    def drawn(self, budget: Budget) -> list[int]:
        """The utterances of train that this process needs, each once: for its steps, and those held out."""
        return sorted({i for batch in [*budget.batches, budget.held_out] for i in self.group.shard(batch)})

    def used(self, split: Split) -> list[int]:
        """The utterances that the study uses: all of dev and test; of the others, those that are drawn or held out."""
        if split == "repair":
            return sorted(self.repair_utterances)
        if split != "train":
            return list(range(len(self.corpora[split])))
        budgets = [self.budget(), self.anchor_budget] if self.trains_anchor else [self.budget()]
        drawn = {i for budget in budgets for batch in budget.batches for i in batch}
        fitted = self.repair_utterances if self.repair_split == "train" else []
        return sorted(drawn | {*fitted, *self.held_out})

    # Encoder states

    @cached_property
    def states(self) -> StateCache:
        run = self.config.run_folder
        return StateCache(
            run / "features", run / "scratch", self.encoder, self.shared_depth, self._padding,
            self.model_digests["encoder"], self.device, self.dtype, self.progress,
        )  # fmt: skip

    @property
    def _padding(self) -> float | None:
        """Recordings are padded with silence to a multiple of so many seconds, before the encoder's own padding."""
        model, data = self.config.model, self.config.data
        return data.pad_to_seconds if model is None else model.window_seconds

    @cached_property
    def streams(self) -> Streams:
        """The unpruned encoder's streams on the utterances that repairs are fitted on."""
        return self.streams_over(self.repair_utterances)

    def streams_over(self, drawn: Sequence[int], others: tuple[Group, ...] = ()) -> Streams:
        """The same on some of these utterances, and the streams of other groups of utterances."""
        seconds, held_out = [u.seconds for u in self.corpora[self.repair_split]], _part_held_out(drawn)
        left_out = set(held_out)
        fitted = batches_of(seconds, [i for i in drawn if i not in left_out])
        return Streams(
            self.encoder, self.prefix(self.repair_split), fitted, batches_of(seconds, held_out), self.shared_depth,
            self.states.scratch, self.device, self.group.check_anywhere, others,
        )  # fmt: skip

    @cached_property
    def model_digests(self) -> dict[str, str]:
        """Digests of the models' weights: the same for a folder and for a copy of it on the hub."""
        return self.system.digests(self.config)

    def prefix(self, split: Split, indices: Sequence[int] = ()) -> StateStore:
        """The states that all candidates share, from the study's cache. `indices`: utterances that are needed besides those
        that the study uses; the anchor of a study that starts from scratch has some.
        """
        return self.states.prefix(split, self.corpora[split], {*self.used(split), *indices})

    def encoded(self, encoder: SpeechEncoder, split: Split, indices: Sequence[int]) -> StateStore:
        """A candidate's encoder states for some utterances."""
        return self.states.finish(self.prefix(split, indices), encoder, indices)

    # The parts of a system

    def pruned_encoder(self, candidate: Candidate) -> SpeechEncoder:
        return self.encoder.without(candidate.removed_layers)

    def fresh_projector(self, repeat: int = 0) -> SpeechProjector:
        """A projector as the system has it before any training: the same for every candidate."""
        return self.system.new_projector(self.config.seed + repeat)

    def decode(
        self, reader: Reader, split: Split, states: StateStore, indices: Sequence[int] | None = None, beams: int | None = None
    ) -> list[UtteranceResult]:
        """Decode and score a system on a split, or on the utterances at `indices`."""
        indices = self.used(split) if indices is None else indices
        decoder = Decoder(reader, self.config.decoding, self.device, self.dtype, beams)
        hypotheses = decoder.decode(states, self.corpora[split], indices, self.progress)
        return scored(hypotheses, self.corpora[split], indices, self.config.text)


def _part_held_out(drawn: Sequence[int]) -> list[int]:
    return list(drawn[::HELD_OUT][:MOST_HELD_OUT])
