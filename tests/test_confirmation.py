"""How well short runs predict long ones: rank correlations, regret, and what the command accepts."""

import math
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunesearch.cli.app import app
from prunesearch.report.confirmation import (
    compare_with_confirmation,
    confirmation_file,
    confirmation_table,
    rank_correlation,
    regret,
)
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import kendall, spearman
from tests.report_records import add, give_to_study, study, wer


def test_a_rank_correlation_has_an_interval_and_is_nan_for_constant_values() -> None:
    alike = [(0.1 * i, 0.2 * (i ^ 1)) for i in range(12)]  # neighbours have changed places
    for measure in (spearman, kendall):
        found = rank_correlation(measure, alike)
        assert 0.7 < found.value < 1
        assert 0.4 < found.low < found.value < found.high < 1.001
        nothing = rank_correlation(measure, [(0.5, 0.1), (0.5, 0.2)])
        assert all(map(math.isnan, (nothing.value, nothing.low, nothing.high)))
        assert math.isnan(measure([], []))
        assert math.isnan(measure([1.0], [2.0]))


def test_kendall_agrees_with_its_definition() -> None:
    rng = random.Random(0)
    a, b = ([rng.random() for _ in range(20)] for _ in range(2))
    pairs = [(i, j) for i in range(20) for j in range(i)]
    signs = [math.copysign(1, (a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs]
    assert kendall(a, b) == pytest.approx(sum(signs) / len(pairs))


def test_regret_equals_its_definition() -> None:
    systems = [(10, 0.30, 0.25), (20, 0.20, 0.22), (30, 0.21, 0.15), (40, 0.10, 0.16)]
    # up to 30 parameters the short runs choose 0.22 instead of 0.15; with all, 0.16 instead of 0.15
    assert regret(systems) == pytest.approx(0.07)
    assert regret([(10, 0.3, 0.3), (20, 0.2, 0.2)]) == 0


def test_a_study_is_compared_with_its_confirmation_system_by_system(tmp_path: Path) -> None:
    config = study(tmp_path)
    assert compare_with_confirmation(config) is None
    confirmation = study(confirmation_file(config).parent, "s-confirm")
    kept = (Candidate(), Candidate((1,)), Candidate((1, 2), 4))
    for candidate, short, long in zip(kept, (1, 3, 4), ((1, 2), (4, 4), (3, 4)), strict=True):
        add(config.run_folder / "records", candidate, short)
        for repeat, errors in enumerate(long):
            again = Candidate(candidate.removed_layers, candidate.lora_rank, repeat)
            add(confirmation.run_folder / "records", again, errors)
    give_to_study(confirmation.run_folder / "records", confirmation.name)
    add(config.run_folder / "records", Candidate((3,)), 5)  # was not trained again
    found = compare_with_confirmation(config)
    assert found is not None
    by_candidate = {s.short.candidate: s for s in found.systems}
    assert set(by_candidate) == set(kept)
    assert by_candidate[kept[0]].long_dev_wers == pytest.approx((wer(1), wer(2)))
    assert found.spearman.value == pytest.approx(0.5)  # ranks 1 2 3 and 1 3 2
    # without the unpruned system, the short runs choose the second one, and the third is better in the long runs
    assert found.regret == pytest.approx(wer(4) - wer(3.5))
    assert [row[0] for row in confirmation_table(found).rows] == [s.short.candidate.key for s in found.systems]
    assert "loses at most 5.00 points of dev WER at any parameter budget" in confirmation_table(found).note


def test_without_differences_there_is_no_correlation_and_the_note_says_so(tmp_path: Path) -> None:
    config = study(tmp_path)
    confirmation = study(confirmation_file(config).parent, "s-confirm")
    for candidate in (Candidate(), Candidate((1,))):
        add(config.run_folder / "records", candidate, 2)
        add(confirmation.run_folder / "records", candidate, 2)
    give_to_study(confirmation.run_folder / "records", confirmation.name)
    found = compare_with_confirmation(config)
    assert found is not None
    note = confirmation_table(found).note
    assert "none, since all systems have the same WER" in note
    assert "nan" not in note


@pytest.mark.parametrize("option", ["--init", "--from"])
def test_init_and_its_older_name_from_set_the_projectors_start(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("prunesearch.commands.confirm.confirm", lambda *given: asked.append(given))
    monkeypatch.setattr("prunesearch.study.config.load_study", lambda *given, **named: None)
    monkeypatch.setattr("prunesearch.report.confirmation.compare_with_confirmation", lambda config: None)
    done = CliRunner().invoke(app, ["confirm", "somewhere", option, "scratch"], catch_exceptions=False)
    assert done.exit_code == 0
    assert asked[0][3] == "scratch"


def test_help_of_confirm_hides_from() -> None:
    shown = CliRunner().invoke(app, ["confirm", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"}).output
    assert "--init" in shown
    assert "--from" not in shown
