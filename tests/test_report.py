"""The report: front, paired bootstrap, comparison, and what is written of them."""

import csv
import io
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from prunesearch.report import (
    Comparison,
    Difference,
    compare,
    comparison_of,
    non_dominated,
    paired_bootstrap,
    pareto_front,
    render,
    to_csv,
    to_json,
    verdict,
    write_overlay,
    write_report,
)
from prunesearch.report.anatomy import anatomy, changes, confused, counterpart, without_lora
from prunesearch.report.data import RECORD_KEYS
from prunesearch.report.formats import to_latex, to_markdown
from prunesearch.report.overlay import check_comparable, overlay_table
from prunesearch.report.page import render_page
from prunesearch.report.paper_claims import directed, sized
from prunesearch.report.plots import draw_front
from prunesearch.report.statistics import relative_bootstrap
from prunesearch.report.tables import layers_table, sizes_table, tables
from prunesearch.speech.wer import count_errors
from prunesearch.study.candidate import BASELINE_NAMES, Candidate, baselines
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.front import hypervolume, knee
from prunesearch.study.record import (
    Parameters,
    Rung,
    RunRecord,
    SplitResult,
    UtteranceResult,
    WordErrors,
    read_records,
    write_record,
    write_utterances,
)

LAYERS, UTTERANCES = 6, 60
WHOLE = Parameters(encoder=12_000_000, projector=2_000_000, lora=0, llm=50_000_000)


def parameters(candidate: Candidate) -> Parameters:
    fewer = 1_500_000 * len(candidate.removed_layers)
    return WHOLE.model_copy(update={"encoder": WHOLE.encoder - fewer, "lora": 10_000 * candidate.lora_rank})


def utterances(errors: int, language: str = "da") -> list[UtteranceResult]:
    """Ten words each; `errors` substitutions in each, one more in every third."""
    return [
        UtteranceResult(
            id=f"u{i}",
            reference="a",
            hypothesis="b",
            language=language if i % 2 else "nl",
            errors=WordErrors(substitutions=errors + (i % 3 == 0), reference_words=10),
        )
        for i in range(UTTERANCES)
    ]


def add(
    records: Path, candidate: Candidate, errors: int, name: str | None = None, state: str = "complete", test: int | None = None
) -> RunRecord:
    """A record with so many errors per utterance on dev, and on test where given."""
    dev, rungs = SplitResult.of(utterances(errors)), ()
    if state != "complete":
        rungs = (Rung(step=5, errors=dev.errors),) if state == "pruned" else ()
        dev = None
    else:
        write_utterances(records, candidate, "dev", utterances(errors))
    if test is not None:
        write_utterances(records, candidate, "test", utterances(test))
    record = RunRecord(
        study="s",
        name=name,
        encoder_layers=LAYERS,
        removed_layers=candidate.removed_layers,
        lora_rank=candidate.lora_rank,
        repeat=candidate.repeat,
        seed=candidate.repeat,
        state=state,
        steps=10,
        dev=dev,
        test=None if test is None else SplitResult.of(utterances(test)),
        rungs=rungs,
        parameters=parameters(candidate),
    )
    write_record(records, record)
    return record


def add_study(records: Path, winner_test: int | None = 1) -> None:
    """Four baselines, a candidate that beats top2+lora on dev, a dominated one, a pruned one and a failed one."""
    for (name, candidate), errors in zip(baselines(LAYERS, 8).items(), (2, 1, 5, 3), strict=True):
        add(records, candidate, errors, name, test=errors)
    add(records, Candidate((1, 2), 4), 2, test=winner_test)
    add(records, Candidate((0,), 4), 7)
    add(records, Candidate((0, 1), 4), 9, state="pruned")
    add(records, Candidate((0, 2), 4), 9, state="failed")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    add_study(tmp_path / "records")
    return tmp_path / "records"


def study(folder: Path, name: str = "s") -> StudyConfig:
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").touch()
    data = "\n".join(f'{split} = "{split}.jsonl"' for split in ("train", "dev", "test"))
    head = f"name = {json.dumps(name)}\n[encoder]\nmodel = 'e/e'\n[llm]\nmodel = 'l/l'\n[data]\n"
    (folder / "study.toml").write_text(head + data, encoding="utf-8")
    return load_study(folder / "study.toml", data_must_exist=False)  # as the report command does


# --- repeats ---


