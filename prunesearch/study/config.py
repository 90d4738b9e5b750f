"""A study file (TOML) as frozen, validated data. Defaults live here and nowhere else."""

import hashlib
import itertools
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prunesearch.study.candidate import Candidate, baselines
from prunesearch.study.errors import StudyError, explained

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Objective = Literal["speech_params", "encoder_params", "total_params"]


def _with_variables_checked(value: str) -> str:
    for match in re.finditer(r"\$\{(\w+)\}", value):
        if match[1] not in os.environ:
            raise ValueError(f"names the environment variable {match[1]}, which is not set: export {match[1]}=…")
    return value


def _folder_exists(value: str, info: ValidationInfo) -> str:
    """What is written as a path must be there; any other name may be the hub's."""
    where = Path(_locate(_with_variables_checked(value), _context(info, "folder")))
    if value.startswith((".", "/", "~", "$")) and _context(info, "folder") is not None and not where.is_dir():
        raise ValueError(f"must be a folder or a hub name: there is no folder {where}")
    return value


Located = Annotated[str, AfterValidator(_folder_exists)]  # a path or a hub name


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EncoderConfig(_Section):
    """A Whisper checkpoint: a folder (relative to the study file, `${VARIABLES}` expanded) or a hub name."""

    model: Located
    revision: str | None = None


class LlmConfig(_Section):
    """Any decoder-only causal LM: a folder or a hub name. LoRA's alpha is `lora_alpha_per_rank` times its rank.

    `lora_targets` are names of linear layers; `auto` is q, k, v and o where they go by these names, else peft's own choice.
    """

    model: Located
    revision: str | None = None
    prompt: str = "Transcribe speech to text.\n"
    lora_targets: tuple[str, ...] | Literal["auto"] = "auto"
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="by bitsandbytes, on a GPU")
    lora_alpha_per_rank: Positive = 2.0
    lora_dropout: Fraction = 0.1


class ProjectorConfig(_Section):
    """`stack` encoder positions are concatenated, then Linear, ReLU, dropout, Linear, LayerNorm."""

    stack: Count = 5
    hidden: Count = 2048
    dropout: Fraction = 0.1


class DatasetSource(_Section):
    """A Hugging Face dataset: a hub name, or a folder that `load_dataset` or `load_from_disk` opens."""

    dataset: str
    config: str | None = None
    split: str
    revision: str | None = None
    data_files: str | None = None
    audio: str = Field("audio", description="the column of recordings")
    text: str = Field("text", description="the column of transcripts")
    language: str | None = None
    language_column: str | None = None

    @field_validator("dataset")
    @classmethod
    def _variables_are_set(cls, value: str, info: ValidationInfo) -> str:
        return _with_variables_checked(value) if _context(info, "data_must_exist") else value


class CommonVoiceSource(_Section):
    """One language's folder of an unpacked Common Voice release. `language` is the folder's name where none is given."""

    common_voice: str
    split: str
    language: str | None = None

    @field_validator("common_voice")
    @classmethod
    def _folder_exists(cls, value: str, info: ValidationInfo) -> str:
        if not _context(info, "data_must_exist"):
            return value
        folder = Path(_locate(_with_variables_checked(value), _context(info, "folder")))
        if not folder.is_dir():
            raise ValueError(f"must be an unpacked release's folder: there is no folder {folder}")
        return value


class FleursSource(_Section):
    """google/fleurs on the hub: `da`, `nl` or `en`."""

    fleurs: Literal["da", "nl", "en"]
    split: Literal["train", "validation", "test"]


def _manifest_exists(value: str, info: ValidationInfo) -> str:
    if not _context(info, "data_must_exist"):
        return value
    path = _locate(_with_variables_checked(value), _context(info, "folder"))
    if not Path(path).is_file():
        raise ValueError(f"must be an existing manifest: there is no file {path}")
    return value


def _kind_of_source(value: Any) -> str:
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, _Section) else None
    if keys is None:
        return "[manifest]"
    return next((f"[{kind}]" for kind in ("common_voice", "fleurs") if kind in keys), "[dataset]")


# tags stand in brackets: `_path` leaves them out of what a user is shown
Source = Annotated[
    Annotated[str, AfterValidator(_manifest_exists), Tag("[manifest]")]
    | Annotated[DatasetSource, Tag("[dataset]")]
    | Annotated[CommonVoiceSource, Tag("[common_voice]")]
    | Annotated[FleursSource, Tag("[fleurs]")],
    Discriminator(_kind_of_source),
]


