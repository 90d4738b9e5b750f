"""How soon each method knows the front, where the truth is known.

    python benchmarks/search/compare.py [--seeds 20] [--trials 80] [--only layer-sets,tpe] [--synthetic 5]

Every method runs through the study's own sampler interface, on synthetic landscapes and on committed tables of trained
candidates. What is printed is the share of the true front's hypervolume after so many trials: median, and the worst
tenth. A method that uses the scan is not charged for it: a scan trains nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import optuna
from landscapes import Landscape, synthetic, table
from optuna.samplers import BaseSampler
from rich.console import Console
from rich.table import Table
from strategies import STRATEGIES

from prunesearch.candidate import Candidate
from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.sampler import SpaceExhausted, optuna_sampler

TABLES = Path(__file__).parent / "tables"
CHECKPOINTS = (10, 20, 40, 80, 160)
Make = Callable[[Landscape, int], BaseSampler]


def layer_sets(landscape: Landscape, seed: int, with_scan: bool = True) -> BaseSampler:
    scan = landscape.scan if with_scan else None
    return LayerSetSampler(landscape.space, lambda c: landscape.params[c.key], seed, scan=scan)


METHODS: dict[str, Make] = {
    "layer-sets": layer_sets,
    "layer-sets, no scan": lambda landscape, seed: layer_sets(landscape, seed, False),
    **{
        name: (lambda landscape, seed, name=name: optuna_sampler(name, landscape.space, seed, 10))
        for name in ("tpe", "nsga2", "gp", "random")
    },
    **{
        name: (lambda landscape, seed, make=make: make(landscape.space, seed, landscape.scan or {}))
        for name, make in STRATEGIES.items()
    },
}


def run(landscape: Landscape, sampler: BaseSampler, trials: int, workers: int = 1) -> list[str]:
    """The candidates in the order in which they were finished; `workers` are busy at any time."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    running: list[tuple[optuna.Trial, Candidate]] = []
    done: list[str] = []
    while len(done) < trials:
        try:
            while len(running) < min(workers, trials - len(done)):
                trial = study.ask()
                params = {n: trial._suggest(n, d) for n, d in landscape.space.distributions.items()}
                candidate = landscape.space.candidate(params)
                trial.set_user_attr("candidate", candidate.key)
                running.append((trial, candidate))
        except SpaceExhausted:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if not running:
                break
        trial, candidate = running.pop(0)
        study.tell(trial, [landscape.wer[candidate.key], landscape.params[candidate.key]])
        done.append(candidate.key)
    return done


def shares(
    landscapes: Iterable[Landscape], make: Make, seeds: int, trials: int, workers: int = 1
) -> tuple[list[list[float]], int]:
    """Share of the hypervolume after each trial, one list for each run; and how many candidates were tried twice."""
    curves, twice = [], 0
    for landscape in landscapes:
        for seed in range(seeds):
            done = run(landscape, make(landscape, seed), trials, workers)
            twice += len(done) - len(set(done))
            curves.append([landscape.share(done[: n + 1]) for n in range(len(done))])
    return curves, twice


def trials_needed(curves: list[list[float]], share: float) -> float:
    needed = [next((n + 1 for n, s in enumerate(curve) if s >= share), float("inf")) for curve in curves]
    return statistics.median(needed)


def main(seeds: int, trials: int, only: str, synthetic_count: int, workers: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console(width=120)
    groups = (
        {f"{synthetic_count} synthetic landscapes": [synthetic(s) for s in range(synthetic_count)]} if synthetic_count else {}
    )
    groups |= {path.stem: [table(path)] for path in sorted(TABLES.glob("*.json"))}
    names = only.split(",") if only else list(METHODS)
    for title, landscapes in groups.items():
        size = len(landscapes[0].wer)
        shown = Table(title=f"{title}: {size} candidates, share of the front's hypervolume in %, {workers} worker(s)")
        shown.add_column("method")
        at = [n for n in CHECKPOINTS if n <= trials]
        for column in (*(f"{n} trials" for n in at), "to 95 %", "to 99 %", "ms an ask"):
            shown.add_column(column, justify="right")
        for name in names:
            begin = time.perf_counter()
            runs = seeds if len(landscapes) == 1 else max(1, seeds // len(landscapes))
            curves, twice = shares(landscapes, METHODS[name], runs, trials, workers)
            asked = sum(map(len, curves))
            cells = []
            for n in at:
                values = sorted(100 * curve[min(n, len(curve)) - 1] for curve in curves)
                cells.append(f"{statistics.median(values):.1f} ({values[len(values) // 10]:.1f})")
            needed = [f"{trials_needed(curves, s):g}" for s in (0.95, 0.99)]
            shown.add_row(name, *cells, *needed, f"{1000 * (time.perf_counter() - begin) / asked:.0f}")
            if twice:
                console.print(f"{name}: {twice} candidates were tried twice")
        console.print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument("--synthetic", type=int, default=5, dest="synthetic_count")
    parser.add_argument("--workers", type=int, default=1, help="simulated, all of them busy at any time")
    main(**vars(parser.parse_args()))
