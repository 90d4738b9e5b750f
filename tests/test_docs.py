"""What the documents say is so: links, command lines, keys of study files, Python examples, the table of rooms."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from prunesearch.commands.launch import launch
from prunesearch.study.config import StudyConfig
from tests.command_lines import check_flags, check_whole, flags, leaf_commands
from tests.conftest import write_study

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "deploy", "studies", "benchmarks", ".github")
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")))
    if not any(part == "run" or part.startswith("run-") for part in page.relative_to(ROOT).parts)
)
USER_PAGES = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs") and page.name != "CHANGELOG.md"]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
CALL = re.compile(r"(?:^|[\s/])(?:prunesearch|cli\.py)\s+([a-z][^|&;>]*)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_and_prose(page: Path) -> tuple[list[str], list[str]]:
    """The lines of code blocks (indented or fenced), and all other lines."""
    code, prose, fenced, before = list[str](), list[str](), False, ""
    for line in page.read_text(encoding="utf-8").split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (not before.strip() or before == code[-1:][0])):
            code.append(line)
        else:
            prose.append(line)
        before = line
    return code, prose


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_point_to_existing_files(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, here\n[a](page.md#a-heading-here) [b](page.md#elsewhere) [c](gone.md) [d](https://example.org)"
    )
    assert broken_links(page) == ["page.md#elsewhere", "gone.md"]


def calls(lines: list[str]) -> list[list[str]]:
    """The arguments of each `prunesearch …` or `cli.py …` in lines of code."""
    return [shlex.split(call[1].rstrip("\\"), comments=True) for line in lines if (call := CALL.search(line))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_can_be_run(page: Path) -> None:
    code, prose = code_and_prose(page)
    for arguments in calls(code):
        check_whole(arguments)
    for arguments in calls([span for line in prose for span in INLINE_CODE.findall(line)]):
        check_flags(arguments)


def test_the_user_pages_show_every_command() -> None:
    code = [line for page in USER_PAGES for line in code_and_prose(page)[0]]
    shown = {" ".join(arguments) for arguments in calls(code)}
    for command in leaf_commands():
        assert any(command.name in line.split()[:2] for line in shown), f"no page shows {command.name}"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("launsh studies/mine", "launsh"),
        ("launch studies/mine --worker 2", "--worker"),
        ("launch studies/mine --workers two", "integer"),
        ("launch", "study"),
        ("export studies/mine", "out"),
    ],
)
def test_a_command_line_that_cannot_be_run_is_found(arguments: str, problem: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - ValueError or one of typer's
        check_whole(arguments.split())
    assert problem in f"{caught.value!r} {vars(caught.value)} {getattr(caught.value, 'param', None)}"


@pytest.mark.parametrize("page", USER_PAGES, ids=name)
def test_flags_and_keys_named_in_prose_exist(page: Path) -> None:
    known = {flag for command in leaf_commands() for flag in flags(command)}
    spans = [span for line in code_and_prose(page)[1] for span in INLINE_CODE.findall(line)]
    for span in spans:
        if span.startswith("--"):
            assert re.split(r"[ =]", span)[0] in known, span
        key = re.match(r"([a-z]+)\.(\w+)", span)
        if key and key[1] in StudyConfig.model_fields and not span.endswith((".safetensors", ".json")):
            annotation: Any = StudyConfig.model_fields[key[1]].annotation
            section = next((a for a in get_args(annotation) if a is not type(None)), annotation)  # a section may be optional
            assert key[2] in section.model_fields, span


def table_rows(page: Path, header: str) -> list[list[str]]:
    """The cells of the table under this header line."""
    lines = page.read_text(encoding="utf-8").split("\n")
    start = lines.index(header) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_report_page_lists_every_table() -> None:
    from prunesearch.report.tables import TABLES

    rows = table_rows(ROOT / "docs" / "report.md", "| table | content |")
    assert [table for row in rows for table in re.findall(r"`([\w-]+)`", row[0])] == list(TABLES)


def test_the_table_of_rooms_is_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    contract = [{room.strip() for room in re.split(r"[|:]", layer)} for layer in reversed(layers)]

    table: dict[int, set[str]] = {}
    for floor, room, *_ in table_rows(ROOT / "CONTRIBUTING.md", "| floor | room | what it does |"):
        table.setdefault(int(floor), set()).add(room.strip("`/"))
    assert [table[floor] for floor in sorted(table)] == contract
    assert sorted(table) == list(range(len(contract)))
    folders = {folder.name for folder in (ROOT / "prunesearch").iterdir() if (folder / "__init__.py").exists()}
    assert set.union(*contract) == folders


def python_blocks(page: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "\n".join(blocks)


@pytest.fixture(scope="module")
def study(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has been run."""
    folder = tmp_path_factory.mktemp("mine")
    launch(write_study(folder, toy))
    return folder


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "python.md"], ids=name)
def test_python_examples_run(page: Path, study: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(next((toy / "test").glob("*.wav")), tmp_path / "talk.wav")
    example = python_blocks(page)
    assert '"studies/mine"' in example
    found: dict[str, Any] = {}
    exec(compile(example.replace('"studies/mine"', repr(str(study))), name(page), "exec"), found)
    assert found["comparison"].front
    assert (study / "run" / "report" / "report.html").exists()