class DataConfig(_Section):
    """Each split comes from a source or a list of them: a JSONL manifest (`audio`, `text`, and optionally `language`,
    `duration`, `id`), a Hugging Face dataset, a Common Voice release, FLEURS."""

    train: tuple[Source, ...]
    dev: tuple[Source, ...]
    test: tuple[Source, ...]
    min_seconds: Annotated[float, Field(ge=0)] = 0.1
    max_seconds: Positive = 30.0
    max_train_hours: Positive | None = None
    max_train_utterances: Count | None = None
    max_dev_utterances: Count | None = None
    max_test_utterances: Count | None = None
    pad_to_seconds: Positive | None = Field(None, description="pad each recording with silence to a multiple of this")
    group: str | None = Field(
        None, description="the sources' column kept with each utterance's result: speaker, accent, gender, …"
    )
    skip_unreadable: bool = False

    @field_validator("train", "dev", "test", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _splits_differ(self) -> "DataConfig":
        splits = {"train": self.train, "dev": self.dev, "test": self.test}
        for a, b in itertools.combinations(splits, 2):
            if both := [source for source in splits[a] if source in splits[b]]:
                shown = both[0] if isinstance(both[0], str) else both[0].model_dump(exclude_defaults=True)
                raise ValueError(f"{a} and {b} must not share a source, got {shown!r} for both")
        return self


NormalizerName = Literal["paper", "whisper", "none"]


class TextConfig(_Section):
    """`paper`: lowercase, punctuation out, apostrophes kept. `whisper`: Whisper's normalisers. `none`: as written."""

    normalizer: NormalizerName | dict[str, NormalizerName] = Field("paper", description="one, or one for each language")

    def normalizer_of(self, language: str | None) -> str:
        """The language's normaliser; `paper` where a table does not name the language."""
        return self.normalizer if isinstance(self.normalizer, str) else self.normalizer.get(language or "", "paper")


class AnchorConfig(_Section):
    """The unpruned encoder's projector, trained once without LoRA; every candidate starts from it."""

    steps: Count = 400
    learning_rate: Positive = 1e-3


class TrainingConfig(_Section):
    """The short fine-tune that every candidate and every baseline gets, with the same data in the same order."""

    init: Literal["anchor", "scratch"] = "anchor"
    steps: Count = 100
    batch_size: Count = 8
    micro_batch: Count | None = Field(
        None, description="utterances in memory at once; default: the batch. Halved when memory runs out"
    )
    gradient_checkpointing: bool = False
    learning_rate: Positive = 1e-3
    lora_learning_rate: Positive | None = Field(None, description="default: learning_rate")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive = 1.0
    warmup: Fraction = 0.05
    final_learning_rate: Fraction = Field(0.1, description="of the peak; the decay is a cosine")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = Field(None, description="where learning curves go, too")
    rungs: tuple[Fraction, ...] = Field((), description="fractions of the steps after which dev WER is measured")
    rung_confidence: Fraction = Field(
        0.95, description="how likely a trial must be to end dominated, for a rung to end it; baselines never are"
    )

    @field_validator("rungs")
    @classmethod
    def _rungs_rise_below_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < rung < 1 for rung in value):
            raise ValueError("each rung must lie between 0 and 1: it is a fraction of the steps")
        if list(value) != sorted(set(value)):
            raise ValueError("rungs must rise")
        return value


class DecodingConfig(_Section):
    """Greedy when `beams` is 1. An utterance's limit is `tokens_per_second` of audio plus `extra_tokens`."""

    beams: Count = 1
    test_beams: Count | None = Field(None, description="default: beams")
    repetition_penalty: Annotated[float, Field(ge=1)] = 1.0
    tokens_per_second: Positive = 12.0
    extra_tokens: Count = 8
    max_tokens: Count = 128
    batch_size: Count = 64


