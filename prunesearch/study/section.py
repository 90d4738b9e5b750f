"""What all sections of a study file share: the base class, value types, and paths relative to the study file."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A table of the study file. Frozen; an unknown key and a value of another type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def context_of(info: ValidationInfo, key: str) -> Any:
    """A value of the validation context that `parse_study` sets; None outside of it.

    folder: the study file's folder.
    encoder_layers: the encoder's depth; None if it is not known yet.
    data_must_exist: see `load_study`.
    name_source: where the study's name comes from, such as `the folder's name`; None if the study file has one.
    any_name: accept any name, because the study was started under it already.
    """
    return (info.context or {}).get(key)


def locate(value: str, folder: Path | None) -> str:
    """A path or hub name of the study file, ready to open: variables expanded, and relative to `folder` if it exists there.

    Manifests (`.jsonl`) are never hub names, so they are relative to `folder` even if they do not exist.
    """
    expanded = os.path.expanduser(os.path.expandvars(value))
    beside = (folder or Path(".")) / expanded
    return str(beside) if beside.exists() or Path(expanded).suffix == ".jsonl" else expanded


def check_variables(value: str) -> str:
    """Return `value`. Raises ValueError if it contains a `${VARIABLE}` that is not set."""
    for match in re.finditer(r"\$\{(\w+)\}", value):
        if match[1] not in os.environ:
            raise ValueError(f"the environment variable {match[1]} is not set: export {match[1]}=…")
    return value


def _check_model_folder(value: str, info: ValidationInfo) -> str:
    """A value that starts like a path must be a folder; any other value may be a hub name."""
    folder = context_of(info, "folder")
    where = Path(locate(check_variables(value), folder))
    if value.startswith((".", "/", "~", "$")) and folder is not None and not where.is_dir():
        raise ValueError(f"must be a folder or a hub name: there is no folder {where}")
    return value


ModelSource = Annotated[str, AfterValidator(_check_model_folder)]  # a folder or a hub name
