"""How soon each method knows the front, where the truth is known.

    python benchmarks/search/compare.py [--seeds 20] [--trials 80] [--only 'layer-sets; tpe'] [--synthetic 5] [--noise]
    python benchmarks/search/compare.py --layers 24 --trials 160     # synthetic encoders as deep as Whisper-medium

Every method runs through the study's own sampler interface, on synthetic landscapes and on committed tables of trained
candidates. What is printed, and drawn in `curves/`, is the share of the true front's hypervolume after so many trials:
median, and the worst tenth. The column `screening` tells what the screened sets of a scan cost, in trainings; the other columns
leave it out. Trials that are ended early count as what they were trained for; decoding at rungs is not counted.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import optuna
from landscapes import Landscape, synthetic, table
from matplotlib.figure import Figure
from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from strategies import SCREENING, STRATEGIES, Evolution, Scores, block_influence_order, fittest

from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.rungs import Finished, chance_of_domination
from prunesearch.search.samplers import CandidateSampler, SpaceExhausted, optuna_sampler
from prunesearch.search.space import SearchSpace
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet, spearman

TABLES, CURVES = (Path(__file__).parent / name for name in ("tables", "curves"))
TRAINING_NOISE = 0.1  # what the log WER of one training deviates by, as on the quickstart
MEASURED = {  # keys of a table: what was measured for each set
    "screened_loss": "loss after the repair",
    "residual": "residual after the repair",
    "scan": "Δ loss without a repair",
    "drift": "projector drift",
}
SLOW = "gp"  # seconds to tens of seconds an ask: only when named
CHECKPOINTS = (10, 20, 40, 80, 160)
CONFIDENCE = 0.95  # with which a rung ends a trial, as in a study by default
HELD_OUT = 100  # the first seed of the synthetic encoders that are reported; settings were chosen on seeds from 0
Ends = Callable[[optuna.Study, Landscape, Candidate, int, float], bool]  # of a trial at a step, with its WER there


def dominated(confidence: float) -> Ends:
    """The study's own rule."""

    def ends(study: optuna.Study, landscape: Landscape, candidate: Candidate, step: int, wer: float) -> bool:
        others = [
            Finished(t.values[1], t.values[0], t.user_attrs.get(f"rung_{step}", {}).get("wer"))
            for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        ]
        return chance_of_domination(wer, landscape.params(candidate.system), others) >= confidence

    return ends


def staged(study: optuna.Study, landscape: Landscape, candidate: Candidate, step: int, wer: float) -> bool:
    """Staged budgets: offspring that err more at a rung than their parent did there are given no more steps."""
    parent = fittest(study, len(candidate.removed_layers))
    return parent is not None and wer > parent.user_attrs[f"rung_{step}"]["wer"]


@dataclass(frozen=True)
class Method:
    """A way of searching: a sampler for a landscape and a seed, and what ends its trials early."""

    make: Callable[[Landscape, int], BaseSampler]
    ends: Ends | None = None
    needs: tuple[str, ...] = ()  # of a landscape
    screens: bool = False  # uses the screened sets

    def suits(self, landscape: Landscape) -> bool:
        return all(getattr(landscape, name) is not None for name in self.needs)


def layer_sets(landscape: Landscape, seed: int, with_scan: bool = True) -> BaseSampler:
    scan = landscape.screened if with_scan else None
    return LayerSetSampler(landscape.space, lambda c: landscape.params(c.system), seed, scan=scan)


def of_optuna(name: str) -> Method:
    return Method(lambda landscape, seed: optuna_sampler(name, landscape.space, seed, 10, landscape.screened), screens=True)


def of_scores(name: str, make: Callable[[SearchSpace, int, Scores], CandidateSampler]) -> Method:
    screens = name in SCREENING
    return Method(
        lambda landscape, seed: make(landscape.space, seed, landscape.screened), needs=("screening",), screens=screens
    )


