"""What closed-form repair and training each bring back, set by set: dev WER in %, and seconds.

    python benchmarks/repair.py studies/quickstart                      # ten sets of one to six layers
    python benchmarks/repair.py studies/quickstart --sets '8 9; 4 8' --plot repair.png
    python benchmarks/repair.py studies/quickstart --beam 2
    python benchmarks/repair.py studies/quickstart --sensitivity --sets '4 8; 3 5 7' --corpus more.jsonl

For each set of removed layers: dev WER without anything; after each variant of the repair, without and with the projector;
then after a quarter, a half and all of `--steps` training steps, from the anchor and from the repair, with the study's learning
rates times each of `--rates`; at last, where the smallest held-out loss between start and end is. The anchor is trained first,
if it is missing. Records are not touched, and test is not decoded.

The variants: `projector` refits the projector's first map only; `fc2 at cuts` the feed-forward maps of the layers below a cut;
`fc2 above` those of all layers from the lowest cut upwards; `layers` their attention's output maps as well.

`--beam` searches for the best set of each size by its dev loss after the repair, without any training. `--sensitivity` asks how
much the result depends on the ridge, on the number of utterances and which these are, and on other recordings (`--corpus`, a
manifest).
"""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from prunesearch.model.system import Reader, SpeechEncoder, SpeechProjector
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import Split, StudyConfig, load_study
from prunesearch.study.record import SplitResult
from prunesearch.training.anchor import starting_projector
from prunesearch.training.batches import by_length
from prunesearch.training.context import TrainingContext
from prunesearch.training.device import arithmetic
from prunesearch.training.finetune import FineTune, FineTuneSettings, TrainingSet
from prunesearch.training.repair import Repair
from prunesearch.training.ridge import LADDER

SETS = "5; 8; 4 8; 8 9; 3 5 7; 0 4 8; 4 6 7 8; 0 4 7 8; 4 5 6 7 8; 1 4 5 6 7 8"
VARIANTS = {"fc2 at cuts": (False, False), "fc2 above": (False, True), "layers": (True, True)}  # attention, above
BATCH = 32
SHARES = (0.25, 0.5, 1.0)
COUNTS = (10, 30, 100, 300, 1000)

LayerSet = tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    encoder: SpeechEncoder
    projector: SpeechProjector


def opened(study: Path, data: dict[str, Any] | None = None, **training: Any) -> TrainingContext:
    """The study with its repair switched on, and some keys of `[training]` and `[data]` replaced."""
    config: StudyConfig = load_study(study)
    changed = config.training.model_copy(update={"repair": "layers", "interpolate": True, **training})
    update = {"training": changed, "data": config.data.model_copy(update=data or {})}
    return TrainingContext.open(config.model_copy(update=update))


def spaced(removed: LayerSet) -> str:
    return " ".join(map(str, removed))


def dev_wer(context: TrainingContext, start: Start, split: Split = "dev") -> float:
    """In %, without any change of the parts."""
    reader = context.system.attach(start.projector.eval())
    return percent(context, reader, start.encoder, split)


def percent(context: TrainingContext, reader: Reader, encoder: SpeechEncoder, split: Split = "dev") -> float:
    states = context.encoded(encoder, split, context.used(split))
    return 100 * SplitResult.of(context.decode(reader, split, states)).errors.wer


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begin)


def repaired(context: TrainingContext, removed: LayerSet, table: Table) -> dict[str, float]:
    """A row for each variant; returns dev WERs by variant, with the projector."""
    plain = Start(context.pruned_encoder(Candidate(removed)), starting_projector(context))
    found = {"nothing": dev_wer(context, plain)}
    table.add_row(spaced(removed), "nothing", f"{found['nothing']:.1f}", "", "")
    seconds: list[float] = []
    with timed(seconds):
        Repair(context, removed).projector(plain.projector)
    found["projector"] = dev_wer(context, plain)
    table.add_row("", "projector", "", f"{found['projector']:.1f}", f"{seconds[-1]:.1f}")
    for variant, (attention, above) in VARIANTS.items():
        with timed(seconds):
            repair = Repair(context, removed, attention, above)
            repair.layers()
        start = Start(repair.encoder, starting_projector(context))
        without = dev_wer(context, start)
        repair.projector(start.projector)
        found[variant] = dev_wer(context, start)
        table.add_row("", variant, f"{without:.1f}", f"{found[variant]:.1f}", f"{seconds[-1]:.1f}")
    return found


def start_from(context: TrainingContext, removed: LayerSet, origin: str, ladder: Sequence[float] = LADDER) -> Start:
    """The pruned system, unchanged (`anchor`) or after the default repair."""
    if origin == "anchor":
        return Start(context.pruned_encoder(Candidate(removed)), starting_projector(context))
    repair = Repair(context, removed, ladder=ladder)
    repair.layers()
    start = Start(repair.encoder, starting_projector(context))
    repair.projector(start.projector)
    return start