class FixedCandidate(_Section):
    """A candidate to evaluate in any case, after the baselines."""

    removed_layers: tuple[int, ...] = ()
    lora_rank: Annotated[int, Field(ge=0)] = 0
    repeat: Annotated[int, Field(ge=0)] = 0

    @field_validator("removed_layers")
    @classmethod
    def _layers_exist(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if len(_checked_layers(value, info)) == _context(info, "encoder_layers"):
            raise ValueError("must leave one of the encoder's layers")
        return value


class SearchConfig(_Section):
    """Which candidates there are, how they are proposed, and how many of them are evaluated (baselines included)."""

    removable_layers: tuple[int, ...] | Literal["all"] = "all"
    max_removed: Count | None = Field(None, description="default: half of the removable layers")
    lora_ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0, 4, 8, 16)
    baseline_lora_rank: Annotated[int, Field(ge=1)] = 8
    params_objective: Objective = "speech_params"
    sampler: Literal["layer-sets", "tpe", "nsga2", "gp", "random", "grid"] = "layer-sets"
    startup_trials: Count = Field(6, description="sets of every size, between `fixed` and the first model")
    scan: bool = Field(True, description="measure what layers are worth before proposing any")
    repeats: Annotated[int, Field(ge=0)] = Field(
        0, description="how often layer-sets may train a system again, from other seeds, where noise hides the front"
    )
    max_worst_group_wer: Positive | None = Field(
        None,
        description="a fraction; whoever has a higher dev WER in some group (of data.group) is kept off the front",
    )
    trials: Count = 40
    fixed: tuple[FixedCandidate, ...] = ()

    @field_validator("removable_layers")
    @classmethod
    def _layers_exist(cls, value: Any, info: ValidationInfo) -> Any:
        if not value:
            raise ValueError("must name at least one layer")
        return value if value == "all" else _checked_layers(value, info)

    @field_validator("lora_ranks")
    @classmethod
    def _some_rank(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)):
            raise ValueError("lora_ranks must rise and hold at least one rank (0 is: no LoRA)")
        return value

    @field_validator("max_removed")
    @classmethod
    def _something_stays(cls, value: int | None, info: ValidationInfo) -> int | None:
        depth = _context(info, "encoder_layers")
        layers = info.data.get("removable_layers", "all")
        most = depth if layers == "all" else len(layers)
        if value is not None and most is not None and value > most:
            raise ValueError(f"must not exceed the number of removable layers, {most}")
        if value is not None and depth is not None and value >= depth:
            raise ValueError(f"must leave one of the encoder's {depth} layers")
        return value


class StorageConfig(_Section):
    """An Optuna storage URL; by default a journal file in the study's run folder."""

    url: str | None = None
    artifacts: str | None = Field(
        None, description="a folder or s3://bucket/prefix, for workers that do not share the run folder"
    )


