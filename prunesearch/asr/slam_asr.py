"""An exported speech-LLM, in a folder or on the hub: load it, transcribe with it, save it again.

    asr = SlamAsr.from_pretrained("export")
    asr.transcribe(["a.wav", "b.flac"])

The folder holds `encoder/` (plain Whisper weights and their feature extractor), `projector.safetensors`, `adapter/` (in peft's
format, where there is a LoRA), `llm/` (unless the LLM is only named), `tokenizer/`, and `slam.json` (`Settings`).

Shapes: B batch, M mel bins, F mel frames, T encoder positions, D encoder width.
"""

import math
import tempfile
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
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import encode
from prunesearch.model.hub import explain_loading, is_local, name_without_path
from prunesearch.model.llm import Llm, load_llm
from prunesearch.model.loading import load_encoder_and_extractor
from prunesearch.model.projector import Projector
from prunesearch.model.slam import SpeechLlm
from prunesearch.speech.audio import SAMPLE_RATE, checked_samples, read_audio
from prunesearch.study.config import DecodingConfig, LlmConfig, ProjectorConfig, TextConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically
from prunesearch.training.batches import by_length
from prunesearch.training.decode import Decoder, Hypothesis, token_limit
from prunesearch.training.device import arithmetic
from prunesearch.training.states import ENCODING_BATCH, batch_of, first_layers, last_layers, log_mel, window_seconds

SETTINGS = "slam.json"
UNREAD = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl"]  # never downloaded: an export needs neither code nor pickles
PARTS = ("encoder", "tokenizer", "projector.safetensors")  # of every export; adapter and LLM depend on its settings
QUIET_SECONDS = 5.0  # a long recording is cut at the quietest place within this time before a window's end
LAST_PART_SECONDS = 0.5  # from less than a short word, an LLM makes words up
FRAME = SAMPLE_RATE // 50  # samples whose loudness is compared: 20 ms

Samples = NDArray[np.float32]


class Settings(BaseModel):
    """How the parts fit together: the content of `slam.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1, 2] = 2  # 1 may hold the LLM's path on the machine that wrote it
    dtype: Literal["float32", "bfloat16"]  # of all computations
    removed_layers: tuple[int, ...]
    encoder_layers: int  # of the unpruned encoder
    shared_layers: int = 0  # number of first layers that all of the study's candidates have
    lora_rank: int
    merged: bool = False  # whether the LoRA is merged into the LLM's weights
    projector: ProjectorConfig
    llm: LlmConfig
    llm_is_local: bool = False  # whether llm.model is the base name of a folder, not a hub name
    decoding: DecodingConfig
    text: TextConfig = TextConfig()
    pad_to_seconds: float | None = None

    def without_paths(self) -> "Settings":
        """The same for another machine: of an LLM in a local folder, only the folder's base name."""
        local = self.llm_is_local or is_local(self.llm.model)
        llm = self.llm.model_copy(update={"model": name_without_path(self.llm.model)})
        return self.model_copy(update={"format": 2, "llm": llm, "llm_is_local": local})


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
        folder = _local_folder(source, revision)
        settings = _read_settings(folder, source)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        encoder, extractor = _load_encoder(folder, settings)
        base = _load_base_llm(folder, source, settings, llm).to(where)
        model = _with_adapter(base, folder, settings)
        width = base.model.get_input_embeddings().embedding_dim
        projector = Projector.for_models(settings.projector, encoder.config.d_model, width)
        projector.load_state_dict(load_file(folder / "projector.safetensors"))
        slam = SpeechLlm(projector.eval().to(where), base, model)
        return cls(encoder.to(where), extractor, slam, settings.without_paths(), where)

    def save_pretrained(self, folder: str | Path, with_llm: bool = True) -> None:
        """Write the system so that `from_pretrained` reads it, without any path of this machine.

        `with_llm=False` writes only the LLM's name (a merged LLM is always written).
        """
        folder, settings = Path(folder), self.settings.without_paths()
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save_pretrained(folder / "encoder")
        self.extractor.save_pretrained(folder / "encoder")
        weights = {name: p.detach().cpu().contiguous() for name, p in self.slam.projector.state_dict().items()}
        save_file(weights, folder / "projector.safetensors")
        self.slam.llm.tokenizer.save_pretrained(folder / "tokenizer")
        if isinstance(self.slam.model, PeftModel):
            _save_adapter(self.slam.model, folder / "adapter", settings.llm.model)
        if with_llm or settings.merged:
            _save_base_llm(self.slam.model, folder / "llm")
        write_atomically(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")

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
        `training.decode`), so that rounding is the same. Raises ValueError for a part longer than a window.
        """
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


def _local_folder(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or a local snapshot of the hub's repository of that name."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, ignore_patterns=UNREAD))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first = str(error).splitlines()[0]
        raise StudyError([f"{source} is neither a folder nor a repository that can be loaded ({first})"]) from None


def _read_settings(folder: Path, source: str | Path) -> Settings:
    if not (folder / SETTINGS).is_file():
        raise StudyError([f"{source} is no exported system: it has no {SETTINGS}; `prunesearch export STUDY` writes one"])
    if missing := [part for part in PARTS if not (folder / part).exists()]:
        raise StudyError([f"{source} is an incomplete export: it has no {missing[0]}"])
    return Settings.model_validate_json((folder / SETTINGS).read_text(encoding="utf-8"))


def _load_encoder(folder: Path, settings: Settings) -> tuple[WhisperEncoder, Any]:
    """Encoder and feature extractor. Raises StudyError where they cannot be loaded."""
    try:
        return load_encoder_and_extractor(folder / "encoder", None, getattr(torch, settings.dtype))
    except (OSError, ValueError) as error:
        raise StudyError(list(explain_loading(str(folder / "encoder"), None, error))) from error


def _load_base_llm(folder: Path, source: str | Path, settings: Settings, given: str | Path | None) -> Llm:
    """The LLM, without LoRA, with the export's tokenizer. Raises StudyError where it is missing or cannot be loaded."""
    llm, config = _llm_source(folder, source, settings, given), settings.llm
    if given is not None:
        config = config.model_copy(update={"revision": None})  # the revision belongs to the LLM that the export names
    try:
        return load_llm(llm, config, getattr(torch, settings.dtype), folder / "tokenizer")
    except StudyError:
        raise
    except (OSError, ValueError) as error:
        give = f'give a local folder instead: SlamAsr.from_pretrained("{source}", llm="/path/to/{Path(llm).name}")'
        reason, fix = explain_loading(llm, config.revision, error, give)
        raise StudyError([f"{source}: its LLM: {reason}", fix]) from error