def trained(context: TrainingContext, start: Start, rate: float) -> tuple[list[float], float, float]:
    """Dev WERs in % after each share of the steps, then with the weights that are kept; the share of the way that is kept, and
    seconds. Learning rates are the study's times `rate`; a LoRA is not trained."""
    budget = context.budget()
    budget = replace(budget, learning_rate=rate * budget.learning_rate)
    reader = context.system.attach(copy.deepcopy(start.projector))
    states = context.encoded(start.encoder, "train", context.drawn(budget))
    settings = FineTuneSettings(context.config.training, context.group, context.dtype)
    tuning = FineTune(reader, TrainingSet(states, context.targets), budget, settings)
    found = []
    for share in SHARES:
        tuning.run_to(round(share * budget.steps))
        found.append(percent(context, reader, start.encoder))
    tuning.interpolate()
    found.append(percent(context, reader, start.encoder))
    losses = tuning.progress.interpolation or {}
    return found, min(losses, key=losses.__getitem__), tuning.progress.seconds


def compare(context: TrainingContext, sets: Sequence[LayerSet], rates: Sequence[float]) -> list[Table]:
    """Every set: the variants, and trainings from both starts. The second table ends with means over the sets."""
    name = f"{context.config.name}: dev WER in %"
    repairs = Table(
        "removed", "refitted", "layers only", "and projector", "seconds",
        title=f"{name}, {len(context.repair_utterances)} utterances for the fit, {context.dtype}",
    )  # fmt: skip
    steps = [f"{share:.0%}" for share in SHARES]
    title = f"{name}, {context.budget().steps} steps of training without LoRA"
    trainings = Table("removed", "from", "rates", "start", *steps, "kept", "share kept", "seconds", title=title)
    rows: dict[tuple[str, float], list[list[float]]] = {}
    for removed in sets:
        print(
            f"{spaced(removed)}:", ", ".join(f"{k} {v:.1f}" for k, v in repaired(context, removed, repairs).items()), flush=True
        )
        for origin in ("anchor", "repair"):
            start = start_from(context, removed, origin)
            before = dev_wer(context, start)
            for rate in rates:
                wers, share, seconds = trained(context, start, rate)
                rows.setdefault((origin, rate), []).append([before, *wers])
                shown = (f"{wer:.1f}" for wer in (before, *wers))
                row = spaced(removed), origin, f"x {rate:g}", *shown, f"{share:.0%}", f"{seconds:.1f}"
                trainings.add_row(*row)
                print(*row, sep=" | ", flush=True)
    trainings.add_section()
    for (origin, rate), wers in rows.items():
        means = (f"{sum(column) / len(column):.2f}" for column in zip(*wers, strict=True))
        trainings.add_row("mean", origin, f"x {rate:g}", *means, "", "")
    return [repairs, trainings]


def sensitivity(study: Path, sets: Sequence[LayerSet], corpora: Sequence[str]) -> list[Table]:
    """Dev WER after the default repair: by ridge, by number of utterances from three seeds, and by corpus."""
    context = opened(study)
    names = [spaced(removed) for removed in sets]
    ridges = Table("ridge of every map", *names, title=f"{context.config.name}: dev WER in % by ridge")
    for ladder in (LADDER, *((ridge,) for ridge in LADDER[:-1])):
        label = "chosen on held-out utterances" if len(ladder) > 1 else f"{ladder[0]:g}"
        ridges.add_row(label, *(f"{dev_wer(context, start_from(context, s, 'repair', ladder)):.1f}" for s in sets))
    counts = Table("utterances", "seed", *names, title="by number of utterances, one in eight held out")
    for count in COUNTS:
        for seed in range(3):
            context = opened(study, repair_utterances=count)
            context.config = context.config.model_copy(update={"seed": seed})
            used = len(context.repair_utterances)
            counts.add_row(str(used), str(seed), *(f"{dev_wer(context, start_from(context, s, 'repair')):.1f}" for s in sets))
            if used < count:
                break  # all of them: the seed changes only which are held out
    others = Table("corpus", "utterances", *names, title="by corpus")
    for corpus in corpora:
        context = opened(study, {"repair": (str(Path(corpus).resolve()),)})
        wers = (f"{dev_wer(context, start_from(context, s, 'repair')):.1f}" for s in sets)
        others.add_row(corpus, str(len(context.repair_utterances)), *wers)
    return [ridges, counts, others]


