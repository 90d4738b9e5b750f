"""Tables of utterances: JSONL manifests, and the TSV files of an unpacked Common Voice release.

Fields never shift: a line whose shape is not the table's becomes a `Row` with a problem, and is never repaired by guessing.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunesearch.speech.audio import Recording
from prunesearch.study.errors import StudyError
from prunesearch.study.sources import CommonVoiceSource

LONGEST_NAME = 255  # bytes of a file's name on the file systems of Linux, macOS and Windows
MOST_SECONDS = 1e7  # no recording is longer than 115 days
VOTES = ("up_votes", "down_votes")  # Common Voice's columns of numbers: text in one of them means that fields have shifted
CLIP_DURATIONS = ["clip", "duration[ms]"]  # the header of Common Voice's clip_durations.tsv


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

    @classmethod
    def unusable(cls, where: str, table: Path, problem: str) -> "Row":
        """A line of `table` that cannot be used."""
        return cls(where, where, table, "", problem=problem)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without line ends (LF, CRLF or CR) and without a byte order mark.

    Raises StudyError with one line for a file that cannot be read or has another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StudyError([f"{path}: cannot be read ({error.strerror})"]) from None
    problem, text = None, ""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        problem = "it looks like UTF-16 or UTF-32"
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            problem = f"line {line} holds the byte 0x{content[error.start]:02x}"
    if problem:
        raise StudyError([f"{path}: must be UTF-8, but {problem}: save the table as UTF-8"])
    text = text.replace("\r\n", "\n")
    # not splitlines(): texts may hold Unicode's other line ends
    return (text if "\n" in text.rstrip("\n") else text.replace("\r", "\n")).split("\n")


def text_problem(text: str) -> str | None:
    """Why a transcript cannot be what somebody wrote; None if nothing speaks against it."""
    if "\0" in text:
        return "its text holds a NUL character"
    if "\ufffd" in text:
        return "its text holds U+FFFD, which stands for a character that a conversion has lost"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "its text holds half of a surrogate pair"
    return None


def path_problem(name: str) -> str | None:
    """Why a file cannot have this path; None if it can."""
    if not name:
        return "it names no recording"
    if "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        return f"no file can be named {name!a}"
    if any(len(part.encode()) > LONGEST_NAME for part in name.split("/")):
        return f"no file has a name as long as {name[:40] + '…'!r}"
    return None


# Manifests


def read_manifest(path: Path, group: str | None = None, transcribed: bool = True) -> list[Row]:
    """The rows of a JSONL manifest; blank lines are left out.

    `group`: the key of the groups, or None. `transcribed`: whether a line needs a text.
    Raises StudyError for a file that is not UTF-8 text, and where no line has the group's key.
    """
    lines = enumerate(read_lines(path), 1)
    rows = [_manifest_row(path, number, line, group, transcribed) for number, line in lines if line.strip()]
    if group and transcribed and rows and not any(row.group or row.problem for row in rows):
        raise StudyError([f"data.group: no line of {path} has the column {group!r}"])
    return rows


def _manifest_row(path: Path, number: int, line: str, group: str | None, transcribed: bool) -> Row:
    where = f"{path}:{number}"
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return Row.unusable(where, path, f"is not JSON ({error})")
    if not isinstance(row, dict):
        return Row.unusable(where, path, f"must be a JSON object, got {_shown(row)}")
    if problems := list(_manifest_problems(row, group, transcribed)):
        return Row.unusable(where, path, "; ".join(problems))
    return Row(
        where=where,
        id=row["audio"] if row.get("id") is None else str(row["id"]),
        audio=path.parent / row["audio"],
        text=row["text"] if transcribed else "",
        language=row.get("language") or None,
        group=None if group is None or row.get(group) is None else str(row[group]) or None,
        seconds=None if row.get("duration") is None else float(row["duration"]),
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that occurs twice: nobody can say which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _manifest_problems(row: dict[str, Any], group: str | None, transcribed: bool) -> Iterator[str]:
    """The rules of a manifest's line that this one breaks."""
    for key in ("audio", "text") if transcribed else ("audio",):
        if not isinstance(row.get(key), str):
            yield f"`{key}` must be a string, got {_shown(row[key])}" if key in row else f"`{key}` is missing"
    if isinstance(row.get("audio"), str) and (problem := path_problem(row["audio"])):
        yield f"`audio`: {problem}"
    if transcribed and isinstance(row.get("text"), str) and (problem := text_problem(row["text"])):
        yield problem
    allowed: list[tuple[str, str, tuple[type, ...]]] = [("language", "a string", (str,)), ("id", "a string", (str, int))]
    if group is not None:
        allowed.append((group, "a string", (str, int, float, bool)))
    for key, rule, types in allowed:
        value = row.get(key)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            yield f"`{key}` must be {rule}, got {_shown(value)}"
        elif isinstance(value, str) and text_problem(value):
            yield f"`{key}` holds a character that cannot be stored, got {_shown(value)}"
    seconds = row.get("duration")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 < seconds < MOST_SECONDS):
        yield f"`duration` must be a positive number of seconds, got {_shown(seconds)}"