def test_trainings_of_one_system_count_as_their_mean(records: Path) -> None:
    before = compare(records, "speech_params", "s")
    add(records, Candidate((1, 2), 4, repeat=1), 3, test=2)  # 2 on dev and 1 on test the first time
    add(records, Candidate((0,), 4, repeat=1), 9, state="failed")
    after = compare(records, "speech_params", "s")
    assert len(after.complete) == len(before.complete)
    assert after.trainings[Candidate((1, 2), 4)] == 2
    system = next(r for r in after.complete if r.candidate == Candidate((1, 2), 4))
    assert system.dev is not None
    assert system.test is not None
    assert system.dev.errors.wer == pytest.approx((2.5 + 1 / 3) / 10)
    assert system.test.errors.wer == pytest.approx((1.5 + 1 / 3) / 10)
    (contrast,) = after.dominating
    assert contrast.difference is not None
    assert contrast.difference.estimate == pytest.approx((1.5 - 3) / 10)  # top2+lora: 3
    assert "×2" in verdict_and_tables(after)


def test_a_repeat_that_was_not_decoded_on_test_takes_the_mean_from_there(records: Path) -> None:
    add(records, Candidate((1, 2), 4, repeat=1), 3)
    (contrast,) = compare(records, "speech_params", "s").dominating
    assert contrast.system.test is None
    assert contrast.split == "dev"


