"""SLAM-ASR: a Whisper encoder, a projector, and a causal LM that reads [bos], audio embeddings, prompt, text.

A study assembles the system from an encoder and an LLM, and trains the projector first: the anchor.

Shapes: B batch, T encoder positions, A audio embeddings, P prompt tokens, W prefix ([bos], A and P), S text tokens, D width,
V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.digest import model_digest
from prunesearch.model.encoder import ENCODER_PREFIX, WhisperLayers
from prunesearch.model.generation import RowLimits
from prunesearch.model.hub import architectures
from prunesearch.model.llm import Llm, embedding_scale, lora_targets, recompute_activations, remove_lora, with_lora
from prunesearch.model.loading import load_studys_encoder, load_studys_llm
from prunesearch.model.parameters import count_parameters
from prunesearch.model.projector import Projector
from prunesearch.model.system import GenerationLimits, Reader, SpeechEncoder, SpeechProjector, SpeechSystem, Target
from prunesearch.model.trained_weights import TrainedWeights, read_trained_weights
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import Parameters
from prunesearch.study.section import check_variables

PROMPT_TOKENS = 6  # about the length of the default prompt: a plan is made without a tokenizer


@dataclass
class SpeechLlm(Reader):
    """A projector and an LLM (with or without LoRA): everything behind the encoder."""

    projector: SpeechProjector
    llm: Llm
    model: Any  # llm.model, or the same with a LoRA

    @property
    def base(self) -> Any:
        return self.llm.model

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.llm.eos,)

    @cached_property
    def _bos_and_prompt(self) -> tuple[Tensor, Tensor]:
        """The embeddings before and after the audio: bos (0 or 1, D) and prompt (P, D)."""
        embedding = self.llm.model.get_input_embeddings()
        with torch.no_grad():
            before, prompt = (
                embedding(torch.tensor(ids, dtype=torch.long, device=embedding.weight.device))
                for ids in (self.llm.bos, self.llm.prompt)
            )
        return before, prompt

    def prefix(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Everything before the text: (B, T, D), lengths (B,) -> embeddings (B, W, D), mask (B, W).

        Padding is on the left, so that every prompt ends in the last column: generation continues from there, and the
        logits that training needs are the last ones.
        """
        audio, audio_lengths = self.projector(states, lengths)
        batch, device = audio.shape[0], audio.device
        before, prompt = (e.to(audio.dtype).expand(batch, -1, -1) for e in self._bos_and_prompt)
        spoken = torch.cat([before, audio], dim=1)
        spoken_lengths = audio_lengths + len(self.llm.bos)
        width = spoken.shape[1]
        source = torch.arange(width, device=device) - (width - spoken_lengths[:, None])  # (B, width): negative is padding
        shifted = spoken.gather(1, source.clamp(min=0)[..., None].expand_as(spoken))
        mask = source >= 0
        prompt_mask = mask.new_ones(batch, len(self.llm.prompt))
        return torch.cat([shifted * mask[..., None], prompt], 1), torch.cat([mask, prompt_mask], 1).long()

    def logits(self, states: Tensor, lengths: Tensor, tokens: Tensor, languages: Sequence[str | None] = ()) -> Tensor:
        """As in `Reader`; languages are not used."""
        prefix, mask = self.prefix(states, lengths)
        text = self.llm.model.get_input_embeddings()(tokens[:, :-1]).to(prefix.dtype)
        mask = torch.cat([mask, mask.new_ones(text.shape[:2])], 1)  # padding on the right is never attended to: causal
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            inputs_embeds=torch.cat([prefix, text], 1),
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=tokens.shape[1],
            use_cache=False,
        )
        return out.logits

    def generate(
        self, states: Tensor, lengths: Tensor, languages: Sequence[str | None], limits: GenerationLimits
    ) -> list[list[int]]:
        embeddings, mask = self.prefix(states, lengths)
        written = self.model.generate(
            inputs_embeds=embeddings.to(self.llm.model.dtype),
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max(limits.new_tokens),
                num_beams=limits.beams,
                repetition_penalty=limits.repetition_penalty,
                do_sample=False,
                eos_token_id=self.llm.eos,
                pad_token_id=self.llm.pad,
            ),
            stopping_criteria=StoppingCriteriaList([RowLimits(limits.new_tokens, states.device)]),
        )
        rows: list[list[int]] = written.tolist()
        return rows

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        decoded: list[str] = self.llm.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return decoded


