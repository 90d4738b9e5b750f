"""The parts of an exported folder: their settings, and each part read back or refused in one line.

See `asr.slam_asr` for what lies in the folder.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError

from prunesearch.model.checkpoint import library_errors, read_tensors, require_finite, require_same
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.digest import DIGITS, sampled_digest
from prunesearch.model.encoder import WhisperLayers
from prunesearch.model.hub import explain_loading, is_local, name_without_path
from prunesearch.model.llm import Llm, load_llm, lora_parameters, state_without_lora
from prunesearch.model.loading import load_encoder_and_extractor
from prunesearch.model.projector import Projector
from prunesearch.model.system import SpeechProjector
from prunesearch.study.config import DecodingConfig, TextConfig
from prunesearch.study.errors import StudyError, describe_validation_error
from prunesearch.study.model_config import LlmConfig, ProjectorConfig

SETTINGS, PROJECTOR, ADAPTER = "slam.json", "projector.safetensors", "adapter_model.safetensors"
UNREAD = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl"]  # never downloaded: an export needs neither code nor pickles
HUB_NAME = r"[\w.-]+/[\w.-]+"
PARTS = ("encoder", "tokenizer", PROJECTOR)  # of every export; adapter and LLM depend on its settings

Loaded = TypeVar("Loaded")


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
    parts: dict[str, str] = {}  # digest of each part; exports of earlier versions have none, and theirs are not compared

    def without_paths(self) -> "Settings":
        """The same for another machine: of an LLM in a local folder, only the folder's base name."""
        local = self.llm_is_local or is_local(self.llm.model)
        llm = self.llm.model_copy(update={"model": name_without_path(self.llm.model)})
        return self.model_copy(update={"format": 2, "llm": llm, "llm_is_local": local})


def part_states(
    encoder: WhisperLayers, projector: SpeechProjector, llm: Llm, model: Any
) -> dict[str, Mapping[str, torch.Tensor]]:
    """Each part's weights as they are in memory. By their `sampled_digest`, a part of another export is recognised.

    model: the LLM of `llm`, with or without LoRA. A quantised LLM is left out: its values depend on the GPU.
    """
    states: dict[str, Mapping[str, torch.Tensor]] = {
        "encoder": encoder.module.state_dict(),
        "projector": projector.state_dict(),
    }
    if adapter := lora_parameters(model):
        states["adapter"] = adapter
    if not llm.quantized:
        states["llm"] = state_without_lora(model)
    return states


def tokenizer_digest(folder: Path) -> dict[str, str]:
    """The digest of an export's tokenizer file, as one of its parts; empty for a tokenizer that is stored otherwise."""
    file = folder / "tokenizer" / "tokenizer.json"
    return {"tokenizer": hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]} if file.is_file() else {}


def require_own_parts(
    source: str | Path, settings: Settings, states: Mapping[str, Mapping[str, torch.Tensor]], llm_is_own: bool
) -> None:
    """Raises StudyError where a part that was loaded is not the one that the export was written with.

    llm_is_own: whether the LLM lies in the export; otherwise, its name or a folder was given.
    """
    for part, state in states.items():
        if settings.parts.get(part, digest := sampled_digest(state)) == digest:
            continue
        name = {"projector": PROJECTOR}.get(part, f"{part}/")
        _named(Path(source) / name, partial(require_finite, state))  # the better reason, where it is one
        if part == "llm" and not llm_is_own:
            raise StudyError(
                [
                    f"{source}: its LLM must have the weights that it was trained with, got others: give the folder or "
                    f"revision of {settings.llm.model} that the study used"
                ]
            )
        raise _foreign(source, name)


def require_own_tokenizer(folder: Path, source: str | Path, settings: Settings) -> None:
    """Raises StudyError where the tokenizer is not the one that the export was written with."""
    for part, digest in tokenizer_digest(folder).items():
        if settings.parts.get(part, digest) != digest:
            raise _foreign(source, "tokenizer/")


