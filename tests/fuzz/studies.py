"""Damaged studies: journals, records, utterances and scans, cut, overwritten, mixed and doubled.

What was written is known, so that the oracle needs no second reader: a damaged file is read as it was before the damage (a
journal also as it was at an earlier moment, if only its end is damaged), or one line names it.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from prunesearch.study.candidate import Candidate
from prunesearch.study.errors import StudyError
from prunesearch.study.record import (
    Parameters,
    RunRecord,
    SplitResult,
    UtteranceResult,
    WordErrors,
    read_record,
    read_utterances,
    write_record,
    write_utterances,
)
from prunesearch.workers.journal import open_journal
from tests.fuzz import FuzzResult

Trials = list[tuple[Any, ...]]  # number, state, values, parameters, attributes
LINES = 4  # damaged at most at once


# --- mutations of bytes: what power losses, full disks, copies and editors do ---


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _nuls(content: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(content))
    count = rng.randint(1, min(len(content) - first, rng.choice([8, 200, 4096])))
    return content[:first] + bytes(count) + content[first + count :]


def _chunk_lost(content: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(content))
    return content[:first] + content[first + rng.randint(1, rng.choice([8, 300, 4096])) :]


def _chunk_doubled(content: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(content))
    last = first + rng.randint(1, rng.choice([8, 300, 4096]))
    return content[:last] + content[first:last] + content[last:]


def _block_lost(content: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(content))
    return content[:first] + content[first + rng.randint(64, 4096) :]


def _block_doubled(content: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(content))
    last = first + rng.randint(64, 4096)
    return content[:last] + content[first:last] + content[last:]


def _lines(change: Callable[[list[bytes], random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    def mutate(content: bytes, rng: random.Random) -> bytes:
        lines = content.splitlines(keepends=True)
        change(lines, rng)
        return b"".join(lines)

    return mutate


def _line_lost(lines: list[bytes], rng: random.Random) -> None:
    first = rng.randrange(len(lines))
    del lines[first : first + rng.randint(1, LINES)]


def _line_doubled(lines: list[bytes], rng: random.Random) -> None:
    first = rng.randrange(len(lines))
    lines[first:first] = lines[first : first + rng.randint(1, LINES)]


def _lines_swapped(lines: list[bytes], rng: random.Random) -> None:
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]


def _line_cut(lines: list[bytes], rng: random.Random) -> None:
    place = rng.randrange(len(lines))
    lines[place] = lines[place][: rng.randrange(len(lines[place]))] + rng.choice([b"", b"\n"])


def _junk_line(lines: list[bytes], rng: random.Random) -> None:
    junk = rng.choice([b"\n", b"null\n", b"[]\n", b"{}\n", b'{"op_code":99}\n', b"\xff\xfe\n", b"<<<<<<< HEAD\n"])
    lines.insert(rng.randrange(1, len(lines) + 1), junk)


def _windows_lines(content: bytes, rng: random.Random) -> bytes:
    return content.replace(b"\n", b"\r\n")


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "unchanged": lambda content, rng: content,
    "cut": _cut,
    "NULs": _nuls,
    "chunk lost": _chunk_lost,
    "chunk doubled": _chunk_doubled,
    "line lost": _lines(_line_lost),
    "line doubled": _lines(_line_doubled),
    "lines swapped": _lines(_lines_swapped),
    "line cut": _lines(_line_cut),
    "junk line": _lines(_junk_line),
    "Windows lines": _windows_lines,
    "empty": lambda content, rng: b"",
}

# Lines of a journal have checks. Other files have none: that a number lost its last digit, or has it twice, cannot be known.
FILE_MUTATIONS = {
    name: mutate for name, mutate in MUTATIONS.items() if name not in ("chunk lost", "chunk doubled", "line cut")
} | {"block lost": _block_lost, "block doubled": _block_doubled}


# --- what is damaged: a journal, and a record with its utterances ---


def _trials(journal: Path) -> Trials:
    storage = open_journal(journal)
    names = [study.study_name for study in storage.get_all_studies()]
    if not names:
        return []
    trials = optuna.load_study(study_name=names[0], storage=storage).get_trials(deepcopy=False)
    return [(t.number, t.state, t.values, t.params, dict(t.user_attrs)) for t in trials]


def _write_journal(journal: Path, rng: random.Random) -> Iterator[Trials]:
    """Write a small study, and yield its trials after each change."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield []
    study = optuna.create_study(study_name="s", storage=open_journal(journal), directions=["minimize"] * 2)
    yield _trials(journal)
    for number in range(3):
        trial = study.ask()
        yield _trials(journal)
        trial.set_user_attr("candidate", f"minus-{number}")
        yield _trials(journal)
        trial.suggest_int("lora_rank", 0, 8)
        yield _trials(journal)
        study.tell(trial, [rng.random(), rng.random()], state=TrialState.COMPLETE)
        yield _trials(journal)


