"""An exported speech-LLM, in a folder or on the hub: load it, transcribe with it, save it again.

    asr = SlamAsr.from_pretrained("export")
    asr.transcribe(["a.wav", "b.flac"])

The folder holds `encoder/` (plain Whisper weights and their feature extractor), `projector.safetensors`, `adapter/` (in peft's
format, where there is a LoRA), `llm/` (unless the LLM is only named), `tokenizer/`, and `slam.json` (`Settings`).

Shapes: B batch, M mel bins, F mel frames, T encoder positions, D encoder width.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import save_file
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.asr.parts import (
    PROJECTOR,
    SETTINGS,
    Settings,
    load_base_llm,
    load_encoder_part,
    load_projector,
    local_folder,
    part_states,
    read_settings,
    require_own_parts,
    require_own_tokenizer,
    save_adapter,
    save_base_llm,
    tokenizer_digest,
    with_adapter,
)
from prunesearch.model.checkpoint import require_finite
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.digest import sampled_digest
from prunesearch.model.encoder import encode
from prunesearch.model.slam import SpeechLlm
from prunesearch.speech.audio import SAMPLE_RATE, checked_samples, read_audio
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically
from prunesearch.training.batches import by_length
from prunesearch.training.decode import Decoder, Hypothesis, token_limit
from prunesearch.training.device import arithmetic
from prunesearch.training.states import ENCODING_BATCH, batch_of, first_layers, last_layers, log_mel, window_seconds

QUIET_SECONDS = 5.0  # a long recording is cut at the quietest place within this time before a window's end
LAST_PART_SECONDS = 0.5  # from less than a short word, an LLM makes words up
FRAME = SAMPLE_RATE // 50  # samples whose loudness is compared: 20 ms

Samples = NDArray[np.float32]


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
class SlamAsr:
    """A speech recogniser: encoder, projector and LLM on one device."""

    encoder: WhisperEncoder
    extractor: Any  # the encoder's feature extractor
    slam: SpeechLlm
    settings: Settings
    device: torch.device
    _is_finite: bool = field(default=False, repr=False)  # whether all weights are known to be finite

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        llm: str | Path | None = None,
    ) -> "SlamAsr":
        """Load a folder that `prunesearch export` wrote, or a hub repository with the same content.

        `device`: default is the first GPU, else the CPU. `llm`: a folder or hub name of the LLM, for a system that was
        exported without it. Only safetensors are read, and no code that comes with a model is run.
        Raises StudyError when the folder is no exported system, or a part of it is missing or cannot be loaded.
        """
        folder = local_folder(source, revision)
        settings = read_settings(folder, source)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        encoder, extractor = load_encoder_part(folder, settings)
        base = load_base_llm(folder, source, settings, llm).to(where)
        model = with_adapter(base, folder, settings)
        width = base.model.get_input_embeddings().embedding_dim
        projector = load_projector(folder, settings, encoder.config.d_model, width)
        require_own_tokenizer(folder, source, settings)
        states = part_states(encoder, projector, base, model)
        require_own_parts(source, settings, states, llm_is_own=llm is None and (folder / "llm").is_dir())
        slam = SpeechLlm(projector.to(where), base, model)
        return cls(encoder.to(where), extractor, slam, settings.without_paths(), where)

    def save_pretrained(self, folder: str | Path, with_llm: bool = True) -> None:
        """Write the system so that `from_pretrained` reads it, without any path of this machine.

        `with_llm=False` writes only the LLM's name (a merged LLM is always written). Raises StudyError where weights are not
        finite.
        """
        self._require_finite()
        folder, settings = Path(folder), self.settings.without_paths()
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save_pretrained(folder / "encoder")
        self.extractor.save_pretrained(folder / "encoder")
        weights = {name: p.detach().cpu().contiguous() for name, p in self.slam.projector.state_dict().items()}
        save_file(weights, folder / PROJECTOR)
        self.slam.llm.tokenizer.save_pretrained(folder / "tokenizer")
        if isinstance(self.slam.model, PeftModel):
            save_adapter(self.slam.model, folder / "adapter", settings.llm.model)
        if with_llm or settings.merged:
            save_base_llm(self.slam.model, folder / "llm")
        states = part_states(self.encoder, self.slam.projector, self.slam.llm, self.slam.model)
        digests = {part: sampled_digest(state) for part, state in states.items()}
        settings = settings.model_copy(update={"parts": digests | tokenizer_digest(folder)})
        write_atomically(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")

    def _require_finite(self) -> None:
        """Raises StudyError where weights are not finite. It reads all of them, so it is done before their first use only."""
        if self._is_finite:
            return
        for part, state in part_states(self.encoder, self.slam.projector, self.slam.llm, self.slam.model).items():
            try:
                require_finite(state)
            except CheckpointError as error:
                raise StudyError([f"the exported system's {part}: {error}"]) from error
        self._is_finite = True

    def push_to_hub(self, repo_id: str, private: bool | None = None, **kwargs: Any) -> Any:
        """Save, and upload as one commit, as transformers' models do. `kwargs` go to `HfApi.upload_folder`."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    @property
    def window_seconds(self) -> float:
        """The longest recording that the encoder can take as a whole."""
        return window_seconds(self.encoder, self.extractor)

    def transcribe(
        self, recordings: Iterable[str | Path | Samples], batch_size: int | None = None, beams: int | None = None
    ) -> list[str]:
        """Transcribe recordings of any length, each a file or samples at 16 kHz; transcripts are in the same order.

        `batch_size` and `beams`: default: the values that the study decoded test with. On a CPU, the transcripts of the same
        recordings in the same order repeat the study's bit for bit; in other batches, rounding can change the last bit of the
        arithmetic, and so a word. Raises AudioError for a recording that cannot be used.
        """
        return [" ".join(s.text for s in segments if s.text) for segments in self.segments(recordings, batch_size, beams)]

    def segments(
        self, recordings: Iterable[str | Path | Samples], batch_size: int | None = None, beams: int | None = None
    ) -> list[list[Segment]]:
        """As `transcribe`, in segments: a recording longer than a window is cut where it is quietest. Raises AudioError."""
        samples = [checked_samples(r) if isinstance(r, np.ndarray) else read_audio(Path(r)) for r in recordings]
        parts = [(n, start, end) for n, s in enumerate(samples) for start, end in windows(s, self._window_samples())]
        hypotheses = self.decode([samples[n][start:end] for n, start, end in parts], batch_size, beams)
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
    def decode(self, parts: Sequence[Samples], batch_size: int | None = None, beams: int | None = None) -> list[Hypothesis]:
        """The LLM's text and number of tokens for each part. A part is at most one window long.

        The batches are those that a trial of the study makes of the same recordings (see `training.states` and
        `training.decode`), so that rounding is the same. Raises ValueError for a part longer than a window, StudyError where
        weights are not finite.
        """
        self._require_finite()
        decoding, dtype = self.settings.decoding, getattr(torch, self.settings.dtype)
        beams = beams or decoding.test_beams or decoding.beams
        decoder = Decoder(self.slam, decoding, self.device, dtype, beams)
        states = self._encoder_states(parts, dtype)
        hypotheses: dict[int, Hypothesis] = {}
        for batch in by_length([len(s) for s in states], batch_size or decoding.batch_size):
            limits = [token_limit(len(parts[i]) / SAMPLE_RATE, decoding) for i in batch]
            hidden, lengths = self._pad_batch([states[i] for i in batch])
            hypotheses |= zip(batch, decoder.generate(hidden, lengths, limits), strict=True)
        return [hypotheses[i] for i in range(len(parts))]

    def _encoder_states(self, parts: Sequence[Samples], dtype: torch.dtype) -> list[torch.Tensor]:
        """The encoder's output for each part, (T, D), on the CPU.

        As in a study, the layers that its candidates share come first, for all parts; then the others, in batches of their own.
        """
        shared, states = self.settings.shared_layers, [torch.empty(0)] * len(parts)
        for batch in by_length([len(p) for p in parts], ENCODING_BATCH):
            features, frames = self.log_mels([parts[i] for i in batch])
            with arithmetic(self.device, dtype):
                hidden, lengths = first_layers(self.encoder, features, frames, shared)
            for i, rows in zip(batch, _unpad(hidden.to("cpu", dtype), lengths), strict=True):
                states[i] = rows
        for batch in by_length([len(s) for s in states], ENCODING_BATCH):
            hidden, lengths = self._pad_batch([states[i] for i in batch])
            with arithmetic(self.device, dtype):
                hidden = last_layers(self.encoder, hidden, lengths, shared)
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
        return batch_of([log_mel(self.extractor, p, self.settings.pad_to_seconds, cpu) for p in parts], self.device)

    @torch.inference_mode()
    def encode(self, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder alone: (B, M, F), frames (B,) -> states (B, T, D), lengths (B,)."""
        with arithmetic(self.device, getattr(torch, self.settings.dtype)):
            return encode(self.encoder, features, frames)


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


def _unpad(hidden: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """(B, T, D), lengths (B,) -> copies of the rows, (T, D) each, without their padding."""
    return [row[:length].clone() for row, length in zip(hidden, lengths.tolist(), strict=True)]
