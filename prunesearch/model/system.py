"""A speech system as the rest of the toolkit knows it: an encoder whose layers can go, and what reads the encoder's states.

`SpeechSystem` is what a study starts from, in three parts:

- `SpeechEncoder`: turns a recording into states, layer by layer. Layers can be removed, and their maps refitted.
- `SpeechProjector`: the weights that are trained at every LoRA rank. Its first linear map reads the states.
- `Reader`: projector and language model, perhaps with LoRA: states in, loss or text out.

Each family of models is one file in `model.families`. Training, scan, search, report, measure, export and transcribe know what
is written here, and no family by name.

Shapes: B batch, M mel bins, F mel frames, T encoder positions, D encoder width, A audio embeddings.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunesearch.model.digest import model_digest
from prunesearch.model.hub import loading_error
from prunesearch.model.llm import pad_tokens
from prunesearch.model.surgery import remove_layers, with_repaired_maps
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import ModelConfig
from prunesearch.study.record import Parameters


@dataclass(frozen=True)
class Target:
    """What a system shall write for a recording: the text's tokens with their end of sequence, and the language to write in, if
    the system takes one.
    """

    tokens: Sequence[int]
    language: str | None = None


@dataclass(frozen=True)
class GenerationLimits:
    """Beam search (greedy if `beams` is 1), each row ending at its own number of new tokens."""

    new_tokens: Sequence[int]
    beams: int = 1
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class SpeechEncoder(ABC):
    """A frozen encoder, cut open between its layers. `module` is transformers' own: its parameters are counted and saved.

    Every tensor of a layer has a name that begins with `layers.<place>.` in the module's `state_dict`. `extractor`: the feature
    extractor that belongs to the encoder.
    """

    module: Any
    extractor: Any

    @property
    def layers(self) -> nn.ModuleList:
        return self.module.layers

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    @abstractmethod
    def width(self) -> int:
        """D."""

    @property
    def window_seconds(self) -> float:
        """The longest recording that the encoder takes as a whole."""
        return float(self.extractor.chunk_length)

    @abstractmethod
    def positions(self, seconds: float) -> int:
        """T of a recording of so many seconds."""

    def computed(self, length: int) -> int:
        """The number of positions that are computed for an utterance of this length: more than are read, if the encoder reads
        every recording as a whole window, and what is behind it reads only the recording's part.
        """
        return length

    @abstractmethod
    def features(self, samples: NDArray[np.float32], device: torch.device) -> Tensor:
        """What the encoder reads of one recording at 16 kHz, (M, F): computed on `device`, returned on the CPU."""

    @abstractmethod
    def embed(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Everything below the first layer: (B, M, F), frames (B,) -> states (B, T, D), lengths (B,).

        An utterance's states do not depend on the others of its batch.
        """

    @abstractmethod
    def run(self, hidden: Tensor, lengths: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Layers `first` to `last` (exclusive; default: all that follow): (B, T, D), lengths (B,) -> (B, T, D)."""

    @abstractmethod
    def norm(self, hidden: Tensor) -> Tensor:
        """Everything behind the last layer: (B, T, D) -> (B, T, D)."""

    def first_layers(self, features: Tensor, frames: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """What is below the first layer, and the first `depth` layers: (B, M, F), (B,) -> states (B, T, D), lengths (B,)."""
        hidden, lengths = self.embed(features, frames)
        return self.run(hidden, lengths, 0, depth), lengths

    def output(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """What is read of the stream behind the last layer: (B, T, D), lengths (B,) -> (B, t, D), t the longest length."""
        return self.norm(hidden[:, : int(lengths.max())])

    def last_layers(self, hidden: Tensor, lengths: Tensor, depth: int) -> Tensor:
        """The layers above the first `depth`, and what is behind them: (B, T, D), (B,) -> (B, t, D), t the longest length."""
        return self.output(self.run(hidden, lengths, depth), lengths)

    def encode(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The whole encoder: (B, M, F), (B,) -> states (B, t, D), lengths (B,), t the longest; beyond a length: undefined."""
        hidden, lengths = self.embed(features, frames)
        return self.last_layers(hidden, lengths, 0), lengths

    # Surgery

    def without(self, removed_layers: Iterable[int]) -> Self:
        """The encoder without these (zero-based) layers: see `surgery.remove_layers`."""
        return replace(self, module=remove_layers(self.module, removed_layers))

    def with_maps(self, maps: Mapping[str, Tensor]) -> Self:
        """The encoder with some of its tensors replaced: see `surgery.with_repaired_maps`."""
        return replace(self, module=with_repaired_maps(self.module, maps))

    def to(self, device: torch.device | str) -> Self:
        """Move the module to the device, in place."""
        self.module.to(device)
        return self

    # The two halves of a layer, for its repair: each ends in a linear map that writes into the stream

    @abstractmethod
    def attention_map(self, layer: Any) -> nn.Linear:
        """The last linear map of a layer's attention."""

    @abstractmethod
    def attention_heads(self, layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
        """What that map reads, from the stream before the layer: (B, T, D), lengths (B,) -> (B, T, inputs)."""

    @abstractmethod
    def feed_forward_map(self, layer: Any) -> nn.Linear:
        """The last linear map of a layer's feed-forward part."""

    @abstractmethod
    def activations(self, layer: Any, middle: Tensor) -> Tensor:
        """What that map reads, from the stream behind the layer's attention: (B, T, D) -> (B, T, inputs)."""

    def add_attention(self, layer: Any, hidden: Tensor, heads: Tensor) -> Tensor:
        """The stream behind a layer's attention, from the stream before the layer and the heads."""
        added: Tensor = self.attention_map(layer)(heads)
        return hidden + added

    def behind_attention(self, layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
        """The stream behind a layer's attention: (B, T, D), lengths (B,) -> (B, T, D)."""
        return self.add_attention(layer, hidden, self.attention_heads(layer, hidden, lengths))

    def behind_feed_forward(self, layer: Any, middle: Tensor) -> Tensor:
        """The stream behind a layer, from the stream behind its attention: (B, T, D) -> (B, T, D)."""
        added: Tensor = self.feed_forward_map(layer)(self.activations(layer, middle))
        return middle + added


class SpeechProjector(nn.Module, ABC):
    """What lies between states and language model, and is trained at every LoRA rank.

    Its first linear map can be refitted in closed form: `entry` reads `inputs` of the states. After a refit, `fold` is called.
    """

    entry_name: str  # in records

    @property
    @abstractmethod
    def entry(self) -> nn.Linear:
        """The first linear map."""

    @abstractmethod
    def inputs(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What `entry` reads: (B, T, D), lengths (B,) -> (B, A, inputs), lengths (B,)."""

    def fold(self) -> None:
        """Take a refitted `entry` over into the weights that are trained, where it is not one of them."""

    @abstractmethod
    def embeddings_of(self, positions: int) -> int:
        """The number of audio embeddings that the language model reads for so many positions."""

    @abstractmethod
    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the scan compares layer sets by: (B, T, D), lengths (B,) -> (B, A, width), lengths (B,)."""


class Reader(ABC):
    """What reads an encoder's states and writes text: a projector and a language model, with or without LoRA.

    model: the language model, wrapped by peft where it has a LoRA.
    """

    projector: Any  # a SpeechProjector
    model: Any

    @property
    @abstractmethod
    def base(self) -> Any:
        """The language model itself, as transformers made it."""

    @property
    @abstractmethod
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text; the first is the one that is trained."""

    @property
    def format_tokens(self) -> int:
        """Tokens that the system writes beside a text that it writes in one piece, such as time stamps."""
        return 0

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the language model chooses from."""
        return int(self.base.get_input_embeddings().num_embeddings)

    @abstractmethod
    def logits(self, states: Tensor, lengths: Tensor, tokens: Tensor, languages: Sequence[str | None]) -> Tensor:
        """(B, T, D), lengths (B,), text (B, S) and its languages -> (B, S, vocabulary): predictions of the text tokens only."""

    def loss_sum(self, states: Tensor, lengths: Tensor, targets: Sequence[Target]) -> Tensor:
        """Cross-entropy of (B, T, D), lengths (B,), summed over the targets' tokens (nats)."""
        labels = pad_tokens([target.tokens for target in targets], -100, states.device)
        logits = self.logits(states, lengths, labels.clamp(min=0), [target.language for target in targets])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    def loss(self, states: Tensor, lengths: Tensor, targets: Sequence[Target]) -> Tensor:
        """Cross-entropy, mean over the targets' tokens (nats)."""
        return self.loss_sum(states, lengths, targets) / sum(len(target.tokens) for target in targets)

    @abstractmethod
    def generate(
        self, states: Tensor, lengths: Tensor, languages: Sequence[str | None], limits: GenerationLimits
    ) -> list[list[int]]:
        """(B, T, D), lengths (B,) -> new tokens of each row, its end included; what follows that is undefined."""

    @abstractmethod
    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Token rows as text, without special tokens."""


class SpeechSystem(ABC):
    """The unpruned system that a study starts from, on one device. Its weights are frozen.

    is_trained: the system exists already, projector included; else the study needs an anchor.
    trained_projector: the anchor's weights, if the study gives them; else it trains one.
    """

    encoder: SpeechEncoder
    is_trained: bool
    trained_projector: Mapping[str, Tensor] | None = None

    @classmethod
    @abstractmethod
    def load(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        """Load the study's models on the CPU, frozen and in evaluation mode.

        Raises StudyError when one of them cannot be loaded or is of the wrong kind.
        """

    @classmethod
    @abstractmethod
    def skeleton(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        """The system without weights and without tokenizer, on the meta device, for counting parameters and operations.

        Raises StudyError where a model's configuration cannot be read.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Move the system to the device, in place."""

    @abstractmethod
    def target(self, text: str, language: str | None, seconds: float = 0.0) -> Target:
        """What the system shall write for the text of a recording of so many seconds. A special token written in the text is
        text like any other.

        Raises StudyError for a language that the system does not know, and for none where it needs one.
        """

    @abstractmethod
    def new_projector(self, seed: int) -> SpeechProjector:
        """A projector of its own for one candidate: a copy of the trained one, or new weights drawn with this seed."""

    @contextmanager
    def reader(self, projector: SpeechProjector, rank: int = 0, seed: int = 0) -> Iterator[Reader]:
        """Projector and language model, with a new LoRA of this rank (0: none) until the context ends."""
        reader = self.attach(projector, rank, seed)
        try:
            yield reader
        finally:
            self.detach(reader)

    @abstractmethod
    def attach(self, projector: SpeechProjector, rank: int = 0, seed: int = 0) -> Reader:
        """As `reader`, without an end: the language model keeps the LoRA. At most one reader is attached."""

    @abstractmethod
    def detach(self, reader: Reader) -> None:
        """Undo `attach`."""

    @abstractmethod
    def recompute_activations(self) -> None:
        """Turn on gradient checkpointing for the language model."""

    @abstractmethod
    def parameters(self, encoder: SpeechEncoder, reader: Reader) -> Parameters:
        """Counts by group of a system that consists of this encoder and this reader. Tied weights count once."""

    @classmethod
    @abstractmethod
    def digests(cls, config: StudyConfig) -> dict[str, str]:
        """Digests of the weights of a study's models as they are stored, by part; one part is `encoder`.

        A folder and a copy of it on the hub have the same digests. Raises StudyError where weights cannot be read.
        """


class TrainedSystem(SpeechSystem):
    """A system that exists as a checkpoint of its family, and is exported as one. `model`: transformers' model.

    encoder_prefix: a regular expression for what the names of the encoder's tensors in a checkpoint begin with.
    auto_class: the name of transformers' class that opens a checkpoint.
    """

    encoder_prefix: ClassVar[str]
    auto_class: ClassVar[str]
    model: Any
    is_trained = True

    @classmethod
    @abstractmethod
    def from_source(cls, source: str, config: ModelConfig, dtype: torch.dtype) -> Self:
        """Load a folder or hub name on the CPU.

        Raises OSError or ValueError when there is no such model, CheckpointError when it is not whole or not the model of its
        configuration, StudyError where the settings do not fit it.
        """

    @classmethod
    def load(cls, config: StudyConfig, dtype: torch.dtype) -> Self:
        assert config.model is not None
        source = config.locate(config.model.name)
        try:
            return cls.from_source(source, config.model, dtype)
        except StudyError:  # a ValueError, too, but it has its lines already
            raise
        except (OSError, ValueError) as error:
            raise loading_error(config.model, source, error) from error

    @classmethod
    def digests(cls, config: StudyConfig) -> dict[str, str]:
        assert config.model is not None
        return {"encoder": model_digest(config, config.model, cls.encoder_prefix), "model": model_digest(config, config.model)}

    @abstractmethod
    def save_pretrained(self, folder: Path, encoder: SpeechEncoder, reader: Reader) -> None:
        """Write a system of this encoder and this reader as transformers would, processor included. A LoRA is left out."""


def no_language() -> StudyError:
    """Of a text without a language, for a model that needs one."""
    return StudyError(
        [
            "model.language: the data names no language, and this model is trained with one: "
            'write model.language = "en", or a column "language" in the data'
        ]
    )
