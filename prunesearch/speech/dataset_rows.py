"""Rows of Hugging Face datasets. Recordings are bytes, paths or samples; soundfile decodes them, without torchcodec."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from prunesearch.speech.audio import AudioError, Cell, Recording
from prunesearch.speech.tables import Row, check_columns, path_problem, text_problem
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.sources import DatasetSource

TEXT_TYPES = ("string", "large_string", "string_view")
GROUP_TYPES = (
    *TEXT_TYPES,
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float32",
    "float64",
)
LOUDEST_FLOAT = 8.0  # float samples lie in [-1, 1], a little more after resampling; integers stored as floats reach thousands


def read_dataset(source: DatasetSource, config: StudyConfig, transcribed: bool = True) -> Iterator[Row]:
    """The dataset's rows, in its order.

    Raises StudyError when it cannot be opened, or a column is missing or does not hold what the study reads from it.
    """
    data = _open_dataset(source, config).with_format(None)  # a saved dataset may come with a format and hidden columns
    if data._indices is not None:
        data = data.flatten_indices()
    group, text = (config.data.group, source.text) if transcribed else (None, None)
    check_columns(source.dataset, data.column_names, source.audio, text, group, source.language_column)
    for name, types in ((text, TEXT_TYPES), (source.language_column, TEXT_TYPES), (group, GROUP_TYPES)):
        _check_type(source.dataset, data.features, name, types)
    names = next((n for n in ("id", "path", "file") if n in data.column_names and n != source.audio), None)
    kept = [c for c in dict.fromkeys((text, group, source.language_column, names)) if c]
    recordings = AudioColumn(data.select_columns([source.audio]), source.audio)
    recordings.check_type(source.dataset)
    folders = _folders_of_paths(source, config)
    cells = data.select_columns(kept) if kept else ({} for _ in range(len(data)))
    for i, (path, cell) in enumerate(zip(recordings.paths(), cells, strict=True)):
        row = {name: _named(data.features[name], value) for name, value in cell.items()}
        language = row[source.language_column] if source.language_column else source.language
        yield Row(
            where=f"{source.dataset}, row {i} of {source.split}",
            id=f"{source.split}/{i}" if names is None or row[names] is None else str(row[names]),
            audio=Cell(recordings, i, source.audio) if path is None else _located(path, folders),
            text=(row[text] or "") if text else "",
            language=language or None,
            group=None if group is None or row[group] is None else str(row[group]) or None,
            problem=_problem(path, row[text] if text else "", source.text),
        )


def _problem(path: str | None, text: str | None, column: str) -> str | None:
    if text is None:
        return f"has no text: {column!r} is null (in a CSV file, the words null, NA and None are read as null, too)"
    return text_problem(text) or (None if path is None else path_problem(path))


def _check_type(where: str, features: Any, name: str | None, allowed: tuple[str, ...]) -> None:
    """Raises StudyError for a column that holds numbers, lists or nothing where names or texts belong."""
    from datasets import ClassLabel

    if name is None or isinstance(features[name], ClassLabel) or getattr(features[name], "dtype", None) in allowed:
        return
    held = getattr(features[name], "dtype", None) or type(features[name]).__name__
    raise StudyError([f"data: {where}: the column {name!r} must hold text or class labels, got {held}"])


def _named(feature: Any, value: Any) -> Any:
    """The value of a cell; the name of a class label, and None for -1, which stands for no label."""
    from datasets import ClassLabel

    if not isinstance(feature, ClassLabel) or value is None:
        return value
    return feature.names[value] if 0 <= value < len(feature.names) else None


# Recordings


class AudioColumn:
    """The recordings of a dataset's column: `column[row][name]` gives a dict of `bytes` and `path`, as `Cell` reads it.

    The column may hold what the `Audio` feature stores (bytes or a path), paths, bytes, or structs of `array` (N,), (C, N) or
    (N, C) and `sampling_rate`; an array becomes the bytes of a WAV file.
    """

    def __init__(self, data: Any, name: str):
        self.data, self.name = data, name
        self._fingerprint = data._fingerprint  # changes with the dataset; see `audio.version_of`

    @cached_property
    def _column(self) -> Any:
        return self.data.data.column(self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_column"}  # a memory map: opened again

    @cached_property
    def _fields(self) -> tuple[str, ...]:
        """The names of a struct's fields; empty for other types."""
        import pyarrow as pa

        kind = self._column.type
        return tuple(kind.field(i).name for i in range(kind.num_fields)) if pa.types.is_struct(kind) else ()

    def check_type(self, where: str) -> None:
        """Raises StudyError for a column that holds no recordings."""
        from pyarrow import types

        kind, fields = self._column.type, self._fields
        if {"array", "sampling_rate"} <= set(fields) or {"bytes", "path"} & set(fields):
            return
        if any(holds(kind) for holds in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
            return
        rule = "must hold recordings (paths, bytes, or `array` with `sampling_rate`)"
        raise StudyError([f"data: {where}: the column {self.name!r} {rule}, got {str(kind)[:60]}"])

    def paths(self) -> list[str | None]:
        """Each row's path; None where the row holds the recording itself, or nothing."""
        import pyarrow.compute as pc
        from pyarrow import types

        column = self._column
        if types.is_string(column.type) or types.is_large_string(column.type):
            return column.to_pylist()
        if "path" not in self._fields or "array" in self._fields:
            return [None] * len(column)
        paths = pc.struct_field(column, "path").to_pylist()
        if "bytes" not in self._fields:
            return paths
        inside = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
        return [None if held else path for held, path in zip(inside, paths, strict=True)]

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Raises AudioError where the row's samples cannot be what was recorded."""
        value = self._column[row]
        if not value.is_valid:
            return {self.name: None}
        if not self._fields:
            content = value.as_py()
            is_path = isinstance(content, str)
            return {self.name: {"bytes": None if is_path else content, "path": content if is_path else None}}
        if "bytes" in self._fields and value["bytes"].is_valid:
            return {self.name: {"bytes": value["bytes"].as_py(), "path": None}}
        if "array" in self._fields:
            return {self.name: {"bytes": self._wav(row, value["array"].as_py(), value["sampling_rate"].as_py()), "path": None}}
        return {self.name: {"bytes": None, "path": value["path"].as_py() if "path" in self._fields else None}}

    def size(self, row: int) -> int:
        """A number that equal recordings share: bytes, or samples of an array."""
        value = self._column[row]
        if not value.is_valid:
            return 0
        if "bytes" in self._fields and value["bytes"].is_valid:
            return int(value["bytes"].as_buffer().size)
        return len(value["array"]) if "array" in self._fields and value["array"].is_valid else 0

    def _wav(self, row: int, array: Any, rate: int | None) -> bytes:
        where = f"row {row} of {self.name!r}"
        if array is None:
            raise AudioError(f"{where}: holds no recording")
        if not isinstance(rate, int | float) or not rate > 0 or rate != int(rate):
            raise AudioError(f"{where}: sampling_rate must be a positive number, got {rate}")
        try:
            samples = np.asarray(array, np.float64)
        except (ValueError, TypeError):
            raise AudioError(f"{where}: array must hold numbers, all channels of one length") from None
        if samples.ndim not in (1, 2) or samples.size == 0:
            raise AudioError(f"{where}: array must have shape (N,), (C, N) or (N, C), got {samples.shape}")
        if np.abs(samples).max() > LOUDEST_FLOAT:
            loudest = f"{np.abs(samples).max():g}"
            raise AudioError(f"{where}: samples must lie in [-1, 1], got {loudest}: divide integer samples by 32768")
        if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
            samples = samples.T  # channels come first in torchcodec and librosa, last in soundfile
        file = io.BytesIO()
        soundfile.write(file, samples, int(rate), format="WAV", subtype="FLOAT")
        return file.getvalue()


def _folders_of_paths(source: DatasetSource, config: StudyConfig) -> list[Path]:
    """The folders that paths in the dataset may be relative to, in this order."""
    folder = Path(config.locate(source.dataset))
    files = [folder / source.data_files] if source.data_files else []
    inside = [folder, *(file.parent for file in files)] if folder.is_dir() else []
    return inside or [Path(config.locate(source.data_files)).parent if source.data_files else Path(".")]


def _located(path: str, folders: list[Path]) -> Recording:
    if path_problem(path):
        return folders[0]
    return next((folder / path for folder in folders if (folder / path).exists()), folders[0] / path)


# Opening


def _open_dataset(source: DatasetSource, config: StudyConfig) -> Any:
    import pyarrow as pa
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()  # the listener shows progress
    folder = Path(config.locate(source.dataset))
    _check_is_split_of_one(source, config)
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
            return _split_of_saved(load_from_disk(str(folder)), source)
        files = source.data_files
        if files and not folder.is_dir():
            files = config.locate(files)
        with _stored_without_torchcodec():
            data = load_dataset(
                str(folder), source.config, split=source.split, revision=source.revision,
                data_files={source.split: files} if files else None,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, DatasetsError, pa.ArrowException) as error:
        if isinstance(error, StudyError):
            raise
        raise StudyError(
            [
                f"data: the dataset {source.dataset} cannot be opened: {_reason(error)}",
                "give a local folder, or the name of a hub data set that this machine can reach",
            ]
        ) from error
    if data.builder_name == "csv" and "__index_level_0__" in data.column_names:
        rule = "the rows of its CSV file have more fields than the header: quote the texts that hold a comma"
        raise StudyError([f"data: {source.dataset}: {rule}"])
    return data


def _reason(error: BaseException) -> str:
    """One line: the first one of what the error says, or of the error behind it where datasets only says that it failed."""
    while error.__cause__ is not None and str(error).startswith("An error occurred while generating the dataset"):
        error = error.__cause__
    missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} (pip install {missing})" if missing else lines[0]