def verdict_and_tables(comparison: Comparison) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(render(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- front ---


def test_front_equals_its_definition() -> None:
    rng = random.Random(0)
    for size in [0, 1, 2, *range(3, 60, 4)]:
        points = [(rng.randrange(8), rng.randrange(8) / 8) for _ in range(size)]
        dominated = [any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points]
        assert sorted(non_dominated(points)) == [i for i in range(size) if not dominated[i]]


def test_front_holds_complete_records_by_size(tmp_path: Path) -> None:
    small, large = add(tmp_path, Candidate((1, 2)), 3), add(tmp_path, Candidate(()), 1)
    worse, stopped = add(tmp_path, Candidate((1,), 8), 3), add(tmp_path, Candidate((0, 1, 2)), 0, state="pruned")
    assert pareto_front([large, stopped, worse, small], "speech_params") == [small, large]


# --- bootstrap ---


def test_bootstrap_agrees_with_a_slow_reference() -> None:
    rng = random.Random(1)
    words = [rng.randint(1, 12) for _ in range(40)]
    first, second = ([rng.randint(0, w) for w in words] for _ in range(2))
    draws = [rng.choices(range(40), k=40) for _ in range(4000)]
    slow = sorted(sum(first[i] - second[i] for i in draw) / sum(words[i] for i in draw) for draw in draws)
    fast = paired_bootstrap(np.array(first), np.array(second), np.array(words), resamples=4000)
    assert fast.estimate == pytest.approx((sum(first) - sum(second)) / sum(words))
    assert fast.low == pytest.approx(slow[100], abs=0.015)
    assert fast.high == pytest.approx(slow[3900], abs=0.015)


@pytest.mark.parametrize(("trainings", "alike"), [((3, 3), True), ((3, 3), False), ((2, 3), False)])
def test_bootstrap_over_trainings_agrees_with_a_slow_reference(trainings: tuple[int, int], alike: bool) -> None:
    rng = np.random.default_rng(2)
    words = rng.integers(1, 12, 40)
    first, second = (np.array([np.minimum(words, rng.integers(0, 5, 40) + 2 * s) for s in range(n)]) for n in trainings)
    slow = {"paired": [], "relative": []}
    for _ in range(4000):
        rows, ours = rng.integers(0, 40, 40), rng.integers(0, trainings[0], trainings[0])
        theirs = ours if alike else rng.integers(0, trainings[1], trainings[1])
        a, b = first[ours][:, rows].sum() / trainings[0], second[theirs][:, rows].sum() / trainings[1]
        slow["paired"].append((a - b) / words[rows].sum())
        slow["relative"].append(a / b - 1)
    found = {
        "paired": paired_bootstrap(first, second, words, 4000, by_training=alike),
        "relative": relative_bootstrap(first, second, 4000, by_training=alike),
    }
    for name, difference in found.items():
        low, high = np.quantile(slow[name], [0.025, 0.975])
        assert difference.low == pytest.approx(low, abs=0.1 * (high - low)), name
        assert difference.high == pytest.approx(high, abs=0.1 * (high - low)), name
    assert found["paired"].estimate == pytest.approx((first.mean(0).sum() - second.mean(0).sum()) / words.sum())


def test_bootstrap_of_equals_is_zero_and_of_the_clearly_better_is_lower() -> None:
    words = np.full(50, 10)
    errors = np.arange(50) % 4
    same = paired_bootstrap(errors, errors, words)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    assert same.verdict == "no difference can be seen"
    better = paired_bootstrap(errors, errors + 1 + errors % 2, words)
    assert better.verdict == "lower"
    assert better.low <= better.estimate <= better.high < 0
    worse = paired_bootstrap(errors + 1 + errors % 2, errors, words)
    assert (worse.verdict, worse.estimate) == ("higher", -better.estimate)
    assert better == paired_bootstrap(errors, errors + 1 + errors % 2, words)  # seeded


def test_bootstrap_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="same utterances"):
        paired_bootstrap(np.ones(3), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap(np.ones(0), np.ones(0), np.ones(0))


# --- comparison ---


def test_comparison_sorts_records_by_their_part(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    assert tuple(found.baselines) == BASELINE_NAMES
    assert [r.candidate.key for r in found.front] == ["minus-4-5", "minus-1-2+lora4", "full+lora8"]
    assert len(found.complete) == 6
    assert [r.candidate.key for r in found.pruned] == ["minus-0-1+lora4"]
    assert [r.candidate.key for r in found.failed] == ["minus-0-2+lora4"]
    (contrast,) = found.dominating
    assert found.winner == contrast
    assert (contrast.system.candidate, contrast.split) == (Candidate((1, 2), 4), "test")
    assert contrast.difference is not None
    assert contrast.difference.estimate == pytest.approx(-0.2)
    best = found.best_by_removed[2]
    assert (best.record.candidate, best.tried) == (Candidate((1, 2), 4), 4)  # three complete, one ended at a rung
    claims = [(c.system.name, c.reference.name, c.difference and c.difference.verdict) for c in found.differences]
    assert claims == [
        ("top2", "unpruned", "higher"),
        ("top2+lora", "unpruned", "higher"),
        ("top2+lora", "unpruned+lora", "higher"),
    ]


def test_reductions_have_three_denominators(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    saved = found.reductions(found.baselines["top2+lora"])
    assert saved is not None
    assert (saved.encoder, saved.speech, saved.total) == pytest.approx((3 / 12, 2.92 / 14, 2.92 / 64))
    added = found.reductions(found.baselines["unpruned+lora"])
    assert added is not None
    assert added.speech < 0 == added.encoder


def test_without_test_results_the_difference_is_on_dev_and_says_so(tmp_path: Path) -> None:
    add_study(tmp_path, winner_test=None)
    found = compare(tmp_path, "speech_params", "s")
    assert found.dominating[0].split == "dev"
    assert "Dev also chose it" in " ".join(verdict(found))


def test_a_winner_that_test_does_not_confirm_is_not_called_better(tmp_path: Path) -> None:
    add_study(tmp_path, winner_test=3)
    said = " ".join(verdict(compare(tmp_path, "speech_params", "s")))
    assert "On test, no difference can be seen between minus-1-2+lora4 and top2+lora" in said


def test_nothing_found_is_said(tmp_path: Path) -> None:
    for (name, candidate), errors in zip(baselines(LAYERS, 8).items(), (2, 1, 5, 3), strict=True):
        add(tmp_path, candidate, errors, name)
    add(tmp_path, Candidate((1, 2), 4), 4)
    found = compare(tmp_path, "speech_params", "s")
    assert found.winner is None
    assert "Nothing found beats top2+lora" in " ".join(verdict(found))


def test_without_baselines_or_records_the_report_is_short_but_works(tmp_path: Path) -> None:
    empty = compare(tmp_path / "nowhere", "speech_params", "s")
    assert (empty.front, empty.baselines, empty.winner) == ((), {}, None)
    assert "not evaluated yet" in " ".join(verdict(empty))
    add(tmp_path, Candidate((1,), 4), 2)
    found = compare(tmp_path, "total_params", "s")
    assert found.reductions(found.front[0]) is None
    for comparison in (empty, found):
        Console(file=io.StringIO()).print(render(comparison))
        assert json.dumps(to_json(comparison))
        assert to_csv([comparison]).startswith("study,name,key,")
        assert "</html>" in render_page(comparison)
        assert draw_front(comparison).axes


def test_records_on_other_utterances_are_refused(records: Path) -> None:
    write_utterances(records, Candidate((1, 2), 4), "test", utterances(1)[1:])
    with pytest.raises(ValueError, match="not decoded on the same test utterances"):
        compare(records, "speech_params", "s")


def test_utterances_are_joined_by_id_not_by_line(records: Path) -> None:
    before = compare(records, "speech_params", "s")
    write_utterances(records, Candidate((1, 2), 4), "test", reversed(utterances(1)))
    assert compare(records, "speech_params", "s") == before


# --- what is written ---


def test_json_keys_are_stable(records: Path) -> None:
    data = json.loads(json.dumps(to_json(compare(records, "speech_params", "s"))))
    sections = (
        "study",
        "objective",
        "candidates",
        "verdict",
        "baselines",
        "front",
        "dominating",
        "best_by_removed",
        "claims",
        "lora_changes",
        "layer_changes",
        "anatomy",
        "measured",
        "knee",
        "hypervolume",
        "differences",
    )
    assert tuple(data) == sections
    assert all(tuple(r) == RECORD_KEYS for r in [*data["front"], *data["baselines"].values()])
    (winner,) = data["dominating"]
    assert tuple(winner["difference_to_top2_lora"]) == ("split", "estimate", "low", "high", "verdict")
    assert (winner["errors_split"], winner["reference_words"], winner["removed_layers"]) == ("test", 600, [1, 2])
    assert set(winner["dev_wer_by_language"]) == {"da", "nl"}
    assert data["best_by_removed"]["1"]["tried"] == 1
    assert data["best_by_removed"]["1"]["test_wer"] is None
    assert data["best_by_removed"]["1"]["errors_split"] == "dev"
    assert data["differences"]["top2 - unpruned"]["verdict"] == "higher"


def test_csv_holds_every_complete_record(records: Path) -> None:
    found = compare(records, "speech_params", "s")
    rows = list(csv.DictReader(io.StringIO(to_csv([found]))))
    assert [row["key"] for row in rows] == [r.candidate.key for r in found.complete]
    assert rows[1]["removed_layers"] == "1 2"
    assert float(rows[1]["dev_wer"]) == pytest.approx(14 / 60)


def test_the_written_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    config = study(tmp_path, "<script>alert('&')</script> [bold]")
    add_study(config.run_folder / "records")
    comparison = write_report(config)
    report = config.run_folder / "report"
    names = {"front.png", "front.svg", "front.pdf", "report.html", "report.csv", "report.json", "report.md", "report.tex"}
    assert {f.name for f in report.iterdir()} == names
    assert {f.name for f in config.run_folder.iterdir()} == {"records", "report"}
    assert (report / "front.png").read_bytes().startswith(b"\x89PNG")
    assert (report / "front.pdf").read_bytes().startswith(b"%PDF")
    svg = (report / "front.svg").read_text(encoding="utf-8")
    assert re.search(r"<text[^>]*>top2\+lora</text>", svg)
    html = (report / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert not re.search(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)\s*=", html)
    assert not re.search(r"@import|url\(['\"]?http", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    assert html.count("plotly.js v") == 1
    assert '<th scope="row">' in html
    assert "■□□■■■" in html or r"\u25a0\u25a1\u25a1\u25a0\u25a0\u25a0" in html
    shown = Console(file=io.StringIO(), width=100, record=True)
    shown.print(render(comparison))
    assert "[bold]" in shown.export_text()


def test_far_outliers_leave_the_front_readable(records: Path) -> None:
    before = draw_front(compare(records, "speech_params", "s")).axes[0].get_ylim()
    add(records, Candidate((0, 5), 4), 30)
    figure = draw_front(compare(records, "speech_params", "s"))
    assert figure.axes[0].get_ylim()[1] < 2 * before[1]
    assert any("up to 303 %" in text.get_text() for text in figure.axes[0].texts)


def test_equal_records_give_equal_figures(records: Path, tmp_path: Path) -> None:
    from prunesearch.report.plots import write_figures

    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_figures(draw_front(compare(records, "speech_params", "s")), tmp_path / name)
        made.append([f.read_bytes() for f in sorted((tmp_path / name).iterdir())])
    assert made[0] == made[1]


def test_importing_the_report_loads_no_plotting_and_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'optuna', 'matplotlib', 'plotly'}"
    code = f"import sys, prunesearch.report; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- claims, knee, hypervolume ---


def counted(records: Path, candidate: Candidate, name: str | None, kinds: tuple[int, int, int], language: str = "da") -> None:
    """A record whose every utterance of ten words has so many substitutions, deletions and insertions (one more, at times)."""
    results = [
        UtteranceResult(
            id=f"u{i}",
            reference="a",
            hypothesis="b",
            language=language,
            errors=WordErrors(
                substitutions=kinds[0] + i % 2, deletions=kinds[1], insertions=kinds[2] + (i % 5 == 0), reference_words=10
            ),
        )
        for i in range(UTTERANCES)
    ]
    split = SplitResult.of(results)
    write_utterances(records, candidate, "dev", results)
    write_record(
        records,
        RunRecord(
            study="s",
            name=name,
            encoder_layers=LAYERS,
            removed_layers=candidate.removed_layers,
            lora_rank=candidate.lora_rank,
            seed=0,
            state="complete",
            steps=1,
            dev=split,
            parameters=parameters(candidate),
        ),
    )


def test_each_claim_gets_an_interval_and_a_word(tmp_path: Path) -> None:
    kinds = {"unpruned": (4, 1, 0), "unpruned+lora": (3, 1, 1), "top2": (5, 1, 0), "top2+lora": (3, 1, 1)}
    for name, candidate in baselines(LAYERS, 8).items():
        counted(tmp_path, candidate, name, kinds[name])
    found = {(f.claim.split(" (")[0], f.language): f for f in compare(tmp_path, "speech_params", "s").claims}
    cost = found["two layers cost 2–4 % of WER", None]
    assert cost.measured == pytest.approx(100 * (6.7 / 5.7 - 1))
    assert cost.word == "does not hold", "two layers cost more here"
    assert found["two layers less, with LoRA, beat the whole encoder without", None].word == "cannot be said"
    assert found["LoRA takes 4–7 % of all errors away", "da"].word in {"does not hold", "cannot be said"}
    assert found["LoRA adds insertions in Danish", "da"].word == "holds"
    saved = found["two layers less, with LoRA, save 7–14 % of the parameters", None]
    whole, small = parameters(Candidate()), parameters(Candidate((4, 5), 8))
    assert saved.measured == pytest.approx(100 * (1 - small.speech / whole.speech))


def test_the_relative_bootstrap_agrees_with_a_slow_one() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.poisson(2.0, 400), rng.poisson(2.4, 400)
    found = relative_bootstrap(first, second)
    draws = rng.integers(0, 400, (4000, 400))
    slow = first[draws].sum(1) / second[draws].sum(1) - 1
    assert found.estimate == pytest.approx(first.sum() / second.sum() - 1)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(slow, [0.025, 0.975])), abs=0.01)


def test_the_knee_is_where_a_front_bends_and_the_hypervolume_is_an_area(tmp_path: Path) -> None:
    for layers, errors in (((), 1), ((1,), 1), ((1, 2), 2), ((0, 1, 2), 8)):
        add(tmp_path, Candidate(layers), errors)
    front = pareto_front(compare(tmp_path, "speech_params", "s").complete, "speech_params")
    assert knee(front, "speech_params").removed_layers in {(1,), (1, 2)}
    points = [(r.parameters.speech, r.dev.errors.wer) for r in front if r.dev]
    reference = (max(p for p, _ in points) + 10.0, 1.0)
    ends = [*(p for p, _ in points[1:]), reference[0]]
    area = sum((end - p) * (reference[1] - w) for (p, w), end in zip(points, ends, strict=True))
    assert hypervolume(front, "speech_params", reference) == pytest.approx(area)


def test_tables_can_be_pasted_into_a_readme_and_a_paper(records: Path) -> None:
    made = tables(compare(records, "speech_params", "s"))
    markdown, latex = to_markdown(made), to_latex(made)
    assert markdown.count("### ") == latex.count(r"\begin{tabular}") == len(made)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == sum(1 + len(t.rows) for t in made)
    assert not re.search(r"(?<!\\)%", latex.split("\n", 1)[1])
    cells = [len(t.columns) for t in made for _ in range(1 + len(t.rows))]
    assert [row.count(" & ") + 1 for row in rows] == cells
    assert [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in markdown.splitlines() if line.startswith("|")] == [
        len(t.columns) for t in made for _ in range(2 + len(t.rows))
    ]


def test_how_often_a_layer_is_gone(tmp_path: Path) -> None:
    for layers, errors in (((), 1), ((1,), 1), ((2,), 4), ((1, 2), 2), ((0, 1), 9)):
        add(tmp_path, Candidate(layers), errors)
    comparison = compare(tmp_path, "speech_params", "s")
    made = layers_table(comparison)
    front, shares = ("on the front", "front of da", "front of nl"), ("better half of its size", "all tried")
    assert made.columns == ("layer", *front, *shares)
    found = {row[0]: row[1:] for row in made.rows}
    assert found["1"] == ("2 of 2", "2 of 2", "2 of 2", "2 of 2", "3 of 4")
    assert found["5"] == ("0 of 2", "0 of 2", "0 of 2", "0 of 2", "0 of 4")
    by_size = sizes_table(comparison)
    assert by_size.columns == ("layer", "1 removed", "2 removed")
    assert by_size.rows[1] == ("1", "1 of 1", "1 of 1")
    beside = layers_table(replace(comparison, importance={1: 0.25}))
    assert (beside.columns[-1], beside.rows[1][-1], beside.rows[2][-1]) == ("alone costs, nats", "0.250", "–")


@pytest.mark.parametrize(
    ("encoder", "language", "expected"),
    [("openai/whisper-large-v2", "en", [0.1518, 0.1668]), ("openai/whisper-large-v2", "da", []), ("encoder", "en", [])],
)
def test_published_numbers_stand_beside_a_study_of_their_encoder_and_language(
    tmp_path: Path, encoder: str, language: str, expected: list[float]
) -> None:
    for candidate in (Candidate(), Candidate((1, 2))):
        record = add(tmp_path, candidate, 1)
        spoken = SplitResult.of([r.model_copy(update={"language": language}) for r in utterances(1)])
        known = {"config": {"encoder": {"model": encoder}}}
        write_record(tmp_path, record.model_copy(update={"dev": spoken, "provenance": known}))
    comparison = compare(tmp_path, "speech_params", "s")
    assert [m.wer for m in comparison.published] == expected
    if expected:
        assert comparison.published[1].params == parameters(Candidate((4, 5))).speech
        labels = [text.get_text() for text in draw_front(comparison).legends[0].get_texts()]
        assert "published" in labels


def test_several_studies_are_laid_over_one_another(tmp_path: Path) -> None:
    configs = []
    for name in ("a", "b"):
        add_study(tmp_path / name / "run" / "records")
        configs.append(study(tmp_path / name, name))
    write_overlay(configs, tmp_path / "out")
    kinds = {"png", "svg", "pdf", "html", "md", "tex", "csv", "json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"overlay.{kind}" for kind in kinds}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "overlay.csv").read_text())))
    assert {row["study"] for row in rows} == {"a", "b"}
    (table,) = [overlay_table([comparison_of(config) for config in configs])]
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert table.rows[0][1:] == table.rows[1][1:]
    assert "minus-1-2+lora4" in table.rows[0]
    page = (tmp_path / "out" / "overlay.html").read_text()
    assert "<caption>Studies side by side" in page
    assert "Plotly.newPlot" in page


def test_studies_that_cannot_share_a_plot_are_told(tmp_path: Path) -> None:
    add_study(tmp_path / "records")
    one = compare(tmp_path / "records", "speech_params", "a")
    for other, said in ((one, "same name"), (compare(tmp_path / "records", "total_params", "b"), "params_objective")):
        with pytest.raises(StudyError, match=said):
            check_comparable([one, other])


# --- what went wrong, and for whom ---


def heard(id: str, reference: str, hypothesis: str, group: str | None = None) -> UtteranceResult:
    return UtteranceResult(
        id=id, reference=reference, hypothesis=hypothesis, errors=count_errors(reference, hypothesis), group=group
    )


def test_every_word_error_is_a_confusion_and_nothing_else_is() -> None:
    rng = random.Random(4)
    results = [heard(str(i), *(" ".join(rng.choices("abcd", k=rng.randint(0, 6))) for _ in range(2))) for i in range(200)]
    pairs = list(confused(results))
    total = sum((r.errors for r in results), WordErrors())
    assert sum(said is None for said, _ in pairs) == total.insertions > 0
    assert sum(word is None for _, word in pairs) == total.deletions > 0
    assert sum(said is not None and word is not None and said != word for said, word in pairs) == total.substitutions
    assert len(pairs) == total.errors


def test_two_systems_are_compared_word_by_word(records: Path) -> None:
    whole, small = (add(records, c, 1) for c in (Candidate(), Candidate((1,))))
    ours = [heard("a", "one two", "one too"), heard("b", "three", "three"), heard("c", "four", "")]
    theirs = [heard("a", "one two", "one two"), heard("b", "three", "free"), heard("c", "four", "")]
    found = anatomy(small, whole, "test", ours, theirs)
    assert [(c.said, c.heard, c.ours, c.theirs) for c in found.confusions] == [("two", "too", 1, 0), ("three", "free", 0, 1)]
    assert [(c.id, c.errors, c.ours, c.theirs) for c in found.worse] == [("a", 1, "one too", "one two")]
    assert [(c.id, c.errors) for c in found.better] == [("b", -1)]


def test_changes_are_of_rates_by_kind_and_language(records: Path) -> None:
    comparison = compare(records, "speech_params", "s")
    plain, repaired = comparison.baselines["top2"], comparison.baselines["top2+lora"]
    assert without_lora(repaired, comparison.complete) == plain
    assert without_lora(plain, comparison.complete) is None
    found = changes(repaired, plain)
    assert [c.language for c in found] == [None, "da", "nl"]
    assert found[0].of("errors") == pytest.approx((3 + 1 / 3) / (5 + 1 / 3) - 1)
    assert found[0].of("insertions") is None  # there were none to begin with
    assert counterpart(repaired, comparison.complete) == comparison.baselines["unpruned+lora"]
    assert counterpart(plain, comparison.complete) == comparison.baselines["unpruned"]
    assert counterpart(comparison.baselines["unpruned"], comparison.complete) is None


def test_the_worst_group_and_the_gap_between_groups_are_told() -> None:
    results = [heard("a", "one two", "one two", "x"), heard("b", "one two", "one", "y"), heard("c", "one", "two", None)]
    split = SplitResult.of(results)
    assert (split.worst_group, split.worst_group_wer, split.group_gap) == ("y", 0.5, 0.5)
    again = SplitResult.pooled([split, SplitResult.of([heard("a", "one two", "a b c", "x")])])
    assert again.by_group["x"].reference_words == 4
    assert again.worst_group == "x"
    assert SplitResult.of([heard("c", "one", "two")]).worst_group_wer is None


def test_the_report_shows_groups_where_a_study_has_them(tmp_path: Path) -> None:
    add_study(tmp_path / "records")
    for key in ("full", "minus-4-5"):
        candidate = Candidate.from_key(key)
        record = next(r for r in read_records(tmp_path / "records") if r.candidate == candidate)
        results = [heard("a", "one two", "one two", "x"), heard("b", "one two", "one", "y")]
        write_record(tmp_path / "records", record.model_copy(update={"test": SplitResult.of(results)}))
    shown = {table.title: table for table in tables(compare(tmp_path / "records", "speech_params", "s"))}
    rows = shown["WER in % by group"].rows
    assert {row[:5] for row in rows} == {(name, "test", "y", "50.00", "50.00") for name in ("unpruned", "top2")}


def test_a_candidate_whose_worst_group_is_above_the_limit_is_not_chosen(records: Path) -> None:
    winner = compare(records, "speech_params", "s").winner
    assert winner is not None
    results = [heard(f"g{i}", "one two", "one two" if i % 2 else "one too", "ab"[i % 2]) for i in range(10)]
    dev = SplitResult.of(results).model_copy(update={"errors": winner.system.dev.errors})
    write_record(records, winner.system.model_copy(update={"dev": dev}))
    for limit, chosen in ((0.5, True), (0.4, False)):
        found = compare(records, "speech_params", "s", max_worst_group_wer=limit)
        assert (found.winner is not None) == chosen
        assert (winner.system.candidate in {r.candidate for r in found.front}) == chosen
        assert len(found.complete) == 6
        assert f"above {100 * limit:g} %: {1 - chosen:d} candidates are left out" in verdict(found)[0]


def test_an_interval_of_nothing_is_no_evidence() -> None:
    once = Difference(-1.0, -1.0, -1.0, 1000)  # one insertion in one system, none in the other
    assert directed(once, falls=False) == "cannot be said"
    assert sized(once, (-7.0, -4.0)) == "cannot be said"
    assert directed(Difference(-0.5, -0.9, -0.1, 1000), falls=False) == "does not hold"
