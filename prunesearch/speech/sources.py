"""Sources of utterances: JSONL manifests, Hugging Face datasets, unpacked Common Voice releases, FLEURS.

A source yields its lines unchanged, as `Row`s. `corpus` applies limits, draws a subset, and normalises texts.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunesearch.speech.audio import Cell, Recording
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.sources import CommonVoiceSource, DatasetSource, FleursSource, Source

FLEURS_CONFIGS = {"da": "da_dk", "nl": "nl_nl", "en": "en_us"}


@dataclass(frozen=True)
class Row:
    """One line of a source; `where` is its place there, for error messages.

    `seconds` is None where the source gives no duration. `problem` is the reason why the line cannot be used.
    """

    where: str
    id: str
    audio: Recording
    text: str
    language: str | None = None
    group: str | None = None
    seconds: float | None = None
    problem: str | None = None


def read_source(source: Source, config: StudyConfig, transcribed: bool = True) -> Iterator[Row]:
    """The source's rows, in its order. Raises StudyError when there is no such source, or it lacks a column.

    `transcribed`: whether texts are needed. If not, manifests and datasets may do without.
    """
    if isinstance(source, str):
        return _manifest_rows(Path(config.locate(source)), config.data.group, transcribed)
    if isinstance(source, CommonVoiceSource):
        return _common_voice_rows(Path(config.locate(source.common_voice)), source, config.data.group)
    if isinstance(source, FleursSource):
        configuration = FLEURS_CONFIGS[source.fleurs]
        return _dataset_rows(
            DatasetSource(
                dataset="google/fleurs", split=source.split, revision="refs/convert/parquet", text="raw_transcription",
                language=source.fleurs, data_files=f"{configuration}/{source.split}/*.parquet",
            ),
            config, transcribed,
        )  # fmt: skip
    return _dataset_rows(source, config, transcribed)


def _manifest_rows(path: Path, group: str | None, transcribed: bool) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON may hold Unicode's other line ends
    except UnicodeDecodeError as error:
        raise StudyError([f"{path}: must be UTF-8 ({error})"]) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            rows.append(Row(where, where, path, "", problem=f"is not JSON ({error})"))
            continue
        needed = ("audio", "text") if transcribed else ("audio",)
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in needed):
            names = " and ".join(f"`{key}`" for key in needed)
            problem = f"a line must be an object with the string{'s' if len(needed) > 1 else ''} {names}"
            rows.append(Row(where, where, path, "", problem=problem))
            continue
        rows.append(
            Row(
                where=where,
                id=str(row.get("id", row["audio"])),
                audio=path.parent / row["audio"],
                text=row["text"] if transcribed else "",
                language=row.get("language"),
                group=None if group is None or row.get(group) is None else str(row[group]),
                seconds=float(row["duration"]) if isinstance(row.get("duration"), int | float) else None,
            )
        )
    if group and transcribed and rows and not any(row.group or row.problem for row in rows):
        raise StudyError([f"data.group: no line of {path} has the column {group!r}"])
    return iter(rows)


def _common_voice_rows(folder: Path, source: CommonVoiceSource, group: str | None) -> Iterator[Row]:
    """A release's folder of one language has `<split>.tsv`, `clips/`, and in newer ones `clip_durations.tsv` (milliseconds)."""
    table, durations = folder / f"{source.split}.tsv", folder / "clip_durations.tsv"
    if not table.is_file():
        raise StudyError(
            [f"{folder}: must be a language's folder of an unpacked Common Voice release, but has no {table.name}"]
        )
    seconds: dict[str, float] = {}
    if durations.is_file():
        with durations.open(encoding="utf-8", newline="") as file:
            seconds = {clip: float(ms) / 1000 for clip, ms in list(csv.reader(file, delimiter="\t"))[1:]}
    with table.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = reader.fieldnames or []
        _check_columns(str(table), columns, "path", "sentence", group)
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        yield Row(
            where=f"{table}:{number}",
            id=row["path"],
            audio=folder / "clips" / row["path"],
            text=row["sentence"],
            language=source.language or row.get("locale") or folder.name,
            group=row[group] or None if group else None,
            seconds=seconds.get(row["path"]),
        )


def _dataset_rows(source: DatasetSource, config: StudyConfig, transcribed: bool) -> Iterator[Row]:
    from datasets import Audio

    data = _open_dataset(source, config)
    group, text = (config.data.group, source.text) if transcribed else (None, None)
    _check_columns(source.dataset, data.column_names, source.audio, text, group, source.language_column)
    data = data.cast_column(source.audio, Audio(decode=False))  # the bytes; soundfile decodes them
    names = next((n for n in ("id", "path", "file") if n in data.column_names and n != source.audio), None)
    kept = [c for c in (text, group, source.language_column, names) if c]
    cells = data.select_columns([source.audio])
    for i, row in enumerate(data.select_columns(kept or [source.audio])):
        language = row[source.language_column] if source.language_column else source.language
        yield Row(
            where=f"{source.dataset}, row {i} of {source.split}",
            id=f"{source.split}/{i}" if names is None else str(row[names]),
            audio=Cell(cells, i, source.audio),
            text=(row[text] or "") if text else "",
            language=language,
            group=None if group is None or row[group] is None else str(row[group]),
        )


def _open_dataset(source: DatasetSource, config: StudyConfig) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()  # the listener shows progress
    folder = Path(config.locate(source.dataset))
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
            data = load_from_disk(str(folder))
            return data[source.split] if isinstance(data, DatasetDict) else data
        files = {source.split: source.data_files} if source.data_files else None
        return load_dataset(
            str(folder), source.config, split=source.split, revision=source.revision, data_files=files,
            trust_remote_code=False,
        )  # fmt: skip
    except KeyError as error:
        raise StudyError([f"data: {source.dataset} has no split {error}"]) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StudyError(
            [
                f"data: the dataset {source.dataset} cannot be opened: {reason}",
                "give a local folder, or the name of a hub data set that this machine can reach",
            ]
        ) from error


def _check_columns(where: str, there: Any, *wanted: str | None) -> None:
    if missing := [name for name in wanted if name and name not in there]:
        raise StudyError([f"data: {where} has no column {missing[0]!r}; it has {', '.join(there)}"])
