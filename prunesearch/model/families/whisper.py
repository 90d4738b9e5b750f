"""Whisper itself: its encoder, and its own decoder behind it.

The projector's equivalent are the maps of the decoder's cross-attention that read the encoder's states: keys and values of
every decoder layer. The rest of the decoder is the language model. Recordings are padded with silence to the encoder's
window, as Whisper always does. The window may be shortened: that cuts the position embeddings, and leaves a plain Whisper.

Shapes: B batch, M mel bins, F mel frames, T encoder positions, D width, P prompt tokens, S text tokens, V vocabulary.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    StoppingCriteriaList,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.modeling_outputs import BaseModelOutput

from prunesearch.model.checkpoint import Part, library_errors, load_checkpoint, read_config
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.encoder import ENCODER_PREFIX, SAMPLE_RATE, WindowedWhisper
from prunesearch.model.generation import RowLimits
from prunesearch.model.hub import read_architecture
from prunesearch.model.languages import language_code
from prunesearch.model.llm import pad_tokens, recompute_activations, remove_lora, save_without_lora, with_lora
from prunesearch.model.loading import load_extractor
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

WHISPER = Part("model")
HOP_LENGTH = 160  # samples from one mel frame to the next, in every Whisper
PROMPT_TOKENS = 4  # start, language, task, no timestamps
# LoRA's targets: the projections of the decoder's attention, without those that are trained whole
SELF_ATTENTION, CROSS_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj"), ("q_proj", "out_proj")


class CrossAttention(SpeechProjector):
    """Copies of the decoder's maps that read the encoder's states, in fp32: to be trained, and put into the decoder.

    Each layer's keys and values are linear in the states. A linear map in front of them folds into all of them, so that one
    least-squares fit of the states refits them together. A constant that it adds changes every key of a recording alike, and no
    attention: keys need no bias.
    """

    entry_name = "keys_values"

    def __init__(self, maps: Iterable[tuple[nn.Linear, nn.Linear]]):
        super().__init__()
        self.maps = nn.ModuleList(
            nn.ModuleDict({"k_proj": copy.deepcopy(keys).float(), "v_proj": copy.deepcopy(values).float()})
            for keys, values in maps
        )
        self.requires_grad_(True)
        self._entry = [self._identity()]  # in a list: it is no part of the module

    def _identity(self) -> nn.Linear:
        weight = self.maps[0]["v_proj"].weight  # type: ignore[index]
        entry = nn.Linear(weight.shape[1], weight.shape[1], device=weight.device)
        if not weight.is_meta:
            entry.weight.data = torch.eye(weight.shape[1], device=weight.device)
            entry.bias.data.zero_()
        return entry.requires_grad_(False)

    @property
    def entry(self) -> nn.Linear:
        return self._entry[0]

    def inputs(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return states, lengths

    @torch.no_grad()
    def fold(self) -> None:
        weight, bias = self.entry.weight, self.entry.bias
        for maps in self.maps:
            keys, values = maps["k_proj"], maps["v_proj"]  # type: ignore[index]
            values.bias += values.weight @ bias
            for linear in (keys, values):
                linear.weight.copy_(linear.weight @ weight)
        self._entry[0] = self._identity()

    def embeddings_of(self, positions: int) -> int:
        return positions

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The states: all that the decoder reads."""
        return states, lengths


@dataclass
class WhisperDecoder(Reader):
    """The decoder, with or without LoRA, that reads through a `CrossAttention`. `system`: what it belongs to."""

    projector: SpeechProjector
    model: Any
    system: "WhisperSystem"

    @property
    def base(self) -> Any:
        return self.system.model

    @property
    def ends(self) -> tuple[int, ...]:
        return (int(self.base.generation_config.eos_token_id),)

    def logits(self, states: Tensor, lengths: Tensor, tokens: Tensor, languages: Sequence[str | None]) -> Tensor:
        prompts = pad_tokens([self.system.prompt(language) for language in languages], 0, states.device)  # all of one length
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=torch.cat([prompts, tokens[:, :-1]], 1),
            use_cache=False,
        )
        return out.logits[:, prompts.shape[1] - 1 :]

    def generate(
        self, states: Tensor, lengths: Tensor, languages: Sequence[str | None], limits: GenerationLimits
    ) -> list[list[int]]:
        """By the model's own `generate`. Of recordings without a language, the model finds the language itself."""
        codes = [self.system.language_code(language) for language in languages]
        rows: list[list[int]] = [[] for _ in codes]
        for known in (True, False):
            chosen = [i for i, code in enumerate(codes) if (code is not None) == known]
            if chosen:
                spoken = [codes[i] for i in chosen] if known else None
                for i, row in zip(chosen, self._generate(states[chosen], spoken, limits, chosen), strict=True):
                    rows[i] = row
        return rows

    def _generate(
        self, states: Tensor, languages: Sequence[str | None] | None, limits: GenerationLimits, rows: Sequence[int]
    ) -> list[list[int]]:
        system = self.system
        prompt = PROMPT_TOKENS if system.is_multilingual else 2
        most = [min(limits.new_tokens[i], self.base.config.max_target_positions - prompt) for i in rows]
        options: dict[str, Any] = {"language": languages, "task": "transcribe"} if system.is_multilingual else {}
        if limits.repetition_penalty != 1:
            options["repetition_penalty"] = limits.repetition_penalty
        written = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states.to(self.base.dtype)),
            return_timestamps=False,
            force_unique_generate_call=True,  # the whole row, prompt and end of sequence included
            return_dict_in_generate=True,
            do_sample=False,
            max_new_tokens=max(most),
            num_beams=limits.beams,
            stopping_criteria=StoppingCriteriaList([RowLimits([prompt + n for n in most], states.device)]),
            **{name: value for name, value in options.items() if value is not None},
        ).sequences
        found: list[list[int]] = written[:, prompt:].tolist()
        return found

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        decoded: list[str] = self.system.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in decoded]


