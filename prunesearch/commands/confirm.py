"""Do the short runs tell the truth? The front and the baselines once more, for longer and from several seeds.

A confirmation is a study of its own, in the study's `run/confirm/`: its file is written here, and everything that works
on a study works on it: launch, worker, status, report.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w

from prunesearch.commands.launch import launch
from prunesearch.study.candidate import Candidate, baselines
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.front import complete_records, dev_wer, pareto_front, pooled_by_system
from prunesearch.study.importance import kendall, spearman
from prunesearch.study.progress import ProgressListener
from prunesearch.study.record import RunRecord, read_records, write_atomically

LONGER = 5  # times the steps of the search, where nothing else is said
RESAMPLES = 2000


def confirmation_folder(config: StudyConfig) -> Path:
    return config.run_folder / "confirm"


def write_confirmation(config: StudyConfig, seeds: int, steps: int | None, init: Literal["anchor", "scratch"] | None) -> Path:
    """The confirmation's study file: every system of the front and every baseline, each trained `seeds` times.

    Raises StudyError where the study has nothing to confirm yet.
    """
    complete = complete_records(config)
    front = pareto_front(pooled_by_system(complete), config.search.params_objective, config.search.max_worst_group_wer)
    named = baselines(complete[0].encoder_layers, config.search.baseline_lora_rank)
    systems = list(dict.fromkeys([*named.values(), *(r.candidate.system for r in front)]))
    again = [Candidate(c.removed_layers, c.lora_rank, repeat) for repeat in range(seeds) for c in systems]
    table = _standalone(config)
    table["name"] = f"{config.name}-confirm"
    table["training"] |= {"steps": steps or LONGER * config.training.steps, "rungs": []}
    if init:
        table["training"]["init"] = init
    fixed = [{"removed_layers": list(c.removed_layers), "lora_rank": c.lora_rank, "repeat": c.repeat} for c in again]
    table["search"] |= {"fixed": fixed, "trials": len(again), "scan": False, "sampler": "random", "repeats": seeds - 1}
    path = confirmation_folder(config) / "study.toml"
    write_atomically(path, tomli_w.dumps(_without_none(table)))
    return path


def _standalone(config: StudyConfig) -> dict[str, Any]:
    """The study's settings with paths that do not depend on where the file lies."""
    table = config.model_dump(mode="json", exclude={"preset"})
    for section in ("encoder", "llm"):
        table[section]["model"] = _absolute(config, table[section]["model"])
    for split in ("train", "dev", "test"):
        table["data"][split] = [_source(config, s) for s in table["data"][split]]
    if config.artifacts and "://" not in config.artifacts:
        table["storage"]["artifacts"] = str(Path(config.artifacts).resolve())
    return table


def _source(config: StudyConfig, source: Any) -> Any:
    if isinstance(source, str):
        return _absolute(config, source)
    keys = ("common_voice", "dataset")
    return {k: _absolute(config, v) if k in keys else v for k, v in source.items()}


def _absolute(config: StudyConfig, value: str) -> str:
    located = config.locate(value)
    return str(Path(located).resolve()) if Path(located).exists() else located


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is not there means the same."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _hand_on_anchor(config: StudyConfig, confirmation: StudyConfig) -> None:
    """The search's anchor is the confirmation's: it would be trained to the same weights."""
    name = "anchor/projector.safetensors"
    ours, theirs = config.run_folder / name, confirmation.run_folder / name
    if confirmation.training.init == "anchor" and ours.exists() and not theirs.exists():
        write_atomically(theirs.with_name("anchor.json"), ours.with_name("anchor.json").read_bytes())
        write_atomically(theirs, ours.read_bytes())


def confirm(
    source: str | Path,
    seeds: int = 3,
    steps: int | None = None,
    init: Literal["anchor", "scratch"] | None = None,
    workers: int = 1,
    storage: str | None = None,
    listener: ProgressListener | None = None,
) -> StudyConfig:
    """Train the front and the baselines again, `seeds` times each, for `steps` (default: five times the search's).

    Resumable and distributed as any study. A confirmation that was begun keeps its file: seeds, steps and systems are those
    that it was begun with. Raises StudyError for the user's mistakes.
    """
    config = load_study(source)
    file = confirmation_folder(config) / "study.toml"
    if not file.exists():
        file = write_confirmation(config, seeds, steps, init)
    _hand_on_anchor(config, load_study(file))
    return launch(file, workers, None, storage, listener)


@dataclass(frozen=True)
class Correlation:
    """A rank correlation over systems, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Confirmation:
    """Short and long dev WER (fractions) of each system that was trained again, and how well one foretold the other."""

    rows: tuple[tuple[RunRecord, RunRecord, tuple[float, ...]], ...]  # short, long (pooled), long by seed
    spearman: Correlation
    kendall: Correlation
    regret: float  # dev WER lost by taking the short runs' best instead of the long runs', of no more parameters


def compared(config: StudyConfig) -> Confirmation | None:
    """The study beside its confirmation; None where that has nothing complete yet."""
    file = confirmation_folder(config) / "study.toml"
    if not file.exists():
        return None
    long = load_study(file, data_must_exist=False)
    folders = [c.run_folder / "records" for c in (config, long)]
    short_records, long_records = ([r for r in read_records(f) if r.state == "complete"] for f in folders)
    short = {r.candidate: r for r in pooled_by_system(short_records)}
    by_seed: dict[Candidate, list[float]] = {}
    for record in long_records:
        by_seed.setdefault(record.candidate.system, []).append(dev_wer(record))
    rows = tuple(
        (short[r.candidate], r, tuple(by_seed[r.candidate])) for r in pooled_by_system(long_records) if r.candidate in short
    )
    if len(rows) < 2:
        return None
    pairs = [(dev_wer(a), dev_wer(b)) for a, b, _ in rows]
    objective = config.search.params_objective
    regrets = []
    for _, record, _ in rows:
        small = [(dev_wer(a), dev_wer(b)) for a, b, _ in rows if b.parameters.of(objective) <= record.parameters.of(objective)]
        regrets.append(min(small)[1] - min(wer for _, wer in small))
    return Confirmation(rows, rank_correlation(spearman, pairs), rank_correlation(kendall, pairs), max(regrets))


def rank_correlation(measure: Any, pairs: Sequence[tuple[float, float]]) -> Correlation:
    """Bootstrap over systems; resamples without two different ranks say nothing and are left out."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        some = [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))]
        value = measure(*map(list, zip(*some, strict=True)))
        if not math.isnan(value):
            drawn.append(value)
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (math.nan, math.nan)
    return Correlation(measure(*map(list, zip(*pairs, strict=True))), float(low), float(high))