def _foreign(source: str | Path, name: str) -> StudyError:
    line = f"{source} has parts of different exports: {name} is not the one that belongs to {SETTINGS}"
    return StudyError([f"{line}; copy or export it again"])


def local_folder(source: str | Path, revision: str | None) -> Path:
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


def read_settings(folder: Path, source: str | Path) -> Settings:
    """The content of `slam.json`. Raises StudyError where it or a part that every export has is missing or damaged."""
    if not (folder / SETTINGS).is_file():
        raise StudyError([f"{source} is no exported system: it has no {SETTINGS}; `prunesearch export STUDY` writes one"])
    if missing := [part for part in PARTS if not (folder / part).exists()]:
        raise StudyError([f"{source} is an incomplete export: it has no {missing[0]}; copy or export it again"])
    try:
        raw = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings = Settings.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        lines = describe_validation_error(error, raw, Settings)
        raise StudyError([f"{folder / SETTINGS} is not as this version writes it: {line}" for line in lines]) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise StudyError([f"{folder / SETTINGS} is damaged ({error}): copy or export it again"]) from None
    has_adapter, needs_adapter = (folder / "adapter").exists(), settings.lora_rank > 0 and not settings.merged
    if has_adapter and not needs_adapter:
        state = "a LoRA that is merged into the LLM" if settings.merged else "no LoRA"
        raise StudyError([f"{source} has parts of different exports: {SETTINGS} says {state}, and there is an adapter/"])
    if needs_adapter and not (folder / "adapter" / ADAPTER).is_file():  # peft would go on to adapter_model.bin, a pickle
        raise StudyError(
            [
                f"{folder / 'adapter'} must hold the LoRA as {ADAPTER}, since {SETTINGS} says rank {settings.lora_rank}; "
                "other formats are not read: copy or export it again"
            ]
        )
    return settings


def _named(path: Path, load: Callable[[], Loaded]) -> Loaded:
    """What `load` returns. Raises StudyError that begins with `path` where it cannot load."""
    try:
        return load()
    except StudyError:  # a ValueError, too, but it has its lines already
        raise
    except (OSError, ValueError) as error:
        raise StudyError(explain_loading(str(path), None, error)) from error


def load_encoder_part(folder: Path, settings: Settings) -> WhisperLayers:
    """The encoder with its feature extractor. Raises StudyError where they cannot be loaded or do not fit."""
    path = folder / "encoder"
    encoder = _named(path, lambda: load_encoder_and_extractor(path, None, getattr(torch, settings.dtype)))
    depth = settings.encoder_layers - len(settings.removed_layers)
    if encoder.depth != depth:
        raise StudyError([f"{path} must have {depth} layers, as {SETTINGS} says, got {encoder.depth}: export it again"])
    return encoder


def load_projector(folder: Path, settings: Settings, encoder_width: int, llm_width: int) -> Projector:
    """The projector, between an encoder and an LLM of these widths. Raises StudyError where its weights do not fit."""
    projector = Projector.for_models(settings.projector, encoder_width, llm_width)
    path = folder / PROJECTOR

    def load() -> None:
        weights = read_tensors(path)
        require_same(weights, projector.state_dict(), "the projector between this encoder and this LLM: the file")
        projector.load_state_dict(weights)

    _named(path, load)
    return projector.eval()


def load_base_llm(folder: Path, source: str | Path, settings: Settings, given: str | Path | None) -> Llm:
    """The LLM, without LoRA, with the export's tokenizer. Raises StudyError where it is missing or cannot be loaded."""
    llm, config = _llm_source(folder, source, settings, given), settings.llm
    if given is not None:
        config = config.model_copy(update={"revision": None})  # the revision belongs to the LLM that the export names
    try:
        return load_llm(llm, config, getattr(torch, settings.dtype), folder / "tokenizer")
    except StudyError:
        raise
    except (OSError, ValueError) as error:
        path = f"/path/to/{Path(llm).name}"
        give = f'give a local folder instead: --llm {path}, in Python SlamAsr.from_pretrained("{source}", llm="{path}")'
        first, *more = explain_loading(llm, config.revision, error, give)
        raise StudyError([f"{source}: its LLM: {first}", *more]) from error