def _split_of_saved(saved: Any, source: DatasetSource) -> Any:
    """The split of what `save_to_disk` has written. Raises StudyError where it is another one."""
    from datasets import DatasetDict

    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            raise StudyError([f"data: {source.dataset} has no split {source.split!r}; it has {', '.join(saved)}"])
        return saved[source.split]
    if saved.split is not None and str(saved.split) != source.split:
        fix = f'write split = "{saved.split}" if these recordings are meant, else give the folder of the other split'
        raise StudyError([f"data: {source.dataset} holds the split {str(saved.split)!r} alone, got {source.split!r}: {fix}"])
    return saved


def _check_is_split_of_one(source: DatasetSource, config: StudyConfig) -> None:
    """Raises StudyError where two splits of the study read the same rows, because `split` does not choose among them: with
    `data_files` it is only a name, and a saved dataset without a split's name has one split only."""
    same = _Rows.of(source, config)
    users = [
        split
        for split in config.data.splits
        if any(isinstance(s, DatasetSource) and _Rows.of(s, config) == same for s in getattr(config.data, split))
    ]
    if len(users) > 1 and users != ["train", "repair"]:
        rule = f"data.{users[0]} and data.{users[1]} must not share recordings"
        raise StudyError([f"{rule}, got {same} for both: give each its own"])


@dataclass(frozen=True)
class _Rows:
    """What decides which rows a source gives; `split` is None where it decides nothing."""

    dataset: str
    config: str | None
    revision: str | None
    data_files: str | None
    split: str | None

    @classmethod
    def of(cls, source: DatasetSource, config: StudyConfig) -> "_Rows":
        folder = Path(config.locate(source.dataset))
        named = source.data_files is not None or (folder / "state.json").is_file()
        place = str(folder.resolve()) if folder.is_dir() else source.dataset
        return cls(place, source.config, source.revision, source.data_files, None if named else source.split)

    def __str__(self) -> str:
        return self.dataset if self.data_files is None else f"{self.data_files} of {self.dataset}"


@contextmanager
def _stored_without_torchcodec() -> Iterator[None]:
    """While this is open, datasets stores paths and bytes of recordings as they are. Its own encoder imports torchcodec first,
    even though it needs it for samples only."""
    from datasets import Audio

    original = Audio.encode_example
    Audio.encode_example = _stored
    try:
        yield
    finally:
        Audio.encode_example = original


def _stored(feature: Any, value: Any) -> dict[str, Any]:
    if isinstance(value, str | Path):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value), "path": None}
    return {"bytes": value.get("bytes"), "path": value.get("path")}