def _try_journal(folder: Path, content: bytes, moments: list[Trials]) -> str | None:
    """Whether a damaged journal is read as it was at a moment (`read`), or named (`named`); None if neither is true."""
    journal = folder / "journal.log"
    journal.write_bytes(content)
    try:
        found = _trials(journal)
    except StudyError as error:
        return "named" if len(error.lines) == 1 and str(journal) in error.lines[0] else None
    return "read" if found in moments else None


def _write_record(records: Path, rng: random.Random) -> tuple[RunRecord, list[UtteranceResult]]:
    results = []
    for i in range(5):
        errors = WordErrors(substitutions=rng.randint(1, 3), reference_words=9)
        results.append(UtteranceResult(id=f"u{i}", reference="a b", hypothesis=rng.choice(["a", "\u2028", "ß"]), errors=errors))
    record = RunRecord(
        study="s", encoder_layers=4, removed_layers=(2,), lora_rank=2, seed=0, state="complete", steps=3,
        dev=SplitResult.of(results), parameters=Parameters(encoder=5, projector=3, lora=1, llm=11),
    )  # fmt: skip
    write_record(records, record)
    write_utterances(records, record.candidate, "dev", results)
    return record, results


def _try_record(records: Path, content: bytes, whole: RunRecord) -> str | None:
    path = records / whole.candidate.key / "record.json"
    path.write_bytes(content)
    try:
        found = read_record(records, Candidate((2,), 2), "s")
    except StudyError as error:
        return "named" if len(error.lines) == 1 and str(path) in error.lines[0] else None
    return "read" if found is not None and found.outcome() == whole.outcome() else None


def _try_utterances(records: Path, content: bytes, whole: RunRecord, results: list[UtteranceResult]) -> str | None:
    path = records / whole.candidate.key / "dev.jsonl"
    path.write_bytes(content)
    try:
        found = read_utterances(records, whole.candidate, "dev", whole.dev)
    except StudyError as error:
        return "named" if len(error.lines) == 1 and str(path) in error.lines[0] else None
    return "read" if found is not None and sorted(found, key=lambda u: u.id) == results else None


def fuzz(seed: int, seconds: float | None, count: int | None) -> FuzzResult:
    """Damage studies until `count` files were tried, or `seconds` are over."""
    rng, result, begin = random.Random(seed), FuzzResult(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moments = list(_write_journal(folder / "journal.log", rng))
        record, results = _write_record(folder, rng)
        own = folder / record.candidate.key
        tries: dict[Path, Callable[[bytes], str | None]] = {
            folder / "journal.log": lambda content: _try_journal(folder, content, moments),
            own / "record.json": lambda content: _try_record(folder, content, record),
            own / "dev.jsonl": lambda content: _try_utterances(folder, content, record, results),
        }
        whole = {path: path.read_bytes() for path in tries}
        while (count is None or result.tried < count) and (seconds is None or time.monotonic() - begin < seconds):
            path = rng.choice(list(tries))
            mutations = MUTATIONS if path.name == "journal.log" else FILE_MUTATIONS
            mutation = rng.choice(list(mutations))
            content = mutations[mutation](whole[path], rng)
            told = f"seed {seed}, try {result.tried}: {path.name}, {mutation}"
            result.tried += 1
            try:
                outcome = tries[path](content)
            except Exception as error:
                result.wrong.append(f"{told}: {type(error).__name__}: {error}")
                continue
            result.read += outcome == "read"
            result.named += outcome == "named"
            if outcome is None or (mutation == "unchanged" and outcome != "read"):
                result.wrong.append(told)
            path.write_bytes(whole[path])
    return result