class StudyConfig(_Section):
    """A whole study. Relative paths start where its file lies."""

    name: Annotated[str, Field(min_length=1)]
    preset: Literal["paper"] | None = None
    seed: int = 0
    encoder: EncoderConfig
    llm: LlmConfig
    projector: ProjectorConfig = ProjectorConfig()
    data: DataConfig
    text: TextConfig = TextConfig()
    anchor: AnchorConfig = AnchorConfig()
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    search: SearchConfig = SearchConfig()
    storage: StorageConfig = StorageConfig()
    _source: Path = PrivateAttr(default=Path("study.toml"))

    @field_validator("search")
    @classmethod
    def _a_limit_on_groups_has_groups(cls, value: SearchConfig, info: ValidationInfo) -> SearchConfig:
        data = info.data.get("data")  # not there where it has mistakes of its own
        if value.max_worst_group_wer is not None and data is not None and data.group is None:
            raise ValueError("max_worst_group_wer needs data.group, the column that says who belongs to which group")
        return value

    @property
    def source(self) -> Path:
        """The study file."""
        return self._source

    @property
    def folder(self) -> Path:
        return self._source.parent

    @property
    def run_folder(self) -> Path:
        """Everything that the study writes lies here: `run` beside study.toml, `run-<stem>` beside another file."""
        return self.folder / "run" if self._source.name == "study.toml" else self.folder / f"run-{self._source.stem}"

    @property
    def artifacts(self) -> str | None:
        """Where big files go, ready to open; a relative folder starts where the study file lies."""
        stored = self.storage.artifacts
        if stored is None or "://" in stored:
            return stored
        return str(self.folder / os.path.expanduser(os.path.expandvars(stored)))

    def locate(self, value: str) -> str:
        """A path or hub name of the study file, ready to open: variables expanded, relative to the study file."""
        return _locate(value, self.folder)

    def removable(self, encoder_layers: int) -> tuple[int, ...]:
        """The layers that a candidate may lose."""
        layers = self.search.removable_layers
        return tuple(range(encoder_layers)) if layers == "all" else tuple(sorted(layers))

    def max_removed(self, encoder_layers: int) -> int:
        removable = len(self.removable(encoder_layers))
        most = self.search.max_removed if self.search.max_removed is not None else max(1, removable // 2)
        return min(most, removable, encoder_layers - 1)

    def shared_layers(self, encoder_layers: int) -> int:
        """How many layers come before the first one that any candidate may lose: their states are the same for all."""
        fixed = [*baselines(encoder_layers, 0).values(), *self.fixed_candidates()]
        return min([*self.removable(encoder_layers), *(i for c in fixed for i in c.removed_layers)])

    def fixed_candidates(self) -> list[Candidate]:
        return [Candidate(f.removed_layers, f.lora_rank, f.repeat) for f in self.search.fixed]

    def overrides(self) -> dict[str, tuple[Any, Any]]:
        """The preset's keys that this study has otherwise: path -> the preset's value, the study's."""
        found = {}

        def compare(preset: dict[str, Any], own: dict[str, Any], path: str) -> None:
            for key, value in preset.items():
                if isinstance(value, dict):
                    compare(value, own[key], f"{path}{key}.")
                elif own[key] != value:
                    found[path + key] = value, own[key]

        compare(PRESETS.get(self.preset or "", {}), self.model_dump(), "")
        return found

    def definition(self) -> dict[str, Any]:
        """What makes two records comparable: everything but where the study is stored, how long it goes on, how candidates
        are chosen, and what changes speed and memory alone."""
        return self.model_dump(
            mode="json",
            exclude={
                "storage": True,
                "search": {"trials", "fixed", "sampler", "startup_trials", "scan", "repeats"},
                "training": {"micro_batch", "gradient_checkpointing", "checkpoint_seconds", "tracker", "rung_confidence"},
                "decoding": {"batch_size"},
            },
        )

    def fingerprint(self) -> str:
        text = json.dumps(self.definition(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2603.27981 and the authors' released configurations
    "paper": {
        "projector": {"stack": 5, "hidden": 2048, "dropout": 0.1},
        "llm": {"lora_alpha_per_rank": 2.0, "lora_dropout": 0.1},
        "data": {"min_seconds": 0.5, "max_seconds": 30.0, "pad_to_seconds": 1.0},
        "text": {"normalizer": "paper"},
        "training": {
            "init": "scratch",
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "clip": 1.0,
            "warmup": 0.05,
            "final_learning_rate": 0.1,
        },
        "decoding": {"beams": 1, "test_beams": 2, "max_tokens": 128},
        "seed": 42,
    }
}


def load_study(path: str | Path, data_must_exist: bool = True) -> StudyConfig:
    """Read a study file, or the `study.toml` of a folder. Raises StudyError with every mistake in it.

    A plan or a report can do without the corpora: `data_must_exist` is for what reads them.
    """
    path = Path(path)
    file = path / "study.toml" if path.is_dir() else path
    if not file.is_file():
        raise StudyError([f"there is no study file {file}: `prunesearch init NAME` writes one"])
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError([f"{file} is not valid TOML: {error}"]) from None
    return parse_study(raw, file, data_must_exist)


def parse_study(raw: dict[str, Any], source: Path, data_must_exist: bool = True) -> StudyConfig:
    """The study that a TOML table, read from the file `source`, describes. Raises StudyError with every mistake in it."""
    folder = source.parent
    preset = raw.get("preset")
    merged = _merge(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, raw)
    merged.setdefault("name", folder.resolve().name if source.name == "study.toml" else source.stem)
    depth = _local_encoder_layers(merged, folder)
    context = {"folder": folder, "encoder_layers": depth, "data_must_exist": data_must_exist}
    try:
        study = StudyConfig.model_validate_json(json.dumps(merged, default=str), context=context)
    except ValidationError as error:
        raise StudyError(explained(error, merged, StudyConfig)) from None
    study._source = source
    return study


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _locate(value: str, folder: Path | None) -> str:
    expanded = os.path.expanduser(os.path.expandvars(value))
    beside = (folder or Path(".")) / expanded
    return str(beside) if beside.exists() or Path(expanded).suffix == ".jsonl" else expanded


def _context(info: ValidationInfo, key: str) -> Any:
    return (info.context or {}).get(key)


def _checked_layers(layers: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    Candidate(layers)  # none negative, none twice
    depth = _context(info, "encoder_layers")
    if depth is not None and any(i >= depth for i in layers):
        raise ValueError(f"must lie in [0, {depth}): the encoder has {depth} layers, and indices are zero-based")
    return layers


def _local_encoder_layers(raw: dict[str, Any], folder: Path) -> int | None:
    """The encoder's depth where its config.json is at hand; a hub model's is checked when it is opened."""
    encoder = raw.get("encoder")
    model = encoder.get("model") if isinstance(encoder, dict) else None
    file = Path(_locate(model, folder)) / "config.json" if isinstance(model, str) else None
    if file is None or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # whoever opens the model will say so
        return None
    layers = found.get("encoder_layers") if isinstance(found, dict) else None
    return layers if isinstance(layers, int) else None
