"""Tables under structural mutations. The rows that were written are the oracle: each is read unchanged, or named."""

import csv
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prunesearch.speech.tables import Row, read_common_voice, read_manifest
from prunesearch.study.errors import StudyError
from prunesearch.study.sources import CommonVoiceSource
from tests.fuzz import FuzzResult

COLUMNS = ("client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accents", "locale")
ALPHABET = "abc æøåéĳ'\"‘’,;\\{}[]:कि\u2028\u0085\u00a0"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1")
Table = list[dict[str, str]]


def fuzz(seed: int, seconds: float | None, count: int | None) -> FuzzResult:
    """Mutate tables until `seconds` have passed or `count` tables were tried; None: no such limit."""
    result, rng, end = FuzzResult(), random.Random(seed), None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        while (count is None or result.tried < count) and (end is None or time.monotonic() < end):
            rows = [_row(rng, i) for i in range(rng.randint(1, 6))]
            write, read = rng.choice(((_write_tsv, _read_tsv), (_write_jsonl, _read_jsonl)))
            content, label = write(rng, rows)
            _judge(result, rows, content, label, Path(scratch), read)
    return result


def _row(rng: random.Random, number: int) -> dict[str, str]:
    text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 12))).strip()
    row = {"client_id": f"c{number}", "path": f"{number}.mp3", "sentence": text or "x", "up_votes": "2", "down_votes": "0"}
    return row | {"age": rng.choice(("", "fourties")), "gender": rng.choice(("male", "female")), "accents": "", "locale": "da"}


def _judge(
    result: FuzzResult, rows: Table, content: bytes, label: str, folder: Path, read: Callable[[Path, bytes], list[Row]]
) -> None:
    """Count one table: every row that was read must be one that was written."""
    result.tried += 1
    is_whole = label.removesuffix(" with a blank line") in ("tsv", "jsonl")
    try:
        found = read(folder, content)
    except StudyError as error:
        result.named += 1
        if is_whole:
            result.wrong.append(f"{label}: refused: {error}")
        if any("\n" in line or not line.strip() for line in error.lines):
            result.wrong.append(f"{label}: the message is not one line: {error.lines}")
        return
    except Exception as error:  # a traceback is what must never happen
        result.wrong.append(f"{label}: {error!r}")
        return
    # a text that happens to be a whole CSV field may also be one that a spreadsheet has saved: csv decides
    texts = ((row, text) for row in rows for text in (row["sentence"], next(csv.reader([row["sentence"]], delimiter="\t"))[0]))
    written = {(row["path"], text, row["gender"] or None) for row, text in texts}
    usable = [row for row in found if row.problem is None]
    problems = len(found) - len(usable)
    result.read += problems == 0
    result.named += problems > 0
    if is_whole and problems:
        result.wrong.append(f"{label}: refused: {next(row.problem for row in found if row.problem)}")
    if strange := [row for row in usable if (row.id, row.text, row.group) not in written]:
        result.wrong.append(f"{label}: read {strange[0].id!r} {strange[0].text!r} {strange[0].group!r} in silence")
    if len({row.id for row in usable}) < len(rows) and not problems and "loses" not in label:
        result.wrong.append(f"{label}: {len(rows)} rows were written, {len(usable)} were read, and no line is named")


def _encoded(rng: random.Random, text: str, label: str) -> tuple[bytes, str]:
    encoding = rng.choice(ENCODINGS) if rng.random() < 0.4 else "utf-8"
    try:
        content = text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(), label
    if encoding in ("cp1252", "latin-1") and _is_utf8(content):  # ASCII only, or by chance: nobody can tell
        return text.encode(), label
    return content, label if encoding.startswith("utf-8") else f"{label} in {encoding}"


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _write_tsv(rng: random.Random, rows: Table) -> tuple[bytes, str]:
    lines = ["\t".join(COLUMNS), *("\t".join(row[c] for c in COLUMNS) for row in rows)]
    i, label = rng.randint(1, len(rows)), "tsv"
    fields = lines[i].split("\t")
    match rng.randint(0, 6):
        case 0:  # a tab or a line break inside a field that is used
            where, what = rng.choice((1, 2, 6)), rng.choice(("\t", "\n", "\n\n"))
            fields[where] = f"{fields[where]}{what}half"
            lines[i], label = "\t".join(fields), f"tsv with {what!r} in {COLUMNS[where]}"
        case 1:
            lines[i], label = "\t".join(fields[: rng.randint(1, len(fields) - 1)]), "tsv with a short row"
        case 2:
            lines[i], label = "\t".join([*fields, "more"]), "tsv with a long row"
        case 3:  # two faults that leave the number of fields as it was
            fields[2] = f"{fields[2]}\thalf"
            lines[i], label = "\t".join(fields[:-1]), "tsv with a tab and a lost field"
        case 4:
            lines.insert(i, rng.choice(("", "  ")))
            label = "tsv with a blank line"
        case 5:
            lines.append("(9 rows)")
            label = "tsv with a footer"
    return _encoded(rng, rng.choice(("\n", "\r\n")).join(lines) + rng.choice(("", "\n", "\n\n")), label)


def _read_tsv(folder: Path, content: bytes) -> list[Row]:
    (folder / "dev.tsv").write_bytes(content)
    return read_common_voice(folder, CommonVoiceSource(common_voice=str(folder), split="dev"), "gender")


def _write_jsonl(rng: random.Random, rows: Table) -> tuple[bytes, str]:
    ascii_only = rng.random() < 0.5
    lines = [
        json.dumps({"audio": row["path"], "text": row["sentence"], "gender": row["gender"]}, ensure_ascii=ascii_only)
        for row in rows
    ]
    i, label = rng.randrange(len(rows)), "jsonl"
    match rng.randint(0, 5):
        case 0:
            key, value = rng.choice(("audio", "text", "gender", "language", "duration", "id")), rng.choice(WRONG_VALUES)
            lines[i] = json.dumps({**json.loads(lines[i]), key: value}, ensure_ascii=ascii_only)
            label = f"jsonl with {key} {value!r}" + (" loses" if key in ("gender", "id") else "")
            rows[i] |= {"gender": str(value)} if key == "gender" and isinstance(value, int | float) else {}
            if value is None and key == "gender":
                rows[i]["gender"] = ""
            if key == "id" and isinstance(value, int) and not isinstance(value, bool):
                rows[i]["path"] = str(value)
        case 1:
            lines[i], label = lines[i][: rng.randrange(1, len(lines[i]))], "jsonl with a cut line"
        case 2:
            lines[i], label = lines[i][:-1] + ', "text": "another"}', "jsonl with a key that occurs twice"
        case 3:
            cut = rng.randrange(1, len(lines[i]))
            lines[i], label = lines[i][:cut] + "\n" + lines[i][cut:], "jsonl with a split line"
        case 4:
            lines.insert(i, rng.choice(("", " \t")))
            label = "jsonl with a blank line"
    return _encoded(rng, rng.choice(("\n", "\r\n", "\r")).join(lines) + rng.choice(("", "\n")), label)


WRONG_VALUES = (None, 5, -1, 0, True, [], {}, [1], {"a": 1}, float("nan"), float("inf"))


def _read_jsonl(folder: Path, content: bytes) -> list[Row]:
    (folder / "dev.jsonl").write_bytes(content)
    return read_manifest(folder / "dev.jsonl", "gender", transcribed=True)
