"""Speech-LLMs with an audio tower: transformers' `audio_tower`, `multi_modal_projector` and `language_model`.

A chat template puts the projected audio between fixed tokens: those before it and those after it depend on the language only.
Each model's own processor says what they are. Windows, packing and padding are each tower's own (`towers`).

Shapes: B batch, M mel bins, F mel frames, T tower positions, D tower width, A audio embeddings, P prefix, S text tokens,
V vocabulary.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, StoppingCriteriaList  # knows all of these models

from prunesearch.model.checkpoint import Part, library_errors, load_checkpoint, read_config
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.encoder import SAMPLE_RATE, WindowedWhisper
from prunesearch.model.families.towers import MaskedTower, PackedTower, RotaryTower, WhisperTower
from prunesearch.model.generation import RowLimits
from prunesearch.model.hub import read_architecture
from prunesearch.model.languages import language_code
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
MARK = re.compile(r"\[[\d.:]+\]|\[S\d+\]|\[[S\d.:]*$")  # of a time or a speaker; the last one may be cut off
PROMPT_TOKENS = 20  # about the length of a chat template: a plan is made without a processor


# Each model's own ways


@dataclass(frozen=True)
class Ways:
    """What differs from model to model. `ask`: the processor's inputs for a recording in a language; `read`: its text of token
    rows. `takes_language`: whether it can be told the language; `needs_language`: whether it must be, so that it writes nothing
    but the text. `averages`: whether pairs of states are averaged, and then go through the tower's norm. `written`: what the
    model writes for a text of a recording of so many seconds. `marked`: the tokens of so many audio embeddings, if others stand
    among them. `tokens`: of a text, in which a special token is text like any other.
    """

    tower: Callable[[Any, Any], SpeechEncoder]
    ask: Callable[[Any, NDArray[np.float32], str | None], Any]
    read: Callable[[Any, list[list[int]]], list[str]]
    takes_language: bool = False
    needs_language: bool = False
    averages: bool = False
    written: Callable[[str, float], str] = lambda text, seconds: text
    marked: Callable[[Any, int], list[int]] | None = None
    tokens: Callable[[Any, str], list[int]] = lambda tokenizer, text: (
        tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    )


def _request(processor: Any, samples: NDArray[np.float32], language: str | None) -> Any:
    return processor.apply_transcription_request([samples], return_tensors="pt")


def _without_prefix(processor: Any, rows: list[list[int]]) -> list[str]:
    texts: list[str] = processor.decode(rows, strip_prefix=True, skip_special_tokens=True)
    return texts


def _without_marks(processor: Any, rows: list[list[int]]) -> list[str]:
    """MOSS writes `[start][S01]text[end]`, once or several times. Its processor's own parser raises where a pruned model writes
    something else in brackets, and drops a segment without an end; here, only the marks go.
    """
    return [" ".join(MARK.sub(" ", text).split()) for text in processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _ask_qwen2_audio(processor: Any, samples: NDArray[np.float32], language: str | None) -> Any:
    parts = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": "Transcribe the speech."}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    return processor(text=text, audio=[samples], sampling_rate=SAMPLE_RATE, return_tensors="pt")


def _ask_voxtral(processor: Any, samples: NDArray[np.float32], language: str | None) -> Any:
    return processor.apply_transcription_request(
        [samples], model_id="voxtral", language=language and language_code(language), format="WAV", sampling_rate=SAMPLE_RATE
    )


def _time_marks(processor: Any, count: int) -> list[int]:
    """MOSS writes the seconds that have passed among the audio."""
    text = processor.replace_audio_token({"num_audio_tokens": [count]}, audio_idx=0)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False).input_ids
    return ids


WAYS = {
    "qwen3_asr": Ways(
        PackedTower,
        ask=lambda processor, samples, language: processor.apply_transcription_request([samples], language=language),
        read=lambda processor, rows: processor.decode(rows, return_format="transcription_only"),
        takes_language=True,
        needs_language=True,
    ),
    "glmasr": Ways(RotaryTower, _request, _without_prefix),
    "audioflamingo3": Ways(MaskedTower, _request, _without_prefix, averages=True),
    "qwen2_audio": Ways(
        MaskedTower,
        _ask_qwen2_audio,
        read=lambda processor, rows: processor.batch_decode(rows, skip_special_tokens=True),
        averages=True,
    ),
    "moss_transcribe_diarize": Ways(
        WhisperTower,
        _request,
        _without_marks,
        written=lambda text, seconds: f"[0.00][S01]{text}[{seconds:.2f}]",  # one speaker, from start to end
        marked=_time_marks,
    ),
    "voxtral": Ways(
        WindowedWhisper,
        _ask_voxtral,
        read=lambda processor, rows: processor.tokenizer.batch_decode(rows, skip_special_tokens=True),
        takes_language=True,
        tokens=lambda tokenizer, text: tokenizer(text, add_special_tokens=False).input_ids,  # knows no special ones in a text
    ),
}


class TowerProjector(SpeechProjector):
    """A copy of the model's projector in fp32, whose first linear map reads the tower's states.

    `stack`: states in an audio embedding; a last one that is not whole is left out. `norm`: if given, pairs of states are
    averaged and normed instead. It is the tower's, and not trained.
    """

    def __init__(self, own: nn.Module, width: int, norm: nn.Module | None = None):
        super().__init__()
        self.own = copy.deepcopy(own).float().requires_grad_(True)
        self.entry_name = next(name for name in ("linear_1", "linear") if hasattr(own, name))
        self.stack = 2 if norm is not None else self.entry.in_features // width
        self._norm = [norm]  # in a list: it is no part of the module

    @property
    def entry(self) -> nn.Linear:
        return getattr(self.own, self.entry_name)

    def inputs(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        batch, positions, width = states.shape
        whole = positions // self.stack
        groups = states[:, : whole * self.stack].reshape(batch, whole, self.stack, width)
        norm = self._norm[0]
        return groups.flatten(2) if norm is None else norm(groups.mean(2)), lengths // self.stack

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

    @property
    def format_tokens(self) -> int:
        return self.system.format_tokens

    def prefix(self, states: Tensor, lengths: Tensor, languages: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Everything before the text: (B, T, D), lengths (B,) -> embeddings (B, P, width), mask (B, P), padded on the left."""
        audio, heard = self.projector(states, lengths)
        audio, heard = self._marked(audio, heard)
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

    def _marked(self, audio: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A, width), lengths (B,), with the tokens that the processor puts among the audio embeddings, if it does."""
        if not (rows := self.system.marked_rows(audio.shape[1])):
            return audio, heard
        tokens = torch.tensor(rows[-1], device=audio.device)
        is_audio = tokens == self.system.audio_token
        source = audio[:, (is_audio.cumsum(0) - 1).clamp(min=0)]
        marks = self.base.get_input_embeddings()(tokens).to(audio.dtype)
        bounds = torch.tensor([len(row) for row in rows], device=audio.device)
        return torch.where(is_audio[:, None], source, marks), bounds[heard]

    def logits(self, states: Tensor, lengths: Tensor, tokens: Tensor, languages: Sequence[str | None]) -> Tensor:
        prefix, mask = self.prefix(states, lengths, languages)
        text = self.base.get_input_embeddings()(tokens[:, :-1]).to(prefix.dtype)
        mask = torch.cat([mask, mask.new_ones(text.shape[:2])], 1)  # padding on the right is never attended to: causal
        out = self.base.model.language_model(
            inputs_embeds=torch.cat([prefix, text], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
        found: Tensor = self.base.lm_head(out.last_hidden_state[:, -tokens.shape[1] :])
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
    auto_class = "AutoModelForSeq2SeqLM"
    config: ModelConfig
    encoder: SpeechEncoder
    projector: nn.Module
    model: Any
    processor: Any
    ways: Ways
    _prompts: dict[str | None, tuple[list[int], list[int]]] = field(default_factory=dict)
    _marked_rows: list[list[int]] = field(default_factory=list)

    @classmethod
    def from_source(cls, source: str, config: ModelConfig, dtype: torch.dtype) -> Self:
        shape = read_config(source, config.revision)
        if config.window_seconds is not None:
            raise StudyError([f"model.window_seconds: is for Whisper, got {config.window_seconds}: leave it out"])
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        model = load_checkpoint(AutoModelForSeq2SeqLM, source, config.revision, shape, MODEL, **options)
        with library_errors("its processor cannot be loaded", local=Path(source).is_dir()):
            processor = AutoProcessor.from_pretrained(source, revision=config.revision or "main", trust_remote_code=False)
        system = cls._taken_apart(config, model.requires_grad_(False).eval(), processor)
        with library_errors("its processor cannot be asked for a transcription"):
            system._prompts[None] = system._ask(None)
        lora_targets(model, config)
        return system

    @classmethod
    def skeleton(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        assert config.model is not None
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(read_architecture(config, config.model), dtype=dtype)
        return cls._taken_apart(config.model, model.requires_grad_(False), None)

    @classmethod
    def _taken_apart(cls, config: ModelConfig, model: Any, processor: Any) -> Self:
        ways, inner = WAYS[model.config.model_type], model.model
        extractor = processor.feature_extractor if processor is not None else _Hop()
        tower, projector = inner.audio_tower, inner.multi_modal_projector
        inner.audio_tower, inner.multi_modal_projector = _Elsewhere(), _Elsewhere()
        encoder = ways.tower(tower, extractor)
        if isinstance(encoder, WhisperTower):
            encoder = replace(encoder, group=model.config.audio_merge_size)
        return cls(config, encoder, projector, model, processor, ways)

    def to(self, device: torch.device) -> Self:
        self.encoder.to(device)
        self.projector.to(device)
        self.model.to(device)
        return self

    @property
    def ends(self) -> tuple[int, ...]:
        settings, text = self.model.generation_config, self.model.config.get_text_config()
        ends = settings.eos_token_id if settings.eos_token_id is not None else text.eos_token_id
        return (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def audio_token(self) -> int:
        """Stands for an audio embedding among tokens."""
        return int(self.model.config.audio_token_id)

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
                self._prompts[language] = self._ask(language)
            except ValueError as error:
                reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error).splitlines()[0]
                raise StudyError([f"language {language!r} is not one that {self.config.name} knows: {reason}"]) from None
        return self._prompts[language]

    def _ask(self, language: str | None) -> tuple[list[int], list[int]]:
        """The tokens before and behind half a second of audio, whose own are one run. Raises whatever the processor raises, and
        CheckpointError where that run is not found.
        """
        asked = self.ways.ask(self.processor, np.zeros(SAMPLE_RATE // 2, np.float32), language)
        ids, audio = asked["input_ids"][0].tolist(), self.audio_token
        count = ids.count(audio)
        first = ids.index(audio) if count else 0
        if not count or ids[first : first + count] != [audio] * count:
            raise CheckpointError(
                f"its processor must put the audio at one run of the token {audio} (audio_token_id in config.json), got "
                f"{count} such tokens: config.json and the processor's files must be of the same model"
            )
        return ids[:first], ids[first + count :]

    def marked_rows(self, most: int) -> list[list[int]]:
        """The tokens of 0, 1, … `most` audio embeddings, each row the beginning of the next one; empty if they are nothing but
        audio.
        """
        if self.ways.marked is None or self.processor is None:
            return []
        rows = self._marked_rows
        rows += [self.ways.marked(self.processor, count) for count in range(len(rows), most + 1)]
        return rows[: most + 1]

    @cached_property
    def format_tokens(self) -> int:
        """The tokens that the model writes beside a text that it writes in one piece."""
        text = self.ways.written("", self.encoder.window_seconds)
        return len(self.ways.tokens(self.processor.tokenizer, text)) if text else 0

    def target(self, text: str, language: str | None, seconds: float = 0.0) -> Target:
        if self.ways.needs_language and (language or self.config.language) is None:
            raise no_language()
        self.prompt(language)
        tokenizer = self.processor.tokenizer
        ids = self.ways.tokens(tokenizer, self.ways.written(text, seconds))
        return Target([*ids, int(tokenizer.eos_token_id)], language)

    def new_projector(self, seed: int) -> TowerProjector:
        norm = self.encoder.module.layer_norm if self.ways.averages else None
        return TowerProjector(self.projector, self.encoder.width, norm)

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


class _Elsewhere(nn.Module):
    """Stands in for the tower and the projector inside the model. Some models ask for the tower's device."""

    device = torch.device("cpu")


@dataclass(frozen=True)
class _Hop:
    """Stands in for a feature extractor in a skeleton."""

    hop_length: int = 160
    chunk_length: int = 30
    nb_max_frames: int = 3000


System = TowerSystem