class _EncoderElsewhere(nn.Module):
    """Stands in for the encoder inside the model, which `generate` asks for the strides of its convolutions only."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.conv1, self.conv2 = (SimpleNamespace(stride=conv.stride) for conv in (encoder.conv1, encoder.conv2))


@dataclass(frozen=True)
class WhisperSystem(TrainedSystem):
    """`model`: transformers' model; its encoder is in `encoder`, and not in the model. `maps`: the keys' and the values' maps
    of each decoder layer, as they were loaded.
    """

    encoder_prefix = ENCODER_PREFIX
    auto_class = "AutoModelForSpeechSeq2Seq"
    config: ModelConfig
    encoder: WindowedWhisper
    model: Any
    tokenizer: Any
    maps: tuple[tuple[nn.Linear, nn.Linear], ...]

    @classmethod
    def from_source(cls, source: str, config: ModelConfig, dtype: torch.dtype) -> Self:
        shape = read_config(source, config.revision)
        if shape.model_type != "whisper":
            raise CheckpointError(f"must be a Whisper checkpoint, got one of type {shape.model_type!r}")
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        model = load_checkpoint(WhisperForConditionalGeneration, source, config.revision, shape, WHISPER, **options)
        model.requires_grad_(False).eval()
        extractor = load_extractor(source, config.revision, model.model.encoder)
        with library_errors("its tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision or "main", trust_remote_code=False)
        if config.window_seconds is not None:
            extractor = _shorten_window(model.model.encoder, extractor, config.window_seconds)
        system = cls._taken_apart(config, model, extractor, tokenizer)
        _require_settings(model.generation_config)
        system.lora_targets()
        system.language_code(config.language)
        return system

    @classmethod
    def skeleton(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        assert config.model is not None
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(read_architecture(config, config.model)).to(dtype)
        model.requires_grad_(False)
        extractor: Any = SimpleNamespace(hop_length=HOP_LENGTH, to_dict=dict)
        if config.model.window_seconds is not None:
            extractor = _shorten_window(model.model.encoder, extractor, config.model.window_seconds)
        return cls._taken_apart(config.model, model, extractor, None)

    @classmethod
    def _taken_apart(cls, config: ModelConfig, model: Any, extractor: Any, tokenizer: Any) -> Self:
        encoder = WindowedWhisper(model.model.encoder, extractor)
        model.model.encoder = _EncoderElsewhere(encoder.module)
        maps = tuple((layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in model.model.decoder.layers)
        return cls(config, encoder, model, tokenizer, maps)

    def to(self, device: torch.device) -> Self:
        self.encoder.to(device)
        self.model.to(device)
        return self

    # Languages

    @property
    def is_multilingual(self) -> bool:
        return bool(getattr(self.model.generation_config, "is_multilingual", False))

    @cached_property
    def languages(self) -> dict[str, int]:
        """The codes of the languages that the model knows, and their tokens."""
        known = getattr(self.model.generation_config, "lang_to_id", None) or {}
        return {token.strip("<|>"): number for token, number in known.items()}

    def language_code(self, language: str | None) -> str | None:
        """The model's code of a language, which may be given as `da`, `da-DK` or `Danish`; the study's language for None.

        None where neither is known, and for an English-only model. Raises StudyError for a language that the model does not
        know.
        """
        language = language or self.config.language
        if language is None:
            return None
        code = language_code(language)
        if not self.is_multilingual:
            if code == "en":
                return None
            raise StudyError([f"model.name: {self.config.name} knows English only, got recordings in {language!r}"])
        if code not in self.languages:
            known = ", ".join(sorted(self.languages))
            raise StudyError([f"language {language!r} is not one that {self.config.name} knows: {known}"])
        return code

    def prompt(self, language: str | None) -> list[int]:
        """The tokens before a text. Raises StudyError where the model needs a language, and none is known."""
        if self.tokenizer is None:  # of a skeleton
            return [0] * PROMPT_TOKENS
        settings = self.model.generation_config
        start, last = int(settings.decoder_start_token_id), int(settings.no_timestamps_token_id)
        code = self.language_code(language)
        if not self.is_multilingual:
            return [start, last]
        if code is None:
            raise no_language()
        return [start, self.languages[code], int(settings.task_to_id["transcribe"]), last]

    def target(self, text: str, language: str | None, seconds: float = 0.0) -> Target:
        """Whisper writes a space before the first word."""
        ids = self.tokenizer(f" {text.strip()}", add_special_tokens=False, split_special_tokens=True).input_ids
        self.prompt(language)
        return Target([*ids, int(self.model.generation_config.eos_token_id)], language)

    # Readers

    def new_projector(self, seed: int) -> CrossAttention:
        return CrossAttention(self.maps)

    def lora_targets(self) -> str:
        """A regular expression for the layers that LoRA adapts. Raises StudyError when the decoder has no layer of a name."""
        names = self.config.lora_targets
        own = {n.rsplit(".", 1)[-1] for n, m in self.model.model.decoder.named_modules() if isinstance(m, nn.Linear)}
        if missing := [name for name in names if name not in own] if names != "auto" else []:
            raise StudyError(
                [f"model.lora_targets: Whisper's decoder has no layer {missing[0]!r}; it has {', '.join(sorted(own))}"]
            )
        chosen = set(SELF_ATTENTION if names == "auto" else names)
        crossing = "|".join(sorted(chosen.intersection(CROSS_ATTENTION))) or "none"
        others = "|".join(sorted(chosen - set(SELF_ATTENTION))) or "none"
        inside = "|".join(sorted(chosen.intersection(SELF_ATTENTION))) or "none"
        return rf".*decoder\.layers\.\d+\.(self_attn\.({inside})|encoder_attn\.({crossing})|({others}))"

    def attach(self, projector: SpeechProjector, rank: int = 0, seed: int = 0) -> WhisperDecoder:
        assert isinstance(projector, CrossAttention)
        self._put([(maps["k_proj"], maps["v_proj"]) for maps in projector.maps])  # type: ignore[index]
        model = with_lora(self.model, rank, self.config, seed, self.lora_targets())
        projector.requires_grad_(True)  # peft has frozen all but the LoRA
        return WhisperDecoder(projector, model, self)

    def detach(self, reader: Reader) -> None:
        remove_lora(reader.model, self.model)
        self._put(self.maps)

    def _put(self, maps: Iterable[tuple[nn.Linear, nn.Linear]]) -> None:
        """Give the decoder these maps to read the states with."""
        for layer, (keys, values) in zip(self.model.model.decoder.layers, maps, strict=True):
            layer.encoder_attn.k_proj, layer.encoder_attn.v_proj = keys, values

    def recompute_activations(self) -> None:
        recompute_activations(self.model)

    def parameters(self, encoder: SpeechEncoder, reader: Reader) -> Parameters:
        """The decoder is the language model, its cross-attention included: it is there in any case."""
        return count_parameters(encoder.module, nn.Module(), reader.model)

    def save_pretrained(self, folder: Path, encoder: SpeechEncoder, reader: Reader) -> None:
        with torch.device("meta"):  # allocates nothing: every module is replaced
            whole = WhisperForConditionalGeneration(encoder.module.config)
        whole.model.encoder, whole.model.decoder, whole.proj_out = encoder.module, self.model.model.decoder, self.model.proj_out
        whole.generation_config = self.model.generation_config
        save_without_lora(whole, folder, encoder.module.dtype)
        WhisperProcessor(self.encoder.extractor, self.tokenizer).save_pretrained(folder)


def _require_settings(settings: Any) -> None:
    """Raises CheckpointError where generation_config.json lacks what Whisper's prompt is made of."""
    needed = ["decoder_start_token_id", "no_timestamps_token_id", "eos_token_id"]
    if getattr(settings, "is_multilingual", False):
        needed += ["lang_to_id", "task_to_id"]
    if missing := [name for name in needed if getattr(settings, name, None) is None]:
        raise CheckpointError(
            f"generation_config.json must have {missing[0]}: take this file from the Whisper that the model was trained from"
        )


def _shorten_window(encoder: Any, extractor: Any, seconds: int) -> WhisperFeatureExtractor:
    """Cut the encoder's position embeddings to so many seconds, in place; returns the feature extractor of that window.

    Raises StudyError for a window that is longer than the encoder's.
    """
    whole = encoder.max_source_positions * 2 * extractor.hop_length / SAMPLE_RATE
    if seconds > whole:
        raise StudyError([f"model.window_seconds: must not exceed {whole:g}, the encoder's own window, got {seconds}"])
    positions = seconds * SAMPLE_RATE // (2 * extractor.hop_length)
    weight = encoder.embed_positions.weight[:positions].clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(weight, freeze=True)
    encoder.max_source_positions = encoder.config.max_source_positions = positions
    return WhisperFeatureExtractor(**{**extractor.to_dict(), "chunk_length": seconds})


System = WhisperSystem