def _llm_source(folder: Path, source: str | Path, settings: Settings, given: str | Path | None) -> str:
    """The folder or hub name to load the LLM from. Raises StudyError where the export neither has it nor can name it."""
    if given is not None and settings.merged:
        raise StudyError([f"llm: {source} has its LoRA merged into the LLM, which must be its own: leave llm out"])
    if given is not None:
        return str(given)
    if (folder / "llm").is_dir():
        return str(folder / "llm")
    model = settings.llm.model
    a_path = is_local(model) or (settings.format == 1 and not re.fullmatch(HUB_NAME, model))  # 1 holds relative paths, too
    if settings.llm_is_local or settings.merged or (a_path and not Path(model).is_dir()):
        name = name_without_path(model)
        raise StudyError(
            [
                f"{source}: its LLM {name} was a local folder and is not part of the export: give it with "
                f'--llm /path/to/{name}, in Python as SlamAsr.from_pretrained("{source}", llm="/path/to/{name}"); '
                f"or repeat `prunesearch export` with --llm, which writes the LLM, too"
            ]
        )
    return model


def with_adapter(llm: Llm, folder: Path, settings: Settings) -> Any:
    """The LLM with the export's LoRA, or the LLM itself where there is none. Raises StudyError where the LoRA does not fit."""
    if settings.lora_rank == 0 or settings.merged:
        return llm.model
    rank, alpha = settings.lora_rank, settings.llm.lora_alpha_per_rank
    return load_adapter(llm.model, folder / "adapter", rank, alpha, SETTINGS)


def load_adapter(model: Any, folder: Path, rank: int, alpha_per_rank: float, settings: str) -> PeftModel:
    """The model with a LoRA of this rank, as the file `settings` says. Raises StudyError where the LoRA does not fit."""
    return _named(folder, lambda: _load_adapter(model, folder, {"r": rank, "lora_alpha": rank * alpha_per_rank}, settings))


def _load_adapter(base: Any, folder: Path, expected: Mapping[str, float], settings: str) -> PeftModel:
    """Raises CheckpointError where the LoRA is damaged, or another one than the settings say."""
    stored = read_tensors(folder / ADAPTER)
    with library_errors("adapter_config.json cannot be used"):
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
    for key, value in expected.items():
        if (got := getattr(config, key, None)) != value:
            raise CheckpointError(
                f"{key} in adapter_config.json must be {value}, as {settings} says, got {got}: export it again"
            )
    with library_errors("the LoRA does not fit the LLM"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses transformers' old name
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # compared below
        model = PeftModel.from_pretrained(base, str(folder), config=config, ignore_mismatched_sizes=True).eval()
    own = {name.replace(".default.", "."): tensor for name, tensor in lora_parameters(model).items()}  # peft's stored names
    require_same(stored, own, f"the LoRA does not fit the LLM: {ADAPTER}")
    return model


def save_adapter(model: PeftModel, folder: Path, llm_name: str) -> None:
    """Write the LoRA, naming the LLM that it belongs to."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = llm_name  # peft has put the path of the folder here
    model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would look up the LLM by its name on the hub
    (folder / "README.md").unlink(missing_ok=True)  # an empty template that holds the LLM's path


def save_base_llm(model: Any, folder: Path) -> None:
    """Write the LLM without its LoRA, under the names that transformers gives its tensors."""
    if isinstance(model, PeftModel):
        model.get_base_model().save_pretrained(folder, state_dict=state_without_lora(model))
    else:
        model.save_pretrained(folder)