def _llm_source(folder: Path, source: str | Path, settings: Settings, given: str | Path | None) -> str:
    """The folder or hub name to load the LLM from. Raises StudyError where the export neither has it nor can name it."""
    if given is not None and settings.merged:
        raise StudyError([f"llm: {source} has its LoRA merged into the LLM, which must be its own: leave llm out"])
    if given is not None:
        return str(given)
    if (folder / "llm").is_dir():
        return str(folder / "llm")
    model = settings.llm.model
    if settings.llm_is_local or settings.merged or (is_local(model) and not Path(model).is_dir()):
        name = name_without_path(model)
        raise StudyError(
            [
                f"{source}: its LLM {name} was a local folder and is not part of the export: give it as "
                f'SlamAsr.from_pretrained("{source}", llm="/path/to/{name}"), or export once more with --llm'
            ]
        )
    return model


def _with_adapter(llm: Llm, folder: Path, settings: Settings) -> Any:
    """The LLM with the export's LoRA, or the LLM itself where there is none.

    Raises StudyError where the LoRA's weights are missing or not in safetensors.
    """
    adapter = folder / "adapter"
    if settings.lora_rank == 0 or settings.merged:
        return llm.model
    if not (adapter / "adapter_model.safetensors").is_file():  # peft would go on to adapter_model.bin, a pickle
        raise StudyError([f"{adapter} must hold the LoRA as adapter_model.safetensors; other formats are not read"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses transformers' old name
        return PeftModel.from_pretrained(llm.model, str(adapter)).eval()


def _save_adapter(model: PeftModel, folder: Path, llm_name: str) -> None:
    """Write the LoRA, naming the LLM that it belongs to."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = llm_name  # peft has put the path of the folder here
    model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would look up the LLM by its name on the hub
    (folder / "README.md").unlink(missing_ok=True)  # an empty template that holds the LLM's path


def _save_base_llm(model: Any, folder: Path) -> None:
    """Write the LLM without its LoRA, under the names that transformers gives its tensors."""
    state: dict[str, Any] | None = None
    if isinstance(model, PeftModel):  # peft has put its layers around the LLM's own
        model = model.get_base_model()
        state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}
    model.save_pretrained(folder, state_dict=state)
