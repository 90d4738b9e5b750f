"""A whole speech-LLM, in a folder or on the hub: encoder, projector, LLM, LoRA. Load it, transcribe with it, hand it on.

    asr = SlamAsr.from_pretrained("export")
    asr.transcribe(["a.wav", "b.flac"])

The folder holds `encoder/` (plain Whisper weights and its feature extractor), `projector.safetensors`, `adapter/` (peft's
format, where there is a LoRA), `llm/` (the LLM, where it is not named as one of the hub's, or is merged), `tokenizer/`, and
`slam.json`, which says how they go together.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import encode, load_encoder
from prunesearch.model.llm import load_llm
from prunesearch.model.projector import Projector
from prunesearch.model.slam import SpeechLlm
from prunesearch.speech.audio import SAMPLE_RATE, read_audio
from prunesearch.study.config import DecodingConfig, LlmConfig, ProjectorConfig, TextConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import write_atomically
from prunesearch.training.batches import by_length
from prunesearch.training.decode import Decoder, Hypothesis, token_limit
from prunesearch.training.device import arithmetic
from prunesearch.training.states import ENCODING_BATCH, batch_of, first_layers, last_layers, log_mel

SETTINGS = "slam.json"
QUIET_SECONDS = 5.0  # a long recording is cut where it is quietest, within so many seconds of a window's end
FRAME = SAMPLE_RATE // 50

Samples = NDArray[np.float32]


class Settings(BaseModel):
    """How the parts go together: what `slam.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    dtype: Literal["float32", "bfloat16"]  # what was computed in
    removed_layers: tuple[int, ...]
    encoder_layers: int  # of the unpruned encoder
    shared_layers: int = 0  # the first so many, which a study's candidates share
    lora_rank: int
    merged: bool = False  # the LoRA is in the LLM's weights
    projector: ProjectorConfig
    llm: LlmConfig
    decoding: DecodingConfig
    text: TextConfig = TextConfig()
    pad_to_seconds: float | None = None


@dataclass(frozen=True)
class Segment:
    """A part of a recording, in seconds, and what was said in it."""

    start: float
    end: float
    text: str


@dataclass
class SlamAsr:
    """Audio in, text out."""

    encoder: WhisperEncoder
    extractor: Any
    slam: SpeechLlm
    settings: Settings
    device: torch.device

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, device: str | torch.device | None = None
    ) -> "SlamAsr":
        """Load a folder that `prunesearch export` wrote, or a hub repository with the same content.

        `device`: by default the first GPU, else the CPU. Raises StudyError when it is no such folder.
        """
        folder = _local(source, revision)
        if not (folder / SETTINGS).is_file():
            raise StudyError([f"{source} is no exported system: it holds no {SETTINGS}; `prunesearch export STUDY` writes one"])
        settings = Settings.model_validate_json((folder / SETTINGS).read_text(encoding="utf-8"))
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, settings.dtype)
        encoder = load_encoder(folder / "encoder", None, dtype).requires_grad_(False).eval().to(where)
        extractor = AutoFeatureExtractor.from_pretrained(folder / "encoder")
        base = folder / "llm" if (folder / "llm").is_dir() else settings.llm.model
        llm = load_llm(base, settings.llm, dtype, folder / "tokenizer")
        if settings.llm.quantization is None:
            llm.model.to(where)
        model: Any = llm.model
        if (folder / "adapter").is_dir():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's old name for it
                model = PeftModel.from_pretrained(llm.model, str(folder / "adapter")).eval()
        own = settings.projector
        width = llm.model.get_input_embeddings().embedding_dim
        projector = Projector(encoder.config.d_model, width, own.stack, own.hidden, own.dropout)
        projector.load_state_dict(load_file(folder / "projector.safetensors"))
        return cls(encoder, extractor, SpeechLlm(projector.eval().to(where), llm, model), settings, where)

    def save_pretrained(self, folder: str | Path, with_llm: bool = True) -> None:
        """Write the system so that `from_pretrained` reads it; `with_llm=False` only names the LLM it stands on."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save_pretrained(folder / "encoder")
        self.extractor.save_pretrained(folder / "encoder")
        weights = {name: p.detach().cpu().contiguous() for name, p in self.slam.projector.state_dict().items()}
        save_file(weights, folder / "projector.safetensors")
        llm = self.slam.llm
        llm.tokenizer.save_pretrained(folder / "tokenizer")
        if isinstance(self.slam.model, PeftModel):
            self.slam.model.save_pretrained(str(folder / "adapter"))
        if with_llm or self.settings.merged:
            bare = self.slam.model
            state: dict[str, Any] | None = None
            if isinstance(bare, PeftModel):  # peft has put its layers around the LLM's own
                bare = bare.get_base_model()
                state = {k.replace(".base_layer", ""): v for k, v in bare.state_dict().items() if ".lora_" not in k}
            bare.save_pretrained(folder / "llm", state_dict=state)
        write_atomically(folder / SETTINGS, self.settings.model_dump_json(indent=1) + "\n")

    def push_to_hub(self, repo_id: str, private: bool | None = None, **kwargs: Any) -> Any:
        """Save, and upload as one commit; as transformers' models do it. `kwargs` go to `HfApi.upload_folder`."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    @property
    def window_seconds(self) -> float:
        """The longest recording that the encoder takes whole."""
        return self.encoder.max_source_positions * 2 * self.extractor.hop_length / SAMPLE_RATE

    def transcribe(
        self, recordings: Iterable[str | Path | Samples], batch_size: int | None = None, beams: int | None = None
    ) -> list[str]:
        """What is said in each recording (a file, or samples at 16 kHz), in their order.

        `batch_size` and `beams`: by default those that the study decoded its test split with. What a study decoded is
        repeated bit for bit on a CPU where the recordings are the same, in the same order: in bf16 or fp32 arithmetic, who
        shares a batch with whom can change the last bit. Raises AudioError for a recording that cannot be used.
        """
        return [" ".join(s.text for s in segments if s.text) for segments in self.segments(recordings, batch_size, beams)]

    def segments(
        self, recordings: Iterable[str | Path | Samples], batch_size: int | None = None, beams: int | None = None
    ) -> list[list[Segment]]:
        """The same in parts: a long recording is cut into windows where it is quietest. Raises AudioError."""
        samples = [r if isinstance(r, np.ndarray) else read_audio(Path(r)) for r in recordings]
        parts = [(n, start, end) for n, s in enumerate(samples) for start, end in windows(s, self._longest())]
        heard = self.hear([samples[n][start:end] for n, start, end in parts], batch_size, beams)
        found: list[list[Segment]] = [[] for _ in samples]
        for (n, start, end), written in zip(parts, heard, strict=True):
            found[n].append(Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, " ".join(written.text.split())))
        return found

    def _longest(self) -> int:
        """Samples in a window: what padding adds must fit, too."""
        block = self.settings.pad_to_seconds or 0.0
        seconds = math.floor(self.window_seconds / block) * block if block else self.window_seconds
        return int(seconds * SAMPLE_RATE)

    @torch.inference_mode()
    def hear(self, parts: Sequence[Samples], batch_size: int | None = None, beams: int | None = None) -> list[Hypothesis]:
        """What the LLM writes for each part, in the batches that a study's trial makes of the same recordings: see
        `training.features` and `training.decode`. Raises ValueError for a part that is longer than a window."""
        decoding, dtype = self.settings.decoding, getattr(torch, self.settings.dtype)
        beams = beams or decoding.test_beams or decoding.beams
        decoder = Decoder(self.slam, decoding, self.device, dtype, beams)
        states = self._states(parts, dtype)
        found: dict[int, Hypothesis] = {}
        for batch in by_length([len(s) for s in states], batch_size or decoding.batch_size):
            limits = [token_limit(len(parts[i]) / SAMPLE_RATE, decoding) for i in batch]
            hidden, lengths = self._together([states[i] for i in batch])
            found |= zip(batch, decoder.generate(hidden, lengths, limits), strict=True)
        return [found[i] for i in range(len(parts))]

    def _states(self, parts: Sequence[Samples], dtype: torch.dtype) -> list[torch.Tensor]:
        """The encoder's output for each part, (T, D) each, on the CPU: first the layers that a study's candidates share, then
        the others, in batches of their own."""
        shared, states = self.settings.shared_layers, [torch.empty(0)] * len(parts)

        def keep(batch: list[int], hidden: torch.Tensor, lengths: torch.Tensor) -> None:
            for row, i, length in zip(hidden.to("cpu", dtype), batch, lengths.tolist(), strict=True):
                states[i] = row[:length].clone()

        for batch in by_length([len(p) for p in parts], ENCODING_BATCH):
            features, frames = self.log_mels([parts[i] for i in batch])
            with arithmetic(self.device, dtype):
                keep(batch, *first_layers(self.encoder, features, frames, shared))
        for batch in by_length([len(s) for s in states], ENCODING_BATCH):
            hidden, lengths = self._together([states[i] for i in batch])
            with arithmetic(self.device, dtype):
                keep(batch, last_layers(self.encoder, hidden, lengths, shared), lengths)
        return states

    def _together(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D) padded with zeros, lengths (B,)."""
        lengths = torch.tensor([len(s) for s in states], device=self.device)
        return torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(self.device), lengths

    def log_mels(self, parts: Sequence[Samples]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, M, F) of a batch, padded with zeros, and the frames of each part (B,)."""
        cpu = torch.device("cpu")
        return batch_of([log_mel(self.extractor, p, self.settings.pad_to_seconds, cpu) for p in parts], self.device)

    @torch.inference_mode()
    def encode(self, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder alone: (B, M, F), frames (B,) -> states (B, T, D), lengths (B,)."""
        with arithmetic(self.device, getattr(torch, self.settings.dtype)):
            return encode(self.encoder, features, frames)


def windows(samples: Samples, longest: int) -> list[tuple[int, int]]:
    """Where to cut: parts of at most `longest` samples, each ending where the last seconds before that are quietest."""
    cuts, start = [], 0
    while len(samples) - start > longest:
        tail = samples[start + longest - min(longest // 2, int(QUIET_SECONDS * SAMPLE_RATE)) : start + longest]
        count = len(tail) // FRAME
        loudness = (tail[len(tail) - count * FRAME :].reshape(count, FRAME) ** 2).mean(1)
        quiet = start + longest - (count - int(loudness.argmin())) * FRAME + FRAME // 2
        cuts.append((start, quiet))
        start = quiet
    return [*cuts, (start, len(samples))]


def _local(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or a snapshot of the hub's repository of that name."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first = str(error).splitlines()[0]
        raise StudyError([f"{source} is neither a folder nor a repository that can be had ({first})"]) from None
