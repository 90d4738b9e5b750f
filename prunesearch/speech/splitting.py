"""One manifest becomes three: train, dev and test, without a speaker (or, where none is known, a text) in two of them."""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunesearch.speech.tables import read_lines, read_manifest
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically

SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
SPLITS = ("train", "dev", "test")
SHARES = {"test": 0.15, "dev": 0.15}  # of the utterances, at least; train gets the rest
MOST_SHOWN = 20


@dataclass(frozen=True)
class Splitting:
    """What was written. `unit`: what no two splits share: a column of speakers, or `text`. `utterances`: by split."""

    unit: str
    utterances: dict[str, int]


def split_manifest(manifest: Path, folder: Path) -> Splitting:
    """Write `train.jsonl`, `dev.jsonl` and `test.jsonl` to the folder, with all columns and paths that hold from there.

    The same manifest is always split alike. Raises StudyError for lines that are no utterances, where fewer than three speakers
    (or texts) are told apart, and where one of the files exists already.
    """
    if not manifest.is_file():
        raise StudyError([f"--data: there is no file {manifest}"])
    if there := [file for split in SPLITS if (file := folder / f"{split}.jsonl").exists()]:
        raise StudyError([f"--data: {there[0]} exists already, and is not overwritten: choose another name, or move it away"])
    wrong = [f"{row.where}: {row.problem}" for row in read_manifest(manifest) if row.problem]
    if wrong:
        more = [f"… and {len(wrong) - MOST_SHOWN} more"] if len(wrong) > MOST_SHOWN else []
        raise StudyError([*wrong[:MOST_SHOWN], *more])
    rows: list[dict[str, Any]] = [json.loads(line) for line in read_lines(manifest) if line.strip()]
    unit = next((column for column in SPEAKER_COLUMNS if _tells_apart(rows, column)), "text")
    names = sorted({str(row[unit]) for row in rows})
    if len(names) < 3:
        raise StudyError([f"--data: {manifest} must have at least three different texts to be split, got {len(names)}"])
    split_of = _assigned(rows, unit, names)
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for row in rows:
        audio = os.path.relpath(manifest.parent / row["audio"], folder)
        found[split_of[str(row[unit])]].append({**row, "audio": audio})
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in found.items():
        write_atomically(folder / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
    return Splitting(unit, {split: len(chosen) for split, chosen in found.items()})


def _tells_apart(rows: Sequence[dict[str, Any]], column: str) -> bool:
    """Whether every row has the column, and at least three values occur in it."""
    return all(row.get(column) not in (None, "") for row in rows) and len({str(row[column]) for row in rows}) >= 3


def _assigned(rows: Sequence[dict[str, Any]], unit: str, names: Sequence[str]) -> dict[str, str]:
    """The split of each unit: in a random order that never changes, test is filled first, then dev, each to its share."""
    sizes = dict.fromkeys(names, 0)
    for row in rows:
        sizes[str(row[unit])] += 1
    waiting = list(names)
    random.Random(0).shuffle(waiting)
    split_of = {}
    for split, share in SHARES.items():
        filled = 0
        while filled < share * len(rows) and (len(waiting) > 2 or not filled):
            name = waiting.pop()
            split_of[name], filled = split, filled + sizes[name]
    return {**split_of, **dict.fromkeys(waiting, "train")}