@dataclass(frozen=True)
class SlamSystem(SpeechSystem):
    """A study's encoder and LLM. New projectors have the shape that the study says, and random weights."""

    config: StudyConfig
    encoder: WhisperLayers
    llm: Llm
    trained_projector: Mapping[str, Tensor] | None = None  # of `anchor.weights`
    is_trained = False

    @classmethod
    def load(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        """Load the study's models on the CPU (a quantised LLM: on the GPU), frozen and in evaluation mode.

        Raises StudyError when one of them cannot be loaded or is of the wrong kind.
        """
        weights = trained_weights(config)  # their errors are told before gigabytes are loaded
        encoder, llm = load_studys_encoder(config, dtype), load_studys_llm(config, dtype)
        lora_targets(llm.model, config.slam.llm)  # a wrong name is told now, and not when the first LoRA is made
        system = cls(config, encoder, llm, None if weights is None else weights.projector)
        if weights is not None:
            system._take(weights)
        return system

    def _take(self, weights: TrainedWeights) -> None:
        """Merge a LoRA of trained weights into the LLM, and check that their projector fits."""
        if weights.lora and self.llm.quantized:
            raise StudyError(["anchor.weights: its LoRA cannot be merged into a quantised LLM: leave llm.quantization out"])
        try:
            weights.for_projector(self.new_projector(0).state_dict())
            weights.merge_lora(self.llm.model, self.config.slam.llm.lora_alpha_per_rank)
        except CheckpointError as error:
            raise StudyError([f"anchor.weights: {error}"]) from error

    @classmethod
    def skeleton(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        shape, llm_shape = architectures(config)
        with torch.device("meta"):
            encoder = WhisperEncoder(shape).to(dtype)
            model = AutoModelForCausalLM.from_config(llm_shape, dtype=dtype)
        model.requires_grad_(False)
        extractor = SimpleNamespace(hop_length=_hop_length(config))
        return cls(config, WhisperLayers(encoder, extractor), Llm(model, None, (), (0,) * PROMPT_TOKENS, 0, 0))

    def to(self, device: torch.device) -> Self:
        self.encoder.to(device)
        self.llm.to(device)
        return self

    def target(self, text: str, language: str | None, seconds: float = 0.0) -> Target:
        return Target(self.llm.tokens(text))

    def new_projector(self, seed: int) -> Projector:
        """Its last LayerNorm starts at the scale of the LLM's embeddings."""
        torch.manual_seed(seed)
        embeddings = self.llm.model.get_input_embeddings()
        device = embeddings.weight.device
        scale = 1.0 if device.type == "meta" else embedding_scale(self.llm.model)
        widths = self.encoder.width, embeddings.embedding_dim
        return Projector.for_models(self.config.slam.projector, *widths, scale).to(device)

    def attach(self, projector: SpeechProjector, rank: int = 0, seed: int = 0) -> SpeechLlm:
        return SpeechLlm(projector, self.llm, with_lora(self.llm.model, rank, self.config.slam.llm, seed))

    def detach(self, reader: Reader) -> None:
        remove_lora(reader.model, self.llm.model)

    def recompute_activations(self) -> None:
        recompute_activations(self.llm.model)

    def parameters(self, encoder: SpeechEncoder, reader: Reader) -> Parameters:
        return count_parameters(encoder.module, reader.projector, reader.model)

    @classmethod
    def digests(cls, config: StudyConfig) -> dict[str, str]:
        parts = config.slam
        digests = {"encoder": model_digest(config, parts.encoder, ENCODER_PREFIX), "llm": model_digest(config, parts.llm)}
        weights = trained_weights(config)
        return digests if weights is None else {**digests, "anchor": weights.digest()}


def trained_weights(config: StudyConfig) -> TrainedWeights | None:
    """What `anchor.weights` names; None where the anchor is trained. Raises StudyError where it cannot be read."""
    if config.anchor.weights is None:
        return None
    source = config.locate(check_variables(config.anchor.weights))
    if not Path(source).exists():
        raise StudyError([f"anchor.weights: there is no file or folder {source}"])
    try:
        return read_trained_weights(Path(source))
    except (OSError, ValueError) as error:
        raise StudyError([f"anchor.weights: {source}: {error}"]) from error


def _hop_length(config: StudyConfig) -> int:
    """Samples from one mel frame to the next: Whisper's, or what a local checkpoint's feature extractor says."""
    file = Path(config.locate(config.slam.encoder.model)) / "preprocessor_config.json"
    return int(json.loads(file.read_text(encoding="utf-8")).get("hop_length", 160)) if file.is_file() else 160


System = SlamSystem
