"""A speech recogniser: an encoder and what reads its states, on recordings of any length.

Shapes: B batch, M mel bins, F mel frames, T encoder positions, D encoder width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from prunesearch.model.checkpoint import require_finite
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.system import Reader, SpeechEncoder
from prunesearch.speech.audio import SAMPLE_RATE, checked_samples, read_audio
from prunesearch.study.errors import StudyError
from prunesearch.training.batches import by_length
from prunesearch.training.decode import Decoder, Hypothesis
from prunesearch.training.device import arithmetic
from prunesearch.training.states import ENCODING_BATCH, batch_of, features_of

QUIET_SECONDS = 5.0  # a long recording is cut at the quietest place within this time before a window's end
LAST_PART_SECONDS = 0.5  # from less than a short word, an LLM makes words up
FRAME = SAMPLE_RATE // 50  # samples whose loudness is compared: 20 ms

Samples = NDArray[np.float32]
Language: TypeAlias = str | Sequence[str | None] | None
"""The language spoken in all recordings, or in each; None: not known. Systems that take none ignore it."""


@dataclass(frozen=True)
class Segment:
    """A part of a recording, in seconds, and its transcript.

    reached_limit: the LLM wrote as many tokens as it may, and did not come to an end.
    """

    start: float
    end: float
    text: str
    reached_limit: bool = False


@dataclass
class Recognizer(ABC):
    """A speech recogniser on one device: the system of a study's candidate, loaded from its export."""

    encoder: SpeechEncoder
    reader: Reader
    settings: Any
    device: torch.device
    _is_finite: bool = field(default=False, repr=False)  # whether all weights are known to be finite

    @abstractmethod
    def save_pretrained(self, folder: str | Path, with_llm: bool = True) -> None:
        """Write the system so that it can be loaded again, without any path of this machine.

        `with_llm=False` leaves out a language model that is on the hub. Raises StudyError where weights are not finite.
        """

    @abstractmethod
    def _states(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Each part's weights as they are in memory."""

    def _require_finite(self) -> None:
        """Raises StudyError where weights are not finite. It reads all of them, so it is done before their first use only."""
        if self._is_finite:
            return
        for part, state in self._states().items():
            try:
                require_finite(state)
            except CheckpointError as error:
                raise StudyError([f"the exported system's {part}: {error}"]) from error
        self._is_finite = True

    @property
    def window_seconds(self) -> float:
        """The longest recording that the encoder can take as a whole."""
        return self.encoder.window_seconds

    def transcribe(
        self,
        recordings: Iterable[str | Path | Samples],
        batch_size: int | None = None,
        beams: int | None = None,
        language: Language = None,
    ) -> list[str]:
        """Transcribe recordings of any length, each a file or samples at 16 kHz; transcripts are in the same order.

        `batch_size` and `beams`: default: the values that the study decoded test with. On a CPU, the transcripts of the same
        recordings in the same order repeat the study's bit for bit; in other batches, rounding can change the last bit of the
        arithmetic, and so a word. Raises AudioError for a recording that cannot be used.
        """
        found = self.segments(recordings, batch_size, beams, language)
        return [" ".join(s.text for s in segments if s.text) for segments in found]

    def segments(
        self,
        recordings: Iterable[str | Path | Samples],
        batch_size: int | None = None,
        beams: int | None = None,
        language: Language = None,
    ) -> list[list[Segment]]:
        """As `transcribe`, in segments: a recording longer than a window is cut where it is quietest. Raises AudioError."""
        samples = [checked_samples(r) if isinstance(r, np.ndarray) else read_audio(Path(r)) for r in recordings]
        parts = [(n, start, end) for n, s in enumerate(samples) for start, end in windows(s, self._window_samples())]
        languages = _of_each(language, len(samples))
        spoken = [languages[n] for n, _, _ in parts]
        hypotheses = self.decode([samples[n][start:end] for n, start, end in parts], batch_size, beams, spoken)
        segments: list[list[Segment]] = [[] for _ in samples]
        for (n, start, end), hypothesis in zip(parts, hypotheses, strict=True):
            text = " ".join(hypothesis.text.split())
            segments[n].append(Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, text, hypothesis.reached_limit))
        return segments

    def _window_samples(self) -> int:
        """Samples in a window: the padded recording must fit, too."""
        block = self.settings.pad_to_seconds or 0.0
        seconds = math.floor(self.window_seconds / block) * block if block else self.window_seconds
        return int(seconds * SAMPLE_RATE)

    @torch.inference_mode()
    def decode(
        self, parts: Sequence[Samples], batch_size: int | None = None, beams: int | None = None, language: Language = None
    ) -> list[Hypothesis]:
        """The LLM's text and number of tokens for each part. A part is at most one window long.

        The batches are those that a trial of the study makes of the same recordings (see `training.states` and
        `training.decode`), so that rounding is the same. Raises ValueError for a part longer than a window, StudyError where
        weights are not finite.
        """
        self._require_finite()
        decoding, dtype = self.settings.decoding, getattr(torch, self.settings.dtype)
        beams = beams or decoding.test_beams or decoding.beams
        decoder, languages = Decoder(self.reader, decoding, self.device, dtype, beams), _of_each(language, len(parts))
        states = self._encoder_states(parts, dtype)
        hypotheses: dict[int, Hypothesis] = {}
        for batch in by_length([len(s) for s in states], batch_size or decoding.batch_size):
            limits = [decoder.limit(len(parts[i]) / SAMPLE_RATE) for i in batch]
            hidden, lengths = self._pad_batch([states[i] for i in batch])
            hypotheses |= zip(batch, decoder.generate(hidden, lengths, limits, [languages[i] for i in batch]), strict=True)
        return [hypotheses[i] for i in range(len(parts))]

    def _encoder_states(self, parts: Sequence[Samples], dtype: torch.dtype) -> list[torch.Tensor]:
        """The encoder's output for each part, (T, D), on the CPU.

        As in a study, the layers that its candidates share come first, for all parts; then the others, in batches of their own.
        """
        shared, states, read = self.settings.shared_layers, [torch.empty(0)] * len(parts), [0] * len(parts)
        for batch in by_length([len(p) for p in parts], ENCODING_BATCH):
            features, frames = self.log_mels([parts[i] for i in batch])
            with arithmetic(self.device, dtype):
                hidden, lengths = self.encoder.first_layers(features, frames, shared)
            for i, row, length in zip(batch, hidden.to("cpu", dtype), lengths.tolist(), strict=True):
                states[i], read[i] = row[: self.encoder.computed(length)].clone(), length
        for batch in by_length(read, ENCODING_BATCH):
            hidden, _ = self._pad_batch([states[i] for i in batch])
            lengths = torch.tensor([read[i] for i in batch], device=self.device)
            with arithmetic(self.device, dtype):
                hidden = self.encoder.last_layers(hidden, lengths, shared)
            for i, rows in zip(batch, _unpad(hidden.to("cpu", dtype), lengths), strict=True):
                states[i] = rows
        return states

    def _pad_batch(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (T, D) -> (B, T, D) padded with zeros, lengths (B,), on the system's device."""
        lengths = torch.tensor([len(s) for s in states], device=self.device)
        return torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(self.device), lengths

    def log_mels(self, parts: Sequence[Samples]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, M, F), padded with zeros, and each part's frames (B,), on the system's device."""
        cpu = torch.device("cpu")
        return batch_of([features_of(self.encoder, p, self.settings.pad_to_seconds, cpu) for p in parts], self.device)

    @torch.inference_mode()
    def encode(self, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder alone: (B, M, F), frames (B,) -> states (B, T, D), lengths (B,)."""
        with arithmetic(self.device, getattr(torch, self.settings.dtype)):
            return self.encoder.encode(features, frames)


def windows(samples: Samples, longest: int) -> list[tuple[int, int]]:
    """Cut a recording into parts (first sample, end) of at most `longest` samples, each ending at a quiet place.

    That is the middle of the quietest 20 ms among a part's last `QUIET_SECONDS` (at most half of the part). The last
    part has at least `LAST_PART_SECONDS`, or a quarter of `longest` if that is less.
    """
    cuts, start = [], 0
    least = min(longest // 4, int(LAST_PART_SECONDS * SAMPLE_RATE))
    while len(samples) - start > longest:
        end = min(start + longest, len(samples) - least)
        tail = samples[end - min(longest // 2, int(QUIET_SECONDS * SAMPLE_RATE)) : end]
        count = len(tail) // FRAME
        loudness = (tail[len(tail) - count * FRAME :].reshape(count, FRAME) ** 2).mean(1)
        quiet = end - (count - int(loudness.argmin())) * FRAME + FRAME // 2
        cuts.append((start, quiet))
        start = quiet
    return [*cuts, (start, len(samples))]


def _of_each(language: Language, count: int) -> list[str | None]:
    """The language of each of `count` recordings. Raises ValueError for a list of another length."""
    languages = [language] * count if language is None or isinstance(language, str) else list(language)
    if len(languages) != count:
        raise ValueError(f"language must be one, or one for each of the {count} recordings, got {len(languages)}")
    return languages


def _unpad(hidden: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """(B, T, D), lengths (B,) -> copies of the rows, (T, D) each, without their padding."""
    return [row[:length].clone() for row, length in zip(hidden, lengths.tolist(), strict=True)]
