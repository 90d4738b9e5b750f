"""What all candidates of a study share: models, corpora, cached states, the plan of batches, and the anchor."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from transformers import AutoFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import load_encoder, remove_layers
from prunesearch.model.hub import architectures, cannot_be_had
from prunesearch.model.llm import Llm, embedding_scale, load_llm, lora_targets, recompute_activations
from prunesearch.model.projector import Projector
from prunesearch.model.slam import SpeechLlm
from prunesearch.speech.audio import SAMPLE_RATE
from prunesearch.speech.corpus import SPLITS, Progress, Split, Utterance, checked_corpus
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import SplitResult, write_atomically
from prunesearch.training.batches import plan_batches
from prunesearch.training.curve import tracker_for
from prunesearch.training.decode import transcribe
from prunesearch.training.device import pick_dtype
from prunesearch.training.finetune import Budget, Diverged, Progressed, finetune, trainable
from prunesearch.training.process_group import ProcessGroup
from prunesearch.training.states import StateStore, finish_encoding, prefix_states


def _silent(what: str, done: int, of: int) -> None:
    pass


def _go_on() -> None:
    pass


@dataclass
class TrainingContext:
    """One per worker. Models are loaded when it is opened; states and anchor when they are first asked for."""

    config: StudyConfig
    team: ProcessGroup
    dtype: torch.dtype
    encoder: WhisperEncoder
    extractor: Any
    llm: Llm
    progress: Progress = _silent
    check: Callable[[], None] = _go_on  # called at every step; raises to have the work left where it is

    @classmethod
    def open(cls, config: StudyConfig, progress: Progress = _silent, check: Callable[[], None] = _go_on) -> "TrainingContext":
        """Load the study's models. Raises StudyError when one of them cannot be had.

        `check` may raise Interrupted or LeaseLost, at any step of a training or batch of a decoding.
        """
        architectures(config)  # of the wrong kind, or out of reach: told before anything is loaded
        team = ProcessGroup.assemble()
        device, dtype = team.device, pick_dtype(config.training.precision, team.device)
        source = config.locate(config.encoder.model)
        try:
            encoder = load_encoder(source, config.encoder.revision, dtype)
            extractor = AutoFeatureExtractor.from_pretrained(source, revision=config.encoder.revision or "main")
        except (OSError, ValueError) as error:
            raise cannot_be_had(config.encoder, source, error) from error
        source = config.locate(config.llm.model)
        try:
            llm = load_llm(source, config.llm, dtype)
        except StudyError:  # of another key than llm.model
            raise
        except (OSError, ValueError) as error:
            raise cannot_be_had(config.llm, source, error) from error
        lora_targets(llm.model, config.llm)  # a wrong name is told now, not when the first LoRA is made
        tracker_for(config, "")  # and a missing package, too
        encoder.requires_grad_(False).eval().to(device)
        if config.llm.quantization is None:  # bitsandbytes has put its models where they belong
            llm.model.to(device)
        if config.training.gradient_checkpointing:
            recompute_activations(llm.model)
        if team.size > 1:  # its members leave together, when all of them are told to
            check = _go_on

        def checked(what: str, done: int, of: int) -> None:
            check()
            if team.leads:
                progress(what, done, of)

        context = cls(config, team, dtype, encoder, extractor, llm, checked, check)
        if outside := [i for i in config.removable(context.depth) if i >= context.depth]:
            raise StudyError([f"search.removable_layers: must lie in [0, {context.depth}), got {outside[0]}"])
        return context

    @property
    def device(self) -> torch.device:
        return self.team.device

    @property
    def depth(self) -> int:
        return len(self.encoder.layers)

    @property
    def shared_depth(self) -> int:
        """The layers before the first one that any candidate may lose: the same for all."""
        return self.config.shared_layers(self.depth)

    @cached_property
    def corpora(self) -> dict[Split, list[Utterance]]:
        """The three splits. Raises StudyError for a recording that the encoder cannot take whole."""
        corpora = {split: checked_corpus(self.config, split, self.progress).utterances for split in SPLITS}
        window = self.encoder.max_source_positions * 2 * self.extractor.hop_length / SAMPLE_RATE  # seconds
        block = self.config.data.pad_to_seconds
        for split, utterances in corpora.items():
            seconds = [u.seconds if block is None else -(-u.seconds // block) * block for u in utterances]
            if too_long := [u for u, s in zip(utterances, seconds, strict=True) if s > window]:
                first = f"{too_long[0].id} ({too_long[0].seconds:.1f} s)"
                line = f"{len(too_long)} recordings of {split} are longer than the encoder's window of {window:g} s, the first"
                raise StudyError([f"data.max_seconds: {line} is {first}; set it to at most {window:g}"])
        return corpora

    @cached_property
    def targets(self) -> list[list[int]]:
        return [self.llm.tokens(u.target) for u in self.corpora["train"]]

    def _budget(self, steps: int, rate: float, lora_rate: float, purpose: str, repeat: int = 0) -> Budget:
        seconds = [u.seconds for u in self.corpora["train"]]
        seed = int.from_bytes(hashlib.sha256(f"{self.config.seed + repeat} {purpose}".encode()).digest()[:3])
        return Budget(plan_batches(seconds, self.config.training.batch_size, steps, seed), rate, lora_rate, seed)

    def budget(self, repeat: int = 0) -> Budget:
        """The one budget of baselines and candidates; a repeat has as many steps, on batches of its own."""
        training = self.config.training
        lora_rate = training.lora_learning_rate or training.learning_rate
        return self._budget(training.steps, training.learning_rate, lora_rate, "candidate", repeat)

    @cached_property
    def anchor_budget(self) -> Budget:
        anchor = self.config.anchor
        return self._budget(anchor.steps, anchor.learning_rate, anchor.learning_rate, "anchor")

    def drawn(self, budget: Budget) -> list[int]:
        """The utterances of train that this process' steps will need, each once."""
        return sorted({i for batch in budget.batches for i in self.team.share(batch)})

    def used(self, split: Split) -> list[int]:
        """The utterances that the study touches: all of dev and test; of train, those that some step draws."""
        if split != "train":
            return list(range(len(self.corpora[split])))
        budgets = [self.budget(), self.anchor_budget] if self.config.training.init == "anchor" else [self.budget()]
        return sorted({i for budget in budgets for batch in budget.batches for i in batch})

    def prefix(self, split: Split, indices: Sequence[int] = ()) -> StateStore:
        """The states that all candidates share, from the study's cache; for `indices` too, which only an anchor of a study
        that starts from scratch has beyond what it uses."""
        wanted = sorted({*self.used(split), *indices})
        return prefix_states(
            self.config.run_folder / "features", split, self.corpora[split], wanted, self.encoder,
            self.shared_depth, self.extractor, self.config, self.device, self.dtype, self.progress,
        )  # fmt: skip

    def encoded(self, encoder: WhisperEncoder, split: Split, indices: Sequence[int]) -> StateStore:
        """A candidate's encoder states for some utterances."""
        scratch = self.config.run_folder / "scratch"
        prefix = self.prefix(split, indices)
        return finish_encoding(prefix, encoder, self.shared_depth, indices, scratch, self.device, self.progress)

    def pruned_encoder(self, candidate: Candidate) -> WhisperEncoder:
        return remove_layers(self.encoder, candidate.removed_layers)

    def fresh_projector(self, repeat: int = 0) -> Projector:
        """A new projector, the same for every candidate; warm from the anchor where the study says so."""
        settings = self.config.projector
        torch.manual_seed(self.config.seed + repeat)
        widths = self.encoder.config.d_model, self.llm.model.get_input_embeddings().embedding_dim
        projector = Projector(*widths, settings.stack, settings.hidden, settings.dropout, embedding_scale(self.llm.model))
        return projector.to(self.device)

    def start(self, projector: Projector) -> Projector:
        """The projector as the study's `training.init` has candidates begin."""
        if self.config.training.init == "anchor":
            projector.load_state_dict(load_file(self.anchor()))
        return projector

    @property
    def anchor_weights(self) -> Path:
        """Where the anchor's weights lie, once it is trained."""
        return self.config.run_folder / "anchor" / "projector.safetensors"

    def anchor(self) -> Path:
        """The anchor's weights: the unpruned encoder's projector, trained once without LoRA, whoever comes first.

        All members of a team call this. Raises StudyError when its training diverges.
        """
        weights = self.anchor_weights
        folder = weights.parent
        folder.mkdir(parents=True, exist_ok=True)
        with self.team.lock(folder / "lock", self.check):
            if self.team.agree(weights.exists()):
                return weights
            slam = SpeechLlm(self.fresh_projector(), self.llm, self.llm.model)
            encoder = self.pruned_encoder(Candidate())
            train = self.encoded(encoder, "train", self.drawn(self.anchor_budget))
            steps = self.anchor_budget.steps
            try:
                done = finetune(
                    slam, train, self.targets, self.anchor_budget, self.config.training, self.team, self.dtype,
                    folder / "checkpoint.pt", check=self.check,
                    on_step=lambda p: self.progress(f"anchor, loss {p.loss:.2f}", p.step, steps),
                )  # fmt: skip
            except Diverged as error:  # without an anchor there is no study
                rate = self.config.anchor.learning_rate
                raise StudyError([f"anchor.learning_rate: with {rate:g}, {error.args[0]}; a smaller one may do"]) from error
            if self.team.leads:
                dev = self.encoded(encoder, "dev", self.used("dev"))
                results = transcribe(
                    slam, dev, self.corpora["dev"], self.used("dev"), self.config, self.device, self.dtype, self.progress
                )
                self._write_anchor_log(folder, done, SplitResult.of(results))
                _write_tensors(weights, slam.projector.state_dict())
                (folder / "checkpoint.pt").unlink(missing_ok=True)
            self.team.agree(None)  # the others read what the leader has written
        return weights

    def _write_anchor_log(self, folder: Path, done: Progressed, dev: SplitResult) -> None:
        log = {
            "steps": done.step,
            "train_seconds": round(done.seconds, 1),
            "losses": done.losses,
            "dev_wer": dev.errors.wer,
            "dev": dev.model_dump(),
        }
        write_atomically(folder / "anchor.json", json.dumps(log, indent=1) + "\n")


def save_weights(path: Path, slam: SpeechLlm) -> None:
    """Projector and LoRA, as safetensors."""
    _write_tensors(path, trainable(slam))


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Whole or not at all. Raises OSError, as any file does, where the disk is full."""
    write_atomically(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