def of_lies(how: str) -> Method:
    """A screening that misleads on purpose: how long until it is outvoted?"""

    def make(landscape: Landscape, seed: int) -> BaseSampler:
        assert landscape.screening
        lying = replace(landscape, screening=landscape.screening.lying(how))
        return layer_sets(lying, seed)

    return Method(make, needs=("screening",), screens=True)


METHODS: dict[str, Method] = {
    "layer-sets": Method(layer_sets, screens=True),
    "layer-sets with rungs": Method(layer_sets, dominated(CONFIDENCE), needs=("rungs",), screens=True),
    "layer-sets without screening": Method(lambda landscape, seed: layer_sets(landscape, seed, False)),
    "layer-sets, random screening": of_lies("random"),
    "layer-sets, reversed screening": of_lies("reversed"),
    **{name: of_optuna(name) for name in ("tpe", "nsga2", "gp")},
    "random": Method(lambda landscape, seed: optuna_sampler("random", landscape.space, seed, 10)),
    **{name: of_scores(name, make) for name, make in STRATEGIES.items()},
    "Block Influence order": Method(
        lambda landscape, seed: block_influence_order(landscape.space, seed, landscape.block_influence or {}),
        needs=("block_influence",),
    ),
    "staged evolution": Method(lambda landscape, seed: Evolution(landscape.space, seed), staged, needs=("rungs",)),
}


@dataclass
class Run:
    """Candidates in the order of their outcomes, what each cost in full trainings, and which a rung ended."""

    order: list[str] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)

    def finished(self, within: float = math.inf) -> list[str]:
        """Those that were trained to the end, before more than so many trainings were spent."""
        spent = itertools.accumulate(self.costs)
        return [key for key, cost in zip(self.order, spent, strict=True) if cost <= within and key not in self.ended]


