"""Speech-LLMs with an audio tower: transformers' `audio_tower`, `multi_modal_projector` and `language_model`.

A chat template puts the projected audio between fixed tokens: those before it and those after it depend on the language only.
Each model's own processor says what they are. Windows, packing and padding are each tower's own.

Shapes: B batch, M mel bins, F mel frames, T tower positions, D tower width, A audio embeddings, P prefix, S text tokens,
V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, AutoProcessor, StoppingCriteriaList

from prunesearch.model.checkpoint import Part, library_errors, load_checkpoint, read_config
from prunesearch.model.encoder import SAMPLE_RATE
from prunesearch.model.families.towers import PackedTower, WindowedTower
from prunesearch.model.generation import RowLimits
from prunesearch.model.hub import read_architecture
from prunesearch.model.llm import lora_targets, pad_tokens, recompute_activations, remove_lora, save_without_lora, with_lora
from prunesearch.model.parameters import count_parameters
from prunesearch.model.system import (
    GenerationLimits,
    Reader,
    SpeechEncoder,
    SpeechProjector,
    Target,
    TrainedSystem,
    no_language,
)
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import ModelConfig
from prunesearch.study.record import Parameters

MODEL = Part("model")
PROMPT_TOKENS = 20  # about the length of a chat template: a plan is made without a processor


# Each model's own ways


@dataclass(frozen=True)
class Ways:
    """What differs from model to model. `ask`: the processor's inputs for recordings in a language; `read`: its text of token
    rows. `takes_language`: whether it is told the language. `stack`: positions in an audio embedding; a last one that is not
    whole is left out.
    """

    tower: Callable[[Any, Any], SpeechEncoder]
    ask: Callable[[Any, list[NDArray[np.float32]], str | None], Any]
    read: Callable[[Any, list[list[int]]], list[str]]
    takes_language: bool = True
    stack: int = 1


WAYS = {
    "qwen3_asr": Ways(
        PackedTower,
        ask=lambda processor, samples, language: processor.apply_transcription_request(samples, language=language),
        read=lambda processor, rows: processor.decode(rows, return_format="transcription_only"),
    ),
    "glmasr": Ways(
        WindowedTower,
        ask=lambda processor, samples, language: processor.apply_transcription_request(samples),
        read=lambda processor, rows: processor.decode(rows, strip_prefix=True, skip_special_tokens=True),
        takes_language=False,
        stack=4,
    ),
}


class TowerProjector(SpeechProjector):
    """A copy of the model's projector in fp32, whose first linear map reads the tower's states."""

    entry_name = "linear_1"

    def __init__(self, own: nn.Module, stack: int):
        super().__init__()
        self.stack = stack
        self.own = copy.deepcopy(own).float().requires_grad_(True)

    @property
    def entry(self) -> nn.Linear:
        return self.own.linear_1  # type: ignore[return-value]

    def inputs(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        batch, positions, width = states.shape
        whole = positions // self.stack
        return states[:, : whole * self.stack].reshape(batch, whole, self.stack * width), lengths // self.stack

    def embeddings_of(self, positions: int) -> int:
        return positions // self.stack

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        inputs, audio_lengths = self.inputs(states, lengths)
        out: Tensor = self.own(inputs)
        return out, audio_lengths


@dataclass
class TowerReader(Reader):
    """Projector and language model. `system`: what they belong to."""

    projector: SpeechProjector
    model: Any
    system: "TowerSystem"

    @property
    def base(self) -> Any:
        return self.system.model

    @property
    def ends(self) -> tuple[int, ...]:
        return self.system.ends

    def prefix(self, states: Tensor, lengths: Tensor, languages: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Everything before the text: (B, T, D), lengths (B,) -> embeddings (B, P, width), mask (B, P), padded on the left."""
        audio, heard = self.projector(states, lengths)
        embed, device = self.base.get_input_embeddings(), audio.device
        before, behind = zip(*(self.system.prompt(language) for language in languages), strict=True)
        parts = [embed(pad_tokens(ids, self.system.pad, device)).to(audio.dtype) for ids in (before, behind)]
        source = torch.cat([parts[0], audio, parts[1]], 1)  # (B, P, width), each of the three padded on its right
        first, last = (torch.tensor([len(row) for row in ids], device=device)[:, None] for ids in (before, behind))
        heard, width = heard[:, None], source.shape[1]
        place = torch.arange(width, device=device) - (width - first - heard - last)  # (B, P): negative is padding
        index = torch.where(place < first, place, parts[0].shape[1] + place - first)
        index = torch.where(place < first + heard, index, width - parts[1].shape[1] + place - first - heard)
        mask = place >= 0
        rows = source.gather(1, index.clamp(min=0)[..., None].expand_as(source))
        return rows * mask[..., None], mask.long()

    def logits(self, states: Tensor, lengths: Tensor, tokens: Tensor, languages: Sequence[str | None]) -> Tensor:
        prefix, mask = self.prefix(states, lengths, languages)
        text = self.base.get_input_embeddings()(tokens[:, :-1]).to(prefix.dtype)
        mask = torch.cat([mask, mask.new_ones(text.shape[:2])], 1)  # padding on the right is never attended to: causal
        out = self.model(
            inputs_embeds=torch.cat([prefix, text], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=tokens.shape[1],
            use_cache=False,
        )
        found: Tensor = out.logits
        return found

    def generate(
        self, states: Tensor, lengths: Tensor, languages: Sequence[str | None], limits: GenerationLimits
    ) -> list[list[int]]:
        """With the model's own settings, without sampling."""
        embeddings, mask = self.prefix(states, lengths, languages)
        settings = copy.deepcopy(self.base.generation_config)
        settings.update(
            max_new_tokens=max(limits.new_tokens), max_length=None, num_beams=limits.beams, do_sample=False, temperature=None,
            top_p=None, top_k=None, eos_token_id=list(self.ends), pad_token_id=self.system.pad,
        )  # fmt: skip
        if limits.repetition_penalty != 1:
            settings.repetition_penalty = limits.repetition_penalty
        written = self.model.generate(
            inputs_embeds=embeddings.to(self.base.dtype),
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([RowLimits(limits.new_tokens, states.device)]),
        )
        rows: list[list[int]] = written.tolist()
        return rows

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.system.ways.read(self.system.processor, [list(row) for row in rows])


@dataclass(frozen=True)
class TowerSystem(TrainedSystem):
    """`model`: transformers' model without its tower and its projector, which are in `encoder` and `projector`."""

    encoder_prefix = r"^(model\.)?audio_tower\."
    config: ModelConfig
    encoder: SpeechEncoder
    projector: nn.Module
    model: Any
    processor: Any
    ways: Ways
    _prompts: dict[str | None, tuple[list[int], list[int]]] = field(default_factory=dict)

    @classmethod
    def from_source(cls, source: str, config: ModelConfig, dtype: torch.dtype) -> Self:
        shape = read_config(source, config.revision)
        if config.window_seconds is not None:
            raise StudyError([f"model.window_seconds: is for Whisper, got {config.window_seconds}: leave it out"])
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        model = load_checkpoint(AutoModelForMultimodalLM, source, config.revision, shape, MODEL, **options)
        with library_errors("its processor cannot be loaded", local=Path(source).is_dir()):
            processor = AutoProcessor.from_pretrained(source, revision=config.revision or "main", trust_remote_code=False)
        system = cls._taken_apart(config, model.requires_grad_(False).eval(), processor)
        lora_targets(model, config)
        return system

    @classmethod
    def skeleton(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        assert config.model is not None
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(read_architecture(config, config.model), dtype=dtype)
        return cls._taken_apart(config.model, model.requires_grad_(False), None)

    @classmethod
    def _taken_apart(cls, config: ModelConfig, model: Any, processor: Any) -> Self:
        ways, inner = WAYS[model.config.model_type], model.model
        extractor = processor.feature_extractor if processor is not None else _Hop()
        tower, projector = inner.audio_tower, inner.multi_modal_projector
        inner.audio_tower, inner.multi_modal_projector = nn.Module(), nn.Module()
        return cls(config, ways.tower(tower, extractor), projector, model, processor, ways)

    def to(self, device: torch.device) -> Self:
        self.encoder.to(device)
        self.projector.to(device)
        self.model.to(device)
        return self

    @property
    def ends(self) -> tuple[int, ...]:
        settings = self.model.generation_config
        ends = settings.eos_token_id if settings.eos_token_id is not None else self.model.config.eos_token_id
        return (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def pad(self) -> int:
        settings = self.model.generation_config
        return int(settings.pad_token_id if settings.pad_token_id is not None else self.ends[0])

    def prompt(self, language: str | None) -> tuple[list[int], list[int]]:
        """The tokens before and behind the audio. Raises StudyError for a language that the model does not know."""
        language = (language or self.config.language) if self.ways.takes_language else None
        if self.processor is None:  # of a skeleton
            return [0] * PROMPT_TOKENS, [0]
        if language not in self._prompts:
            try:
                asked = self.ways.ask(self.processor, [np.zeros(SAMPLE_RATE, np.float32)], language)
            except ValueError as error:
                reason = str(error).splitlines()[0]
                raise StudyError([f"language {language!r} is not one that {self.config.name} knows: {reason}"]) from None
            ids, audio = asked["input_ids"][0].tolist(), self.model.config.audio_token_id
            first, count = ids.index(audio), ids.count(audio)
            assert ids[first : first + count] == [audio] * count, "the audio's place is one run of tokens"
            self._prompts[language] = ids[:first], ids[first + count :]
        return self._prompts[language]

    def target(self, text: str, language: str | None) -> Target:
        if self.ways.takes_language and (language or self.config.language) is None:
            raise no_language()
        self.prompt(language)
        tokenizer = self.processor.tokenizer
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return Target([*ids, int(tokenizer.eos_token_id)], language)

    def new_projector(self, seed: int) -> TowerProjector:
        return TowerProjector(self.projector, self.ways.stack)

    def attach(self, projector: SpeechProjector, rank: int = 0, seed: int = 0) -> TowerReader:
        names = "|".join(lora_targets(self.model, self.config))
        model = with_lora(self.model, rank, self.config, seed, rf".*language_model.*\.({names})")
        return TowerReader(projector, model, self)

    def detach(self, reader: Reader) -> None:
        remove_lora(reader.model, self.model)

    def recompute_activations(self) -> None:
        recompute_activations(self.model)

    def parameters(self, encoder: SpeechEncoder, reader: Reader) -> Parameters:
        return count_parameters(encoder.module, reader.projector, reader.model)

    def save_pretrained(self, folder: Path, encoder: SpeechEncoder, reader: Reader) -> None:
        settings, inner = copy.deepcopy(self.model.config), self.model.model
        settings.audio_config = encoder.module.config
        with torch.device("meta"):  # allocates nothing: every module is replaced
            whole = type(self.model)(settings)
        whole.model.audio_tower, whole.model.language_model = encoder.module, inner.language_model
        whole.model.multi_modal_projector, whole.lm_head = reader.projector.own, self.model.lm_head
        whole.generation_config = self.model.generation_config
        save_without_lora(whole, folder, encoder.module.dtype)
        self.processor.save_pretrained(folder)


@dataclass(frozen=True)
class _Hop:
    """Stands in for a feature extractor in a skeleton."""

    hop_length: int = 160
    chunk_length: int = 30
    nb_max_frames: int = 3000


System = TowerSystem
