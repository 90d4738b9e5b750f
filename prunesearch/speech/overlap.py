"""Recordings that two splits of a study share: results on such a split say less about new speech."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from prunesearch.speech.audio import Cell, Recording
from prunesearch.speech.corpus import Utterance
from prunesearch.study.config import Split

COMPARED_BYTES = 1 << 16  # at each end of a recording: two encodings of different speech differ there


def shared_recordings(corpora: Mapping[Split, Sequence[Utterance]]) -> list[str]:
    """One line for each two splits that share recordings; train and repair may.

    Two recordings are the same if their sizes and the bytes at both ends are, whatever their names. Only recordings whose size
    occurs in more than one split are read.
    """
    by_size: dict[int, list[tuple[Split, Utterance]]] = defaultdict(list)
    for split, utterances in corpora.items():
        for utterance in utterances:
            by_size[_size(utterance.audio)].append((split, utterance))
    found: dict[Split, dict[str, str]] = {split: {} for split in corpora}  # digest -> id
    for size, those in by_size.items():
        if size and len({split for split, _ in those}) > 1:
            for split, utterance in those:
                found[split].setdefault(_digest(utterance.audio), utterance.id)
    lines = []
    for a, b in itertools.combinations(corpora, 2):
        both = [digest for digest in found[a] if digest in found[b]]
        if both and {a, b} != {"train", "repair"}:
            first = f"the first is {found[a][both[0]]} in {a} and {found[b][both[0]]} in {b}"
            lines.append(f"data.{a} and data.{b} share {len(both)} recordings, {first}: give each split its own")
    return lines


def _size(recording: Recording) -> int:
    """Bytes of a file or of a dataset's cell; 0 where there is nothing."""
    if isinstance(recording, Cell):
        return int(recording.dataset.size(recording.row))
    return recording.stat().st_size if recording.is_file() else 0


def _digest(recording: Recording) -> str:
    if isinstance(recording, Cell):
        content = recording.dataset[recording.row][recording.column]["bytes"]
        ends = content[:COMPARED_BYTES], content[-COMPARED_BYTES:]
    else:
        ends = _ends_of_file(recording)
    return hashlib.blake2b(b"".join(ends), digest_size=16).hexdigest()


def _ends_of_file(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as file:
        start = file.read(COMPARED_BYTES)
        file.seek(max(0, path.stat().st_size - COMPARED_BYTES))
        return start, file.read(COMPARED_BYTES)