def run(
    landscape: Landscape,
    sampler: BaseSampler,
    trials: float = math.inf,
    trainings: float = math.inf,
    workers: int = 1,
    ends: Ends | None = None,
) -> Run:
    """A search of so many trials, or so many full trainings' worth of steps, with `workers` busy at any time; trials end at
    the rung where `ends` says so."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    running: list[tuple[optuna.Trial, Candidate]] = []
    out = Run()

    def left() -> float:
        return min(trials - len(out.order), trainings - sum(out.costs)) - len(running)

    while running or left() > 0:
        try:
            while len(running) < workers and left() > 0:
                trial = study.ask()
                running.append((trial, landscape.space.suggest(trial)))
        except SpaceExhausted:
            study.tell(trial, state=TrialState.FAIL)
            if not running:
                break
        trial, candidate = running.pop(0)
        out.order.append(candidate.key)
        stopped = _ended_at(study, trial, landscape, candidate, ends) if ends else None
        if stopped is None:
            study.tell(trial, [landscape.trained(candidate), landscape.params(candidate.system)])
            out.costs.append(1.0)
        else:
            out.ended.add(candidate.key)
            study.tell(trial, state=TrialState.PRUNED)
            out.costs.append(stopped / landscape.steps)
    return out


def _ended_at(study: optuna.Study, trial: optuna.Trial, landscape: Landscape, candidate: Candidate, ends: Ends) -> int | None:
    """The step of the rung at which the trial ends, as the worker would have it."""
    for step, wer in sorted((landscape.rungs or {}).get(candidate.system.key, {}).items()):
        trial.set_user_attr(f"rung_{step}", {"wer": wer, "params": landscape.params(candidate.system)})
        if ends(study, landscape, candidate, step, wer):
            return step
    return None


def trials_needed(curves: list[list[float]], share: float) -> float:
    needed = [next((n + 1 for n, s in enumerate(curve) if s >= share), float("inf")) for curve in curves]
    return statistics.median(needed)


def methods_tables(
    title: str, landscapes: list[Landscape], names: list[str], seeds: int, trials: int
) -> tuple[list[Table], dict[str, list[float]]]:
    """Each method's share of the hypervolume, in WER and in log WER: median and, in brackets, the worst tenth; and the
    medians in WER as curves."""
    tables: list[Table] = []
    lines: dict[str, list[float]] = {}
    at = [n for n in CHECKPOINTS if n <= trials]
    for scale in ("WER", "log WER"):
        heading = f"{title}: {landscapes[0].space.size:,} candidates; share of the front's hypervolume in {scale}, %"
        tables.append(
            Table("method", "screening", *(f"{n} trainings" for n in at), "to 95 %", "to 99 %", "ms an ask", title=heading)
        )
        for column in tables[-1].columns[1:]:
            column.justify = "right"
    screened = [(landscape, landscape.screened) for landscape in landscapes]
    screening = statistics.mean(len(s) * landscape.screening.price for landscape, s in screened if landscape.screening)
    for shown, log in zip(tables, (False, True), strict=True):
        alone = [landscape.share((Candidate(s).key for s in best_of_sizes(known)), log) for landscape, known in screened]
        shown.caption = f"by screening alone, the best set of each size without LoRA: {_median_and_low(alone)}"
    for name in names:
        method = METHODS[name]
        if not all(map(method.suits, landscapes)):
            continue
        begin = time.perf_counter()
        runs = [
            (landscape, run(landscape, method.make(landscape, seed), trainings=trials, ends=method.ends))
            for landscape in landscapes
            for seed in range(max(1, seeds // len(landscapes)))
        ]
        milliseconds = 1000 * (time.perf_counter() - begin) / sum(len(r.order) for _, r in runs)
        for shown, log in zip(tables, (False, True), strict=True):
            curves = [[landscape.share(r.finished(n), log) for n in range(1, trials + 1)] for landscape, r in runs]
            found = (_median_and_low([c[n - 1] for c in curves]) for n in at)
            needed = (f"{trials_needed(curves, s):g}" for s in (0.95, 0.99))
            price = f"{screening:.0f}" if method.screens else ""
            shown.add_row(name, price, *found, *needed, f"{milliseconds:.0f}")
            if not log:
                lines[name] = [statistics.median(values) for values in zip(*curves, strict=True)]
    return tables, lines


def best_of_sizes(known: Scores) -> list[LayerSet]:
    """The best set of each size."""
    return [min((s for s in known if len(s) == size), key=known.__getitem__) for size in sorted({len(s) for s in known})]


def draw(title: str, lines: dict[str, list[float]]) -> None:
    """The medians, a curve a method: `curves/<title>.png`."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, line) in enumerate(lines.items()):
        style, width = ("-", "--", ":")[number // 10 % 3], 2.4 if name == "layer-sets" else 1.2
        axes.plot(range(1, len(line) + 1), [100 * v for v in line], style, linewidth=width, label=name)
    axes.set(xlabel="trainings", ylabel="share of the true front's hypervolume, %, median", ylim=(0, 102), title=title)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.legend(fontsize=7, loc="lower right")
    CURVES.mkdir(exist_ok=True)
    figure.savefig(CURVES / f"{title.replace(' ', '-')}.png", dpi=150)


def _median_and_low(values: list[float]) -> str:
    ordered = sorted(100 * v for v in values)
    return f"{statistics.median(ordered):.1f} ({ordered[len(ordered) // 10]:.1f})"


CONDITIONS = (
    ("layer-sets", "layer-sets", 1, False),
    ("layer-sets, 8 workers", "layer-sets", 8, False),
    ("layer-sets, rungs", "layer-sets", 1, True),
    ("tpe, rungs", "tpe", 1, True),
    ("random, rungs", "random", 1, True),
)  # label, method, workers, whether rungs end trials


def conditions_table(title: str, landscapes: list[Landscape], seeds: int, trials: int, confidence: float) -> Table:
    """The same search with many workers, and with rungs, which save more where more of what is proposed is hopeless."""
    shown = Table(title=f"{title}: after {trials} trials")
    for column in ("", "share, %", "twice", "steps used, %", "ended by a rung", "of these on the true front"):
        shown.add_column(column, justify="right" if column else "left")
    for label, method, workers, rungs in CONDITIONS:
        ends = dominated(confidence) if rungs else None
        if rungs and not all(landscape.rungs for landscape in landscapes):
            continue
        runs = [
            (landscape, run(landscape, METHODS[method].make(landscape, seed), trials, workers=workers, ends=ends))
            for landscape in landscapes
            for seed in range(max(1, seeds // len(landscapes)))
        ]
        twice = sum(len(r.order) - len(set(r.order)) for _, r in runs)
        on_front = sum(landscape.on_true_front(Candidate.from_key(key)) for landscape, r in runs for key in r.ended)
        ended = sum(len(r.ended) for _, r in runs)
        steps = statistics.mean(sum(r.costs) / len(r.costs) for _, r in runs)
        found = _median_and_low([landscape.share(r.finished()) for landscape, r in runs])
        of_rungs = (f"{ended} in {len(runs)} runs", str(on_front)) if rungs else ("", "")
        shown.add_row(label, found, str(twice), f"{100 * steps:.0f}", *of_rungs)
    return shown


def noise_table(count: int, runs: int, trials: int) -> Table:
    """What it is worth to train the front's members again, where two trainings of the same system differ."""
    shown = Table(title=f"{count} synthetic landscapes under noise: layer-sets after {trials} trials, what looks best then")
    for column in ("standard deviation of log WER", "repeats, at most", "share, %", "of the trials, repeats"):
        shown.add_column(column, justify="right")
    for noise in (0.05, 0.15):
        for repeats in (0, 3):
            shares, again = [], []
            for seed in range(count):
                landscape = synthetic(HELD_OUT + seed, noise=noise)
                landscape = replace(landscape, space=replace(landscape.space, repeats=repeats))
                for n in range(max(1, runs // count)):
                    order = run(landscape, layer_sets(landscape, n), trials).order
                    shares.append(landscape.share(order))
                    again.append(sum("@" in key for key in order))
            shown.add_row(f"{noise:g}", str(repeats), _median_and_low(shares), f"{statistics.mean(again):.0f}")
    return shown


def synthetic_screening_table(count: int) -> Table:
    """The same of the synthetic encoders' screening, to compare: means of held-out encoders."""
    sizes = (1, 2, 3, 4)
    shown = Table(title=f"{count} synthetic landscapes: Spearman's ρ of the screening with trained WER, LoRA of rank 0")
    for column in ("", "single layers", "pairs", "sets of 3", "sets of 4"):
        shown.add_column(column, justify="right" if column else "left")
    found: dict[int, list[float]] = {n: [] for n in sizes}
    for seed in range(HELD_OUT, HELD_OUT + count):
        landscape = synthetic(seed, noise=TRAINING_NOISE)
        assert landscape.screening
        for n in sizes:
            sets = list(combinations(landscape.space.removable, n))
            screened = [landscape.screening.increase(s) for s in sets]
            found[n].append(spearman(screened, [landscape.trained(Candidate(s)) for s in sets]))
    shown.add_row("loss after the repair, of the set", *(f"{statistics.mean(found[n]):+.2f}" for n in sizes))
    return shown


def criteria_table(path: Path) -> Table:
    """How well what a scan measures ranks what training makes of it."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    wer = {key: row["errors"] for key, row in stored["candidates"].items()}
    rank = min(stored["ranks"])
    wer = {c.removed_layers: errors for key, errors in wer.items() if (c := Candidate.from_key(key)).lora_rank == rank}
    singles = [i for i in stored["removable"] if (i,) in wer]
    shown = Table(title=f"{path.stem}: Spearman's ρ of a criterion with trained dev WER, LoRA of rank {rank}")
    sizes = range(2, stored["max_removed"] + 1)
    for column in ("criterion", "single layers", "pairs", *(f"sets of {n}" for n in sizes[1:])):
        shown.add_column(column, justify="left" if column == "criterion" else "right")
    sets = {n: [s for s in combinations(stored["removable"], n) if s in wer] for n in sizes}

    def measured(scores: dict[str, float], of: list[tuple[int, ...]]) -> str:
        both = [(scores[k], wer[s]) for s in of if (k := ",".join(map(str, s))) in scores]
        return f"{spearman(*map(list, zip(*both, strict=True))):+.2f}" if len(both) > 2 else "–"

    for name, label in MEASURED.items():
        if name in stored:
            shown.add_row(
                f"{label}, of the set", *(measured(stored[name], of) for of in ([(i,) for i in singles], *sets.values()))
            )
    for criterion, values in stored["criteria"].items():
        added = {n: [sum(values[str(i)] for i in s) for s in of] for n, of in sets.items()}
        rho = [spearman([values[str(i)] for i in singles], [wer[i,] for i in singles])]
        rho += [spearman(added[n], [wer[s] for s in of]) for n, of in sets.items()]
        shown.add_row(f"{criterion}, sum over layers", *("–" if math.isnan(r) else f"{r:+.2f}" for r in rho))
    return shown


def spread(path: Path) -> str | None:
    """How far one training of a candidate lies from the mean of two, from other seeds, anchor and all."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    pairs = [
        (stored["candidates"][key]["errors"], errors)
        for again in stored["again"].values()
        for key, errors in again.items()
        if key in stored["candidates"]
    ]
    if not pairs:
        return None
    apart = [math.log(max(1, a) / max(1, b)) for a, b in pairs]
    deviation = math.sqrt(statistics.mean(d * d for d in apart) / 2)
    return f"{path.stem}: {len(pairs)} candidates trained twice; log WER of one training deviates by {deviation:.3f}"


def main(
    seeds: int, trials: int, only: list[str], synthetic_count: int, layers: int | None, noise: bool, confidence: float
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console(width=120)
    if noise:
        console.print(noise_table(synthetic_count, seeds, trials))
        return
    groups: dict[str, list[Landscape]] = {}
    seeds_held_out = range(HELD_OUT, HELD_OUT + synthetic_count)
    if layers:
        title = f"{synthetic_count} synthetic landscapes of {layers} layers"
        groups[title] = [synthetic(s, layers, layers // 2) for s in seeds_held_out]
    elif synthetic_count:
        groups[f"{synthetic_count} synthetic landscapes"] = [synthetic(s) for s in seeds_held_out]
    tables = [] if layers else sorted(TABLES.glob("*.json"))
    for path in tables:
        if whole := table(path):
            groups[path.stem] = [whole]
        else:
            console.print(f"{path.stem}: not every candidate was trained, so searches on it cannot be compared")
    names = only or [name for name in METHODS if name != SLOW]
    for title, landscapes in groups.items():
        most = min(
            trials, *(landscape.space.size // 2 for landscape in landscapes)
        )  # half of a small table: else all are tried
        shown, lines = methods_tables(title, landscapes, names, seeds, most)
        console.print(*shown)
        if not only:
            draw(title, lines)
        console.print(conditions_table(title, landscapes, seeds, most, confidence))
    if synthetic_count and not layers:
        console.print(synthetic_screening_table(synthetic_count))
    for path in tables:
        console.print(criteria_table(path))
        if said := spread(path):
            console.print(said)


def methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(";")]
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be of {'; '.join(METHODS)}")
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument(
        "--only", type=methods, default=[], help="methods, separated by semicolons; default: all but gp; no curves"
    )
    parser.add_argument("--synthetic", type=int, default=5, dest="synthetic_count")
    parser.add_argument("--layers", type=int, help="only synthetic encoders, of so many layers, half of them removable at once")
    parser.add_argument("--noise", action="store_true", help="only what repeats are worth under noise")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="with which a rung ends a trial, second table")
    main(**vars(parser.parse_args()))
