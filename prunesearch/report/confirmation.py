"""Do the short runs of a search predict the long runs of its confirmation? Both studies' dev WERs side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunesearch.report.table import Table
from prunesearch.report.values import title, wer_percent
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.front import dev_wer, pooled_by_system
from prunesearch.study.importance import kendall, spearman
from prunesearch.study.record import RunRecord, read_records

RESAMPLES = 2000

RankCorrelation = Callable[[Sequence[float], Sequence[float]], float]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation over systems, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ConfirmedSystem:
    """One system in both studies. `long` is pooled over its trainings; `long_dev_wers` are fractions, one per training."""

    short: RunRecord
    long: RunRecord
    long_dev_wers: tuple[float, ...]


@dataclass(frozen=True)
class Confirmation:
    """How well the short runs predict the long ones, over all systems that were trained in both studies.

    `regret` (a fraction): consider the systems of at most some number of parameters, take the one of lowest dev WER in the
    short runs, and compare its dev WER in the long runs with the lowest one there; the greatest such loss over all numbers.
    """

    systems: tuple[ConfirmedSystem, ...]
    spearman: Correlation
    kendall: Correlation
    regret: float


def confirmation_file(config: StudyConfig) -> Path:
    """Where the study file of a study's confirmation is, whether it exists or not."""
    return config.run_folder / "confirm" / "study.toml"


def compare_with_confirmation(config: StudyConfig) -> Confirmation | None:
    """Compare the study with its confirmation. None until at least two systems are complete in both."""
    file = confirmation_file(config)
    if not file.exists():
        return None
    short = {r.candidate: r for r in pooled_by_system(_complete(config))}
    trainings = _complete(load_study(file, data_must_exist=False))
    dev_wers: dict[Candidate, list[float]] = {}
    for record in trainings:
        dev_wers.setdefault(record.candidate.system, []).append(dev_wer(record))
    systems = tuple(
        ConfirmedSystem(short[long.candidate], long, tuple(dev_wers[long.candidate]))
        for long in pooled_by_system(trainings)
        if long.candidate in short
    )
    if len(systems) < 2:
        return None
    pairs = [(dev_wer(s.short), dev_wer(s.long)) for s in systems]
    return Confirmation(
        systems,
        rank_correlation(spearman, pairs),
        rank_correlation(kendall, pairs),
        regret([(s.long.parameters.of(config.search.params_objective), *pair) for s, pair in zip(systems, pairs, strict=True)]),
    )


def rank_correlation(measure: RankCorrelation, pairs: Sequence[tuple[float, float]]) -> Correlation:
    """The rank correlation of pairs, with the interval of a bootstrap over pairs.

    Resamples in which one side is constant have no correlation and are left out. All values are NaN if that is so for all.
    """
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        some = [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))]
        value = measure(*map(list, zip(*some, strict=True)))
        if not math.isnan(value):
            drawn.append(value)
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (math.nan, math.nan)
    return Correlation(measure(*map(list, zip(*pairs, strict=True))), float(low), float(high))


def regret(systems: Sequence[tuple[float, float, float]]) -> float:
    """The greatest long WER lost by choosing by short WER, at any limit of parameters.

    `systems`: (parameters, short WER, long WER) of each.
    """
    losses = []
    for limit, _, _ in systems:
        small = [(short, long) for params, short, long in systems if params <= limit]
        _, chosen = min(small)
        losses.append(chosen - min(long for _, long in small))
    return max(losses)


def confirmation_table(found: Confirmation) -> Table:
    """Short and long runs side by side; the note says how well the one predicts the other."""
    correlations = "; ".join(
        f"{name} {c.value:.2f} (95 % interval {c.low:.2f} to {c.high:.2f})"
        for name, c in (("Spearman's ρ", found.spearman), ("Kendall's τ", found.kendall))
        if math.isfinite(c.value)
    )
    correlations = correlations or "none, since all systems have the same WER in the short or in the long runs"
    return Table(
        "confirmation",
        "Confirmation, dev WER in %",
        ("system", "short run", "long runs, mean", "long runs, by seed", "test, mean"),
        tuple(
            (
                title(s.short),
                wer_percent(s.short.dev),
                wer_percent(s.long.dev),
                " ".join(f"{100 * wer:.2f}" for wer in s.long_dev_wers),
                wer_percent(s.long.test),
            )
            for s in found.systems
        ),
        f"Rank correlation of short and long runs over systems: {correlations}. Choosing by the short runs loses at most "
        f"{100 * found.regret:.2f} points of dev WER at any parameter budget.",
    ).about(next((s.short.rate for s in found.systems), "WER"))


def _complete(config: StudyConfig) -> list[RunRecord]:
    return [r for r in read_records(config.run_folder / "records", config.name) if r.state == "complete"]