def _shown(value: Any) -> str:
    """A JSON value for an error message, on one line."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


# Common Voice


def read_common_voice(folder: Path, source: CommonVoiceSource, group: str | None = None) -> list[Row]:
    """The rows of a split of one language's folder in an unpacked release; blank lines are left out.

    The folder holds `<split>.tsv`, `clips/`, and in newer releases `clip_durations.tsv`. Raises StudyError where the split's
    table is missing, is not UTF-8, or lacks a column.
    """
    table = folder / f"{source.split}.tsv"
    if not table.is_file():
        raise StudyError(
            [f"{folder}: must be a language's folder of an unpacked Common Voice release, but has no {table.name}"]
        )
    header, *lines = enumerate(read_lines(table), 1)
    lines = [(number, line) for number, line in lines if line.strip()]
    columns = header[1].split("\t")
    check_columns(str(table), columns, "path", "sentence", group)
    if twice := [c for c in ("path", "sentence", "locale", group) if c and columns.count(c) > 1]:
        raise StudyError([f"data: {table} has the column {twice[0]!r} twice"])
    used = {"path", "sentence", "locale", group}
    counts = [line.count("\t") + 1 for _, line in lines]
    cut = _cut_lines(counts, len(columns), columns[0] in used, columns[-1] in used)
    seconds = _clip_seconds(folder / "clip_durations.tsv")
    rows = []
    for i, (number, line) in enumerate(lines):
        where = f"{table}:{number}"
        fields = dict(zip(columns, map(_unquoted, line.split("\t")), strict=False))
        problem = _shape_problem(line, columns) or ("is one half of a row with a line break" if i in cut else None)
        if problem := problem or _common_voice_problem(fields):
            rows.append(Row.unusable(where, table, problem))
            continue
        rows.append(
            Row(
                where=where,
                id=fields["path"],
                audio=folder / "clips" / fields["path"],
                text=fields["sentence"],
                language=source.language or fields.get("locale") or folder.name,
                group=fields[group] or None if group else None,
                seconds=seconds.get(fields["path"]),
            )
        )
    return rows


def _shape_problem(line: str, columns: Sequence[str]) -> str | None:
    count = line.count("\t") + 1
    if count == len(columns):
        return None
    reason = "a tab in a text?" if count > len(columns) else "a line break in a text?"
    return f"has {count} fields, the header has {len(columns)} ({reason})"


def _cut_lines(counts: Sequence[int], width: int, first_is_used: bool, last_is_used: bool) -> set[int]:
    """Indices of lines that have all fields, but whose first or last one may be cut: it continues on a line of one field.

    `counts`: each line's number of fields. A line break inside any other field leaves two lines that are too short.
    """
    found = set()
    for i, count in enumerate(counts):
        if count != 1 or width == 1:
            continue
        if last_is_used and i > 0 and counts[i - 1] == width:
            found.add(i - 1)
        if first_is_used and i + 1 < len(counts) and counts[i + 1] == width:
            found.add(i + 1)
    return found


def _unquoted(field: str) -> str:
    """The field without CSV quotes. Common Voice writes none; a table that was saved by a spreadsheet or pandas has them around
    texts with quotation marks, which are doubled there. A text in quotation marks of its own stays as it is."""
    inside = field[1:-1]
    if len(field) > 3 and field[0] == field[-1] == '"' and '""' in inside and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return field


def _common_voice_problem(fields: dict[str, str]) -> str | None:
    if problem := path_problem(fields["path"]) or text_problem(fields["sentence"]):
        return problem
    for name in VOTES:
        if not re.fullmatch(r"[0-9]*", fields.get(name, "")):
            return f"{name} must be a number, got {fields[name]!r}: fields have shifted"
    return None


def _clip_seconds(table: Path) -> dict[str, float]:
    """Seconds by clip. A line that cannot be trusted gives none: the recording itself is then asked for its length."""
    lines = read_lines(table) if table.is_file() else []
    if not lines or lines[0].split("\t") != CLIP_DURATIONS:
        return {}
    seconds: dict[str, float] = {}
    unclear: set[str] = set()
    for line in lines[1:]:
        clip, *rest = line.split("\t")
        is_number = len(rest) == 1 and re.fullmatch(r"\d{1,9}(\.\d+)?", rest[0], re.ASCII)
        told = float(rest[0]) / 1000 if is_number else 0.0
        if told == 0 or seconds.setdefault(clip, told) != told:
            unclear.add(clip)
    return {clip: s for clip, s in seconds.items() if clip not in unclear}


def check_columns(where: str, there: Sequence[str], *wanted: str | None) -> None:
    """Raises StudyError if a wanted column is not there."""
    if missing := [name for name in wanted if name and name not in there]:
        raise StudyError([f"data: {where} has no column {missing[0]!r}; it has {', '.join(there)}"])