def dev_loss(context: TrainingContext, start: Start) -> float:
    """Cross-entropy on dev, nats per token."""
    reader = context.system.attach(start.projector.eval())
    utterances, states = context.corpora["dev"], context.encoded(start.encoder, "dev", context.used("dev"))
    total, tokens = 0.0, 0
    for batch in by_length([u.seconds for u in utterances], BATCH):
        targets = [context.system.target(utterances[i].target, utterances[i].language) for i in batch]
        with torch.no_grad(), arithmetic(context.device, context.dtype):
            total += float(reader.loss_sum(*states.batch(batch, context.device), targets))
        tokens += sum(len(target.tokens) for target in targets)
    return total / tokens


def beam(context: TrainingContext, width: int, most: int) -> Table:
    """The best set of each size by dev loss after the repair, found by adding a layer to the `width` best smaller sets.

    Nothing is trained, and test is decoded once, for these.
    """
    table = Table("layers less", "found", "dev loss", "dev WER", "test WER", "sets tried", "seconds", title="repair alone")
    known: dict[LayerSet, float] = {}
    best: list[LayerSet] = [()]
    found: list[tuple[LayerSet, int, float]] = []
    begin = time.perf_counter()
    for _ in range(most):
        grown = {
            tuple(sorted((*s, layer))) for s in best for layer in context.config.removable(context.depth) if layer not in s
        }
        known |= {s: dev_loss(context, start_from(context, s, "repair")) for s in sorted(grown)}
        best = sorted(grown, key=known.__getitem__)[:width]
        found.append((best[0], len(known), time.perf_counter() - begin))
        print(f"{best[0]} has the smallest dev loss of {len(grown)}", flush=True)
    for removed, tried, seconds in found:
        start = start_from(context, removed, "repair")
        dev, test = dev_wer(context, start), dev_wer(context, start, "test")
        row = str(len(removed)), spaced(removed), f"{known[removed]:.3f}", f"{dev:.1f}", f"{test:.1f}"
        table.add_row(*row, str(tried), f"{seconds:.0f}")
    return table


def plot(context: TrainingContext, sets: Sequence[LayerSet], rate: float, path: Path) -> None:
    """For each set, dev WER without anything, after training from the anchor, and after the repair alone."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from prunesearch.report.plots import INK

    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    series: dict[str, list[float]] = {"nothing": [], "trained": [], "repaired": []}
    unpruned = dev_wer(context, start_from(context, (), "anchor"))
    for removed in sets:
        anchor = start_from(context, removed, "anchor")
        series["nothing"].append(dev_wer(context, anchor))
        series["trained"].append(trained(context, anchor, rate)[0][len(SHARES) - 1])
        series["repaired"].append(dev_wer(context, start_from(context, removed, "repair")))
    labels = {
        "nothing": "layers removed, nothing done",
        "trained": f"then {context.budget().steps} training steps, without repair",
        "repaired": "repaired by least squares, without training",
    }
    for (name, wers), colour, place in zip(series.items(), ("#c9ccd1", "#7aa6c2", "#d1495b"), (-1, 0, 1), strict=True):
        bars = axes.bar([i + 0.27 * place for i in range(len(sets))], wers, 0.25, color=colour, label=labels[name])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, color=INK)
    axes.axhline(unpruned, color=INK, linewidth=0.8, linestyle=":")
    axes.annotate(f"whole encoder: {unpruned:.1f}", (-0.5, unpruned), (0, 3), textcoords="offset points",
                  ha="right", fontsize=7, color=INK)  # fmt: skip
    axes.set_xlim(-1.9, len(sets) - 0.4)
    axes.set_xticks(range(len(sets)), [spaced(s) for s in sets], fontsize=8)
    axes.set_xlabel("removed layers")
    axes.set_ylabel("dev WER, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=200)


def main(arguments: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    sets = [tuple(map(int, s.split())) for s in arguments.sets.split(";")]
    if arguments.sensitivity:
        Console(width=110).print(*sensitivity(arguments.study, sets, arguments.corpus))
        return
    training = {} if arguments.steps is None else {"steps": arguments.steps}
    context = opened(arguments.study, **training)
    if arguments.beam:
        Console(width=110).print(beam(context, arguments.beam, arguments.most))
    elif arguments.plot:
        plot(context, sets, arguments.rates[0], arguments.plot)
    else:
        Console(width=110).print(*compare(context, sets, arguments.rates))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--sets", default=SETS, help="removed layers, separated by spaces; sets, separated by semicolons")
    parser.add_argument("--steps", type=int, help="of a training; default: the study's")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="factors of the study's learning rates")
    parser.add_argument("--sensitivity", action="store_true", help="vary ridge, utterances and corpus instead")
    parser.add_argument("--corpus", nargs="*", default=[], help="manifests to fit the repair on, for --sensitivity")
    parser.add_argument("--beam", type=int, help="search instead: how many sets of each size are grown by another layer")
    parser.add_argument("--most", type=int, default=6, help="layers of the largest set, for --beam")
    parser.add_argument("--plot", type=Path, help="draw dev WER by set into this file instead")
    main(parser.parse_args())
