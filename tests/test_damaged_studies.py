"""Damaged, misplaced and read-only files of a study: read as they were, made again, or named in one line."""

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prunesearch.commands.launch import launch
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError, user_error_lines
from prunesearch.study.files import read_json, write_atomically
from prunesearch.study.record import read_records
from tests.conftest import write_study
from tests.fuzz.studies import fuzz
from tests.workers_helpers import command

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study."""
    file = write_study(tmp_path_factory.mktemp("finished") / "s", toy)
    launch(file)
    return file.parent


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "s"))


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def nuls(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])


def without_line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2] + lines[len(lines) // 2 + 1 :]))


def line_cut(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5][:20]
    path.write_bytes(b"".join(lines))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [nuls, without_line, line_cut])
def test_a_journal_that_is_damaged_in_the_middle_is_named_and_its_records_are_taken_again(study: Path, damage: Damage) -> None:
    journal, before = study / "run" / "journal.log", read_records(study / "run" / "records")
    damage(journal)
    for verb in ("status", "launch", "abort", "retry"):
        error = command(verb, study).error
        assert error.startswith(f"{journal}: line ")
        assert "restore the file from a copy; or move it away and launch the study again" in error
    journal.rename(study / "away")
    assert command("launch", study).code == 0
    assert json.loads(command("status", study, "--json").out)["settled"] == len(before)
    assert read_records(study / "run" / "records") == before, "nothing was trained again"


@pytest.mark.parametrize("tail", [b'{"op_code":8,"work', bytes(300), b'{"op_code":8' + bytes(99) + b"\n"])
def test_a_last_line_that_was_not_written_to_its_end_is_cut_off(study: Path, tail: bytes) -> None:
    journal = study / "run" / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    assert command("status", study).code == 0
    assert journal.read_bytes() == whole


def test_a_file_that_is_no_journal_is_named_and_stays_as_it_is(study: Path) -> None:
    other = study / "notes.txt"
    other.write_text("not a journal")
    assert "is not a line of a journal" in command("launch", study, "--storage", f"journal://{other}").error
    assert other.read_text() == "not a journal"


@pytest.mark.parametrize("damage", [half, lambda path: path.write_bytes(os.urandom(9000))])
def test_a_damaged_sqlite_file_is_named(study: Path, damage: Damage) -> None:
    url = f"sqlite:///{study}/study.db"
    assert command("launch", study, "--storage", url).code == 0
    with contextlib.closing(sqlite3.connect(study / "study.db")) as connection:
        connection.execute("VACUUM")
    damage(study / "study.db")
    error = command("status", study, "--storage", url).error
    assert "study.db" in error
    assert "restore the file from a copy" in error


NAMED: list[tuple[str, Damage, str, list[str]]] = [
    ("records/full/record.json", half, "the record is cut off", ["report", "launch", "export --out {out}"]),
    ("records/full/record.json", empty, "the record is empty", ["report", "measure"]),
    ("records/full/record.json", folder_instead, "Is a directory", ["report", "launch"]),
    ("records/full/test.jsonl", half, "the file is cut off in line", ["report"]),
    ("records/full/test.jsonl", without_line, "must hold the record's 6 utterances", ["report"]),
    ("records/full/weights.safetensors", half, "is cut off or damaged", ["export --candidate full --out {out}"]),
    ("records/full/weights.safetensors", empty, "is empty", ["export --candidate full --out {out}", "measure"]),
    ("scan/scan.json", half, "is cut off, or is not JSON", ["report", "launch --trials 7"]),
    ("scan/scan.json", empty, "is empty", ["report"]),
    ("anchor/projector.safetensors", half, "is cut off or damaged", ["launch --trials 7"]),
]


@pytest.mark.parametrize(("name", "damage", "rule", "commands"), NAMED)
def test_a_damaged_file_is_named_with_the_way_out(
    study: Path, tmp_path: Path, name: str, damage: Damage, rule: str, commands: list[str]
) -> None:
    path = study / "run" / name
    damage(path)
    for words in commands:
        verb, *options = words.format(out=tmp_path / "out").split()
        error = command(verb, study, *options).errors[-1]
        assert error.startswith(str(path))
        assert rule in error
        assert any(way in error for way in ("restore", "delete", "move the folder away"))


NUMBERS = ["features/*.states", "records/*/encoder.safetensors"]  # a change of a number cannot be noticed
MADE_AGAIN = ["corpus/*.json", "features/*.json", *NUMBERS]


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        (pattern, damage)
        for pattern in MADE_AGAIN
        for damage in (half, empty, nuls)
        if damage is not nuls or pattern not in NUMBERS
    ],
)
def test_a_file_that_can_be_made_again_is_made_again(study: Path, pattern: str, damage: Damage) -> None:
    files = {path: path.read_bytes() for path in sorted((study / "run").glob(pattern))}
    assert files
    record = next(r for r in read_records(study / "run" / "records") if r.candidate.key == "minus-2-3")
    shutil.rmtree(study / "run" / "records" / "minus-2-3")
    for path in files:
        if path.exists():
            damage(path)
    assert command("retry", study).out == "re-queued: minus-2-3\n"
    done = command("launch", study)
    assert done.code == 0, done.err
    again = next(r for r in read_records(study / "run" / "records") if r.candidate.key == "minus-2-3")
    assert again.outcome() == record.outcome()
    if not pattern.startswith("records"):
        assert "it is made again" in done.err
        assert {path: path.read_bytes() for path in files if "test" not in path.name} == {
            path: content for path, content in files.items() if "test" not in path.name
        }


@pytest.mark.parametrize(
    "content",
    [b"", b"PK garbage", {"weights": 1}, {"of": "another", "weights": {}, "optimizer": {"state": {}}, "progressed": {}}],
)
def test_a_checkpoint_that_does_not_fit_is_not_continued(study: Path, content: object) -> None:
    folder = study / "run" / "records" / "minus-2-3"
    record = next(r for r in read_records(folder.parent) if r.candidate.key == folder.name)
    (folder / "record.json").unlink()
    torch.save(content, folder / "checkpoint.pt")
    if isinstance(content, bytes):
        (folder / "checkpoint.pt").write_bytes(content)
    assert command("retry", study).code == 0
    done = command("launch", study)
    assert done.code == 0, done.err
    assert f"{folder}/checkpoint.pt: the checkpoint " in done.err
    again = next(r for r in read_records(folder.parent) if r.candidate.key == folder.name)
    assert again.outcome() == record.outcome()


def test_a_record_in_the_wrong_place_is_named(study: Path) -> None:
    records = study / "run" / "records"
    shutil.copytree(records / "full", records / "minus-1")
    assert "named after the record's candidate, full, got minus-1: delete the folder" in command("report", study).error
    shutil.rmtree(records / "minus-1")
    record = json.loads((records / "full" / "record.json").read_text())
    (records / "full" / "record.json").write_text(json.dumps(record | {"study": "other"}))
    for verb in ("report", "launch"):
        assert "belongs to the study other, this study is s" in command(verb, study).error


@pytest.mark.parametrize("verb", ["status", "report", "launch", "retry", "export"])
def test_a_renamed_study_folder_is_named_with_the_line_to_add(study: Path, verb: str) -> None:
    renamed = study.rename(study.with_name("renamed"))
    out = ["--out", renamed / "out"] if verb == "export" else []
    assert 'add name = "s" to' in command(verb, renamed, *out).error
    file = renamed / "study.toml"
    file.write_text('name = "s"\n' + file.read_text())
    assert command(verb, renamed, *out).code == 0


def test_a_study_file_is_utf8_with_or_without_a_byte_order_mark(study: Path) -> None:
    file, text = study / "study.toml", (study / "study.toml").read_text()
    plain = load_study(file)
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_study(file) == plain
    for content, rule in (
        (text.encode("utf-16"), "encoded as UTF-8, line 1"),
        (text.encode() + b"# \xe5\n", f"encoded as UTF-8, line {text.count(chr(10)) + 1}"),
        (text.encode() + bytes(9), "not valid TOML: it holds NUL characters"),
    ):
        file.write_bytes(content)
        assert rule in command("validate", study).error


# --- no right to write, or to read ---


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of the superuser, which containers often have."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(finished: Path, toy: Path) -> Iterator[Path]:
    """The finished study in a folder that everybody may read and nobody may write."""
    with tempfile.TemporaryDirectory() as name:
        study = Path(shutil.copytree(finished, Path(name) / "s"))
        file = study / "study.toml"
        file.write_text(file.read_text().replace(str(toy), "nowhere"))  # pytest's folders cannot be read by others
        for path in (Path(name), study, *study.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield study
        for path in (Path(name), study, *study.rglob("*")):
            path.chmod(0o777)


def test_a_study_that_cannot_be_written_can_be_looked_at(read_only: Path, finished: Path, tmp_path: Path) -> None:
    status, report = command("status", finished, "--json").out, command("report", finished, "--json").out  # also imports all
    before = sorted(read_only.rglob("*"))
    with as_nobody():
        seen = command("status", read_only, "--json")
        shown = command("report", read_only, "--json")
        changed = command("abort", read_only)
    assert json.loads(seen.out) == json.loads(status)
    assert json.loads(shown.out) == json.loads(report)
    assert (seen.code, shown.code) == (0, 0)
    assert shown.err.splitlines()[0].startswith("the report was not written: Permission denied: ")
    assert "--out FOLDER" in shown.err
    assert changed.error.startswith(f"{read_only}/run/journal.log: Permission denied: ")
    assert sorted(read_only.rglob("*")) == before


def test_a_file_that_may_not_be_read_is_one_line(read_only: Path, finished: Path) -> None:
    command("report", finished)
    record = read_only / "run" / "records" / "full" / "record.json"
    record.chmod(0)
    with as_nobody():
        assert command("report", read_only).error.startswith(f"{record}: Permission denied: ")
    (read_only / "study.toml").chmod(0)
    with as_nobody():
        assert command("status", read_only).error.startswith(f"{read_only}/study.toml: Permission denied: ")


def test_a_full_disk_is_one_line_with_the_path(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(study / "run")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(study / "new" / "file", "x")
    assert user_error_lines(caught.value) == [
        f"{study}/new/file: No space left on device: free space there, and run the same command again: finished work is kept"
    ]


def test_an_error_of_ours_stays_an_error_of_ours() -> None:
    for error in (
        ValueError("x"),
        FileNotFoundError(errno.ENOENT, "gone", "file"),
        ConnectionError("away"),
        OSError("no number"),
    ):
        assert user_error_lines(error) is None


@pytest.mark.parametrize(
    ("content", "rule"),
    [(b"", "is empty"), (bytes(9), "is empty"), (b'{"a": ', "is cut off"), (b'{"a": "x"}', "other content")],
)
def test_a_json_file_is_read_whole_or_named(tmp_path: Path, content: bytes, rule: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(StudyError, match=rule) as caught:
        read_json(file, dict[str, int], "delete it")
    (line,) = caught.value.lines
    assert line.startswith(f"{file}: ")
    assert line.endswith(": delete it")
    file.write_bytes(b'{"a": 1}')
    assert read_json(file, dict[str, int], "delete it") == {"a": 1}


def test_damaged_studies_are_read_as_they_were_or_named() -> None:
    result = fuzz(seed=0, seconds=None, count=600)
    assert not result.wrong, "\n".join(result.wrong)
    assert result.read > 100
    assert result.named > 100
