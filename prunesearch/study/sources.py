"""Data sources as a study file names them. `speech.sources` reads them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from prunesearch.study.section import Section, check_variables, context_of, locate


class DatasetSource(Section):
    """A Hugging Face dataset: a hub name, or a folder that `load_dataset` or `load_from_disk` can open."""

    dataset: str
    config: str | None = None
    split: str
    revision: str | None = None
    data_files: str | None = None
    audio: str = Field("audio", description="column of the recordings")
    text: str = Field("text", description="column of the transcripts")
    language: str | None = None
    language_column: str | None = None

    @field_validator("dataset")
    @classmethod
    def _check_variables(cls, value: str, info: ValidationInfo) -> str:
        return check_variables(value) if context_of(info, "data_must_exist") else value


class CommonVoiceSource(Section):
    """The folder of one language in an unpacked Common Voice release. `language` defaults to the folder's name."""

    common_voice: str
    split: str
    language: str | None = None

    @field_validator("common_voice")
    @classmethod
    def _check_folder(cls, value: str, info: ValidationInfo) -> str:
        if not context_of(info, "data_must_exist"):
            return value
        folder = Path(locate(check_variables(value), context_of(info, "folder")))
        if not folder.is_dir():
            raise ValueError(f"must be the folder of an unpacked release: there is no folder {folder}")
        return value


class FleursSource(Section):
    """google/fleurs on the hub, in Danish (`da`), Dutch (`nl`) or English (`en`)."""

    fleurs: Literal["da", "nl", "en"]
    split: Literal["train", "validation", "test"]


def _check_manifest(value: str, info: ValidationInfo) -> str:
    if not context_of(info, "data_must_exist"):
        return value
    path = locate(check_variables(value), context_of(info, "folder"))
    if not Path(path).is_file():
        raise ValueError(f"must be an existing manifest: there is no file {path}")
    return value


def _kind_of_source(value: Any) -> str:
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, Section) else None
    if keys is None:
        return "[manifest]"
    return next((f"[{kind}]" for kind in ("common_voice", "fleurs") if kind in keys), "[dataset]")


# union tags are in brackets, so that `study.errors` can leave them out of key paths
Source = Annotated[
    Annotated[str, AfterValidator(_check_manifest), Tag("[manifest]")]
    | Annotated[DatasetSource, Tag("[dataset]")]
    | Annotated[CommonVoiceSource, Tag("[common_voice]")]
    | Annotated[FleursSource, Tag("[fleurs]")],
    Discriminator(_kind_of_source),
]
