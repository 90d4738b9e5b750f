"""An exhaustive table: every set of layers with every rank, trained by our own trainer, as compact data.

    python benchmarks/search/make_table.py benchmarks/search/quickstart.toml --most 4 --ranks 0 8 --workers 2

Hours of two cores. Kill it at any time: it goes on where it was, and writes what there is to `tables/<name>.json` at the
end. `--seed 1 --share 0.1` trains a random tenth of the candidates once more, anchor and all, from another seed: what two
trainings of the same candidate differ by goes into the table as well. After a change to the study file, delete its run folder:
this script, unlike `prunesearch launch`, does not compare the two.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.files import write_atomically
from prunesearch.study.importance import family
from prunesearch.study.record import RunRecord, read_record
from prunesearch.training.anchor import starting_projector, train_anchor
from prunesearch.training.context import TrainingContext
from prunesearch.training.importance_scan import ScanSettings, importance_scan
from prunesearch.training.recipe import train_and_score
from prunesearch.training.screening import Screen

TABLES = Path(__file__).parent / "tables"


def seeded(source: Path, seed: int | None) -> StudyConfig:
    """The study, or its twin with another seed, which keeps its run folder beside the other's."""
    config = load_study(source)
    if seed is None or seed == config.seed:
        return config
    twin = config.model_copy(update={"seed": seed, "name": f"{config.name}-seed{seed}"})
    twin._source = source.with_stem(f"{source.stem}-seed{seed}")
    return twin


def candidates_of(config: StudyConfig, depth: int, most: int, ranks: list[int], share: float) -> list[Candidate]:
    """Small sets first, so that what is there after a while is complete up to some size."""
    everything = [Candidate(s, rank) for s in family(config.removable(depth), most) for rank in ranks]
    if share == 1:
        return everything
    chosen = random.Random(0).sample(range(len(everything)), round(share * len(everything)))
    return [everything[i] for i in sorted(chosen)]


def open_context(source: Path, seed: int | None) -> TrainingContext:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return TrainingContext.open(seeded(source, seed))


def train(source: Path, seed: int | None, most: int, ranks: list[int], share: float, number: int, workers: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    opened = open_context(source, seed)
    train_anchor(opened)
    wanted = candidates_of(opened.config, opened.depth, most, ranks, share)
    for i, candidate in enumerate(wanted):
        if i % workers == number:
            record = train_and_score(opened, candidate)
            if record.dev:
                print(f"{i + 1}/{len(wanted)} {candidate.key} {100 * record.dev.errors.wer:.2f} %", flush=True)


def records_of(config: StudyConfig, depth: int, most: int, ranks: list[int]) -> dict[str, RunRecord]:
    found = {c.key: read_record(config.run_folder / "records", c) for c in candidates_of(config, depth, most, ranks, 1.0)}
    return {key: record for key, record in found.items() if record is not None and record.dev is not None}


def screened(opened: TrainingContext, most: int) -> dict[str, Any]:
    """Loss and residual of every set after the repair, and seconds a set."""
    begin = time.perf_counter()
    screen = Screen(opened, starting_projector(opened))
    found = dict(screen.measure(family(opened.config.removable(opened.depth), most)))
    seconds = (time.perf_counter() - begin) / len(found)
    whole = found.pop(()).loss
    keys = {layers: ",".join(map(str, layers)) for layers in found}
    return {
        "unpruned_loss": whole,
        "screened_loss": {keys[layers]: round(left.loss - whole, 5) for layers, left in found.items()},
        "residual": {keys[layers]: round(left.residual, 6) for layers, left in found.items()},
        "seconds_a_set": round(seconds, 3),  # without what sets share in a scan's few rounds
    }


def write_table(source: Path, most: int, ranks: list[int], seeds: list[int]) -> None:
    opened = open_context(source, None)
    config = opened.config
    scores = importance_scan(opened, ScanSettings(most=max(2, min(most, 3)), loss_sets=10_000, screened=0))
    screening = {} if config.training.repair == "none" else screened(opened, most)
    records = records_of(config, opened.depth, most, ranks)
    first = next(iter(records.values()))
    assert first.dev

    def errors(record: RunRecord) -> int:
        assert record.dev
        return record.dev.errors.errors

    table = {
        "name": config.name,
        "made_by": f"python benchmarks/search/make_table.py {source.name} --most {most} --ranks {' '.join(map(str, ranks))}",
        "provenance": {k: first.provenance[k] for k in ("prunesearch", "commit", "versions", "dtype", "threads")},
        "removable": list(config.removable(opened.depth)),
        "max_removed": most,
        "ranks": ranks,
        "steps": first.steps,
        "reference_words": first.dev.errors.reference_words,
        "candidates": {
            key: {
                "errors": errors(record),
                "params": record.parameters.of(config.search.params_objective),
                "rungs": {str(rung.step): rung.errors.errors for rung in record.rungs},
            }
            for key, record in records.items()
        },
        "again": {
            str(seed): {k: errors(r) for k, r in records_of(seeded(source, seed), opened.depth, most, ranks).items()}
            for seed in seeds
        },
        "scan": {",".join(map(str, s.removed_layers)): round(s.delta_loss, 5) for s in scores.sets if s.delta_loss is not None},
        "criteria": {
            criterion: {str(layer): round(value, 5) for layer, value in values.items()}
            for criterion, values in scores.table().items()
        },
        "drift": {",".join(map(str, s.removed_layers)): round(s.drift, 5) for s in scores.sets if s.drift is not None},
        "seconds_a_training": statistics.median(record.cost.trial_seconds for record in records.values()),
        **screening,
    }
    TABLES.mkdir(exist_ok=True)
    lines = json.dumps(table, indent=0, ensure_ascii=False).replace("\n", " ").replace("}, ", "},\n")
    write_atomically(TABLES / f"{source.stem}.json", lines + "\n")
    print(f"{len(records)} candidates: {TABLES / source.stem}.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--most", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--only-write", action="store_true")
    a = parser.parse_args()
    if not a.only_write:
        train_anchor(open_context(a.study, a.seed))  # with every core, before the workers share them
        context = multiprocessing.get_context("spawn")
        jobs = [
            context.Process(target=train, args=(a.study, a.seed, a.most, a.ranks, a.share, n, a.workers))
            for n in range(a.workers)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        if any(job.exitcode for job in jobs):
            sys.exit("a worker ended with an error, above; the same command goes on where it was")
    seeds = [int(p.name.rsplit("seed", 1)[1]) for p in a.study.parent.glob(f"run-{a.study.stem}-seed*")]
    written = TABLES / f"{a.study.stem}.json"
    if a.seed is None:
        write_table(a.study, a.most, a.ranks, seeds)
    elif written.exists():  # of which the seed's candidates may be a part only
        table = json.loads(written.read_text(encoding="utf-8"))
        write_table(a.study, table["max_removed"], table["ranks"], seeds)
