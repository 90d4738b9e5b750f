"""A study file (TOML) as frozen, validated data. Defaults are set here and nowhere else."""

import hashlib
import itertools
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from prunesearch.study.candidate import Candidate, baselines
from prunesearch.study.errors import StudyError, describe_validation_error
from prunesearch.study.languages import has_spaces
from prunesearch.study.model_config import EncoderConfig, LlmConfig, ModelConfig, ModelSection, ProjectorConfig, SlamParts
from prunesearch.study.presets import overridden_keys, with_preset
from prunesearch.study.search_config import SearchConfig, most_removed
from prunesearch.study.section import Count, Fraction, Positive, Section, context_of, locate
from prunesearch.study.sources import Source

Split = Literal["train", "dev", "test", "repair"]
DEPTHS = ("encoder_layers", "num_hidden_layers")  # names of the encoder's depth in a config.json, or in its audio_config
SPLITS: tuple[Split, ...] = ("train", "dev", "test", "repair")


class DataConfig(Section):
    """The three splits, and recordings for repairs. Each is a source or a list of sources: a JSONL manifest (`audio`, `text`,
    and optionally `language`, `duration`, `id`), a Hugging Face dataset, a Common Voice release, or FLEURS."""

    train: tuple[Source, ...]
    dev: tuple[Source, ...]
    test: tuple[Source, ...]
    repair: tuple[Source, ...] = Field(
        (), description="recordings that repairs are fitted on; transcripts are not needed; default: train"
    )
    min_seconds: Annotated[float, Field(ge=0)] = 0.1
    max_seconds: Positive = 30.0
    max_train_hours: Positive | None = None
    max_train_utterances: Count | None = None
    max_dev_utterances: Count | None = None
    max_test_utterances: Count | None = None
    pad_to_seconds: Positive | None = Field(None, description="pad each recording with silence to a multiple of this")
    group: str | None = Field(None, description="column of the sources to group results by, such as speaker, accent or gender")
    skip_unreadable: bool = False

    @field_validator(*SPLITS, mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _check_splits_differ(self) -> "DataConfig":
        splits = {split: getattr(self, split) for split in SPLITS}
        for a, b in itertools.combinations(splits, 2):
            if (a, b) == ("train", "repair"):
                continue  # a repair may be fitted on train and on more
            if both := [source for source in splits[a] if source in splits[b]]:
                shown = both[0] if isinstance(both[0], str) else both[0].model_dump(exclude_defaults=True)
                raise ValueError(f"{a} and {b} must not share a source, got {shown!r} for both: give each its own")
        return self

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that have a source."""
        return tuple(split for split in SPLITS if getattr(self, split))


NormalizerName = Literal["paper", "whisper", "none"]


class TextConfig(Section):
    """`paper`: lowercase, without punctuation except apostrophes. `whisper`: Whisper's normalisers. `none`: unchanged."""

    normalizer: NormalizerName | dict[str, NormalizerName] = Field(
        "paper", description="one name, or a table of one name per language"
    )
    metric: Literal["auto", "wer", "cer"] = Field(
        "auto",
        description="errors are counted in words (wer) or in characters (cer); auto: in characters in languages that are "
        "written without spaces, such as Chinese, Japanese and Thai, else in words",
    )

    def normalizer_of(self, language: str | None) -> str:
        """The normaliser of a language; `paper` if a table does not name the language."""
        return self.normalizer if isinstance(self.normalizer, str) else self.normalizer.get(language or "", "paper")

    def unit_of(self, language: str | None) -> Literal["words", "characters"]:
        """What errors are counted in, for a language."""
        in_words = self.metric == "wer" or (self.metric == "auto" and has_spaces(language))
        return "words" if in_words else "characters"


class AnchorConfig(Section):
    """Training of the anchor: the unpruned encoder's projector, without LoRA. Every candidate starts from its weights."""

    weights: str | None = Field(
        None,
        description="trained weights to take instead of training: an export of the unpruned system, a projector as "
        "safetensors, or a checkpoint of the published code or of SLAM-LLM. A LoRA in them is merged into the LLM",
    )
    steps: Count = 400
    learning_rate: Positive = 1e-3


class TrainingConfig(Section):
    """The short fine-tune of every candidate and baseline. All see the same data in the same order."""

    init: Literal["anchor", "scratch"] = "anchor"
    repair: Literal["layers", "projector", "none"] = Field(
        "layers",
        description="what is refitted in closed form before training: the encoder's layers and the projector, the projector "
        "only, or nothing. A projector from scratch is never refitted",
    )
    repair_utterances: Count = Field(1000, description="utterances that the repair is fitted on, at most")
    interpolate: bool = Field(
        True,
        description="keep the point between a training's start and its end that has the smallest loss on held-out utterances "
        "of train",
    )
    steps: Annotated[int, Field(ge=0)] = Field(100, description="0: no training; candidates are repaired and decoded")
    batch_size: Count = 8
    micro_batch: Count | None = Field(
        None, description="utterances in memory at once; default: batch_size. Halved when memory runs out"
    )
    gradient_checkpointing: bool = False
    learning_rate: Positive = 1e-3
    lora_learning_rate: Positive | None = Field(None, description="default: learning_rate")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive = 1.0
    warmup: Fraction = 0.05
    final_learning_rate: Fraction = Field(0.1, description="fraction of the peak rate at the end of the cosine decay")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = Field(None, description="also send learning curves there")
    rungs: tuple[Fraction, ...] = Field((), description="fractions of the steps after which dev WER is measured")
    rung_confidence: Fraction = Field(
        0.95, description="end a trial at a rung if it will end dominated with at least this probability; never a baseline"
    )

    @model_validator(mode="after")
    def _check_repair(self) -> "TrainingConfig":
        """A projector from random weights has computed nothing before that a repair could restore."""
        if self.init == "scratch" and self.repair == "projector":
            raise ValueError(
                "repair must be layers or none with init = scratch, got 'projector': there is no anchor to restore"
            )
        return self

    @field_validator("rungs")
    @classmethod
    def _check_rungs(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < rung < 1 for rung in value):
            raise ValueError(f"each rung must be a fraction of the steps between 0 and 1, such as 0.5, got {list(value)}")
        if list(value) != sorted(set(value)):
            raise ValueError(f"rungs must rise, got {list(value)}: write {sorted(set(value))}")
        return value


class DecodingConfig(Section):
    """Beam search; greedy if `beams` is 1. The LLM may write `tokens_per_second` times the recording's seconds, plus
    `extra_tokens`, and at most `max_tokens` tokens if that is set."""

    beams: Count = 1
    test_beams: Count | None = Field(None, description="default: beams")
    repetition_penalty: Annotated[float, Field(ge=1)] = 1.0
    tokens_per_second: Positive = 12.0
    extra_tokens: Count = 8
    max_tokens: Count | None = None
    batch_size: Count = 64


class StorageConfig(Section):
    """Where trials are stored: an Optuna storage URL. Default: a journal file in the study's run folder."""

    url: str | None = None
    artifacts: str | None = Field(
        None, description="a folder or s3://bucket/prefix for big files, if the workers do not share the run folder"
    )


class StudyConfig(Section):
    """A whole study, of a `[model]` or of a SLAM-ASR system from `[encoder]`, `[projector]` and `[llm]`. Paths are relative to
    the study file.
    """

    name: str
    preset: Literal["paper"] | None = None
    seed: int = 0
    model: ModelConfig | None = None
    encoder: EncoderConfig | None = Field(None, validate_default=True)
    llm: LlmConfig | None = Field(None, validate_default=True)
    projector: ProjectorConfig = ProjectorConfig()
    data: DataConfig
    text: TextConfig = TextConfig()
    anchor: AnchorConfig = AnchorConfig()
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    search: SearchConfig = SearchConfig()
    storage: StorageConfig = StorageConfig()
    _source: Path = PrivateAttr(default=Path("study.toml"))

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str, info: ValidationInfo) -> str:
        if context_of(info, "any_name") and value:
            return value
        return check_study_name(value, context_of(info, "name_source") or "")

    @field_validator("encoder", "llm")
    @classmethod
    def _check_parts(cls, value: Section | None, info: ValidationInfo) -> Section | None:
        if info.data.get("model") is None:
            if value is None and "model" in info.data:
                raise PydanticCustomError("missing", "Field required")
        elif value is not None:
            raise ValueError(f"must not be given beside [model], got {info.field_name}: leave one of them out")
        return value

    @field_validator("projector", "anchor")
    @classmethod
    def _check_no_anchor(cls, value: Section, info: ValidationInfo) -> Section:
        if info.data.get("model") is not None:
            raise ValueError(f"must not be given beside [model], got {info.field_name}: the model has its own; leave it out")
        return value

    @field_validator("training")
    @classmethod
    def _check_start(cls, value: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        if info.data.get("model") is not None and value.init == "scratch":
            raise ValueError("init must be anchor with [model], got 'scratch': the model is trained already")
        return value

    @field_validator("data")
    @classmethod
    def _check_padding(cls, value: DataConfig, info: ValidationInfo) -> DataConfig:
        if info.data.get("model") is not None and value.pad_to_seconds is not None:
            raise ValueError(
                f"pad_to_seconds is for [encoder], got {value.pad_to_seconds:g} with [model], which pads by its own rule: "
                "leave it out (model.window_seconds shortens its window)"
            )
        return value

    @field_validator("training")
    @classmethod
    def _check_repair_is_used(cls, value: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        data = info.data.get("data")  # missing if it has errors of its own
        if value.repair == "none" and data is not None and data.repair:
            raise ValueError(
                "repair must be layers or projector with data.repair, got 'none': nothing would read its recordings"
            )
        return value

    @field_validator("search")
    @classmethod
    def _check_groups_are_known(cls, value: SearchConfig, info: ValidationInfo) -> SearchConfig:
        data = info.data.get("data")  # missing if it has errors of its own
        if value.max_worst_group_wer is not None and data is not None and data.group is None:
            raise ValueError(
                f"max_worst_group_wer needs data.group, got {value.max_worst_group_wer:g} without it: "
                'name the column of the groups, such as data.group = "speaker"'
            )
        return value

    @property
    def source(self) -> Path:
        """The study file."""
        return self._source

    @property
    def folder(self) -> Path:
        """The study file's folder."""
        return self._source.parent

    @property
    def run_folder(self) -> Path:
        """The folder that the study writes to: `run` beside study.toml, `run-<stem>` beside a file of another name."""
        return _run_folder(self._source)

    @property
    def artifacts(self) -> str | None:
        """`storage.artifacts`, ready to open: variables expanded, and a folder relative to the study file."""
        stored = self.storage.artifacts
        if stored is None or "://" in stored:
            return stored
        return str(self.folder / os.path.expanduser(os.path.expandvars(stored)))

    @property
    def slam(self) -> SlamParts:
        """The parts of a SLAM-ASR system, in a study that assembles one."""
        assert self.encoder is not None, "this study has a [model]"
        assert self.llm is not None
        return SlamParts(self.encoder, self.llm, self.projector)

    @property
    def models(self) -> dict[str, ModelSection]:
        """The models that the study names, by section."""
        sections: dict[str, ModelSection | None] = {"model": self.model, "encoder": self.encoder, "llm": self.llm}
        return {name: section for name, section in sections.items() if section is not None}

    def locate(self, value: str) -> str:
        """A path or hub name of the study file, ready to open: variables expanded, relative to the study file."""
        return locate(value, self.folder)

    def removable(self, encoder_layers: int) -> tuple[int, ...]:
        """Zero-based indices of the layers that a candidate may lose."""
        layers = self.search.removable_layers
        return tuple(range(encoder_layers)) if layers == "all" else tuple(sorted(layers))

    def max_removed(self, encoder_layers: int) -> int:
        """The most layers that a candidate may lose."""
        return most_removed(self.search.max_removed, len(self.removable(encoder_layers)), encoder_layers)

    def shared_layers(self, encoder_layers: int) -> int:
        """Number of layers below the first one that any candidate may lose. Their states are the same for all candidates."""
        fixed = [*baselines(encoder_layers, 0).values(), *self.fixed_candidates()]
        first = min([*self.removable(encoder_layers), *(i for c in fixed for i in c.removed_layers)])
        refits_below_a_cut = self.training.repair == "layers"  # the layer below a cut is refitted: it is no longer shared
        return max(0, first - 1) if refits_below_a_cut else first

    def fixed_candidates(self) -> list[Candidate]:
        """The candidates of `search.fixed`."""
        return [Candidate(f.removed_layers, f.lora_rank, f.repeat) for f in self.search.fixed]

    def overrides(self) -> dict[str, tuple[Any, Any]]:
        """Keys whose value differs from the preset's: dotted path -> (the preset's value, this study's value)."""
        return overridden_keys(self.preset, self.model_dump())

    def definition(self) -> dict[str, Any]:
        """The settings that two comparable records must share.

        Excludes where the study is stored, its number of trials, how candidates are chosen, and what changes only speed and
        memory.
        """
        unused = {"projector", "anchor", "encoder", "llm"} if self.model else {"model"}
        return self.model_dump(
            mode="json",
            exclude={
                **dict.fromkeys(unused, True),
                "storage": True,
                "search": {"trials", "fixed", "sampler", "startup_trials", "scan", "repeats"},
                "anchor": {"weights"},  # what they are is locked by their digest
                "training": {"micro_batch", "gradient_checkpointing", "checkpoint_seconds", "tracker", "rung_confidence"},
                "decoding": {"batch_size"},
            },
        )

    def fingerprint(self) -> str:
        """A digest of `definition`, 16 hexadecimal digits."""
        text = json.dumps(self.definition(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# What earlier versions did where their definitions lack a key.
_BEFORE: dict[str, dict[str, Any]] = {
    "data": {"repair": []},
    "text": {"metric": "wer"},
    "training": {"repair": "none", "repair_utterances": 1000, "interpolate": False},
}


def completed_definition(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored definition, with the keys that it lacks because an earlier version wrote it: they get the values that reproduce
    what that version did."""
    return {**stored, **{section: {**values, **stored.get(section, {})} for section, values in _BEFORE.items()}}


def load_study(path: str | Path, data_must_exist: bool = True) -> StudyConfig:
    """Read a study file, or the `study.toml` of a folder.

    data_must_exist: False for commands that do not read recordings, such as `plan` or `report`. They accept sources that are
        not on this machine, and a study name of an earlier version.

    Raises StudyError with one line for each error in the file.
    """
    path = Path(path)
    file = path / "study.toml" if path.is_dir() else path
    if not file.is_file():
        raise StudyError([f"there is no study file {file}: `prunesearch init NAME` writes one"])
    content = file.read_bytes()
    try:
        raw = tomllib.loads(_text(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StudyError([f"{file} must be encoded as UTF-8, line {line} is not: save it as UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        fix = ": it holds NUL characters: save it as UTF-8, or restore it from a copy" if b"\0" in content else f": {error}"
        raise StudyError([f"{file} is not valid TOML{fix}"]) from None
    return parse_study(raw, file, data_must_exist)


def _text(content: bytes) -> str:
    """The content of a text file, as editors save it: a byte order mark is left out, and each line ends with a line feed."""
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def parse_study(raw: dict[str, Any], source: Path, data_must_exist: bool = True) -> StudyConfig:
    """The study that `raw`, the TOML table of the file `source`, describes; see `load_study`."""
    folder = source.parent
    table = with_preset(raw)
    is_study_toml = source.name == "study.toml"
    table.setdefault("name", folder.resolve().name if is_study_toml else source.stem)
    context = {
        "folder": folder,
        "encoder_layers": _local_encoder_layers(table, folder),
        "data_must_exist": data_must_exist,
        "name_source": None if "name" in raw else "the folder's name" if is_study_toml else "the file's name",
        # a study that an earlier version started cannot be renamed: its storage and records have the name
        "any_name": not data_must_exist or _run_folder(source).exists(),
    }
    try:
        study = StudyConfig.model_validate_json(json.dumps(table, default=str), context=context)
    except ValidationError as error:
        raise StudyError(describe_validation_error(error, table, StudyConfig)) from None
    study._source = source
    return study


def check_study_name(name: str, source: str = "") -> str:
    """Return `name`. Raises ValueError if it cannot serve as the name of a folder, a job and a database entry everywhere.

    source: where the name comes from, if it was not given in the study file, such as `the folder's name`.
    """
    if re.fullmatch(r"\w[\w.-]*", name):
        return name
    rule = "must consist of letters, digits, '_', '-' and '.', and start with a letter, a digit or '_'"
    example = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "my-study"
    fix = f'add name = "{example}" to the study file' if source else f'for example "{example}"'
    raise ValueError(f"{rule}, got {name!r}{f', {source}' if source else ''}: {fix}")


def _run_folder(source: Path) -> Path:
    return source.parent / ("run" if source.name == "study.toml" else f"run-{source.stem}")


def _local_encoder_layers(raw: dict[str, Any], folder: Path) -> int | None:
    """The encoder's depth, from the config.json of a local folder; None for a hub model, which is checked when opened."""
    section, key = ("model", "name") if isinstance(raw.get("model"), dict) else ("encoder", "model")
    table = raw.get(section)
    model = table.get(key) if isinstance(table, dict) else None
    file = Path(locate(model, folder)) / "config.json" if isinstance(model, str) else None
    if file is None or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # reported when the model is opened
        return None
    tower = found.get("audio_config") if isinstance(found, dict) else None
    inside, names = (tower, DEPTHS) if isinstance(tower, dict) else (found, DEPTHS[:1])  # a text model's depth is not meant
    layers = [inside[name] for name in names if name in inside] if isinstance(inside, dict) else []
    return layers[0] if layers and isinstance(layers[0], int) else None
