"""What closed-form repair and training each bring back, set by set: dev WER in %, and seconds.

    python benchmarks/repair.py studies/quickstart                      # ten sets of one to six layers
    python benchmarks/repair.py studies/quickstart --sets '8 9; 4 8' --rates 1 0.3 0.1

For each set of removed layers: dev WER without anything; after each variant of the repair, without and with the projector; then
after a quarter, a half and all of the study's steps, from the anchor and from the repair, with the study's learning rates times
each of `--rates`. The anchor is trained first, if it is missing. Records are not touched.

The variants: `projector` refits the projector's first map only; `fc2 at cuts` the feed-forward maps of the layers below a cut;
`fc2 above` those of all layers from the lowest cut upwards; `layers` their attention's output maps as well.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging

from prunesearch.model.projector import Projector
from prunesearch.model.slam import SpeechLlm
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.record import SplitResult
from prunesearch.training.anchor import starting_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.finetune import FineTune, FineTuneSettings, TrainingSet
from prunesearch.training.repair import Repair

SETS = "5; 8; 4 8; 8 9; 3 5 7; 0 4 8; 4 6 7 8; 0 4 7 8; 4 5 6 7 8; 1 4 5 6 7 8"
VARIANTS = {"fc2 at cuts": (False, False), "fc2 above": (False, True), "layers": (True, True)}  # attention, above
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    encoder: WhisperEncoder
    projector: Projector


def dev_wer(context: TrainingContext, start: Start) -> float:
    """In %, without any change of the parts."""
    slam = SpeechLlm(start.projector.eval(), context.llm, context.llm.model)
    return percent(context, slam, start.encoder)


def percent(context: TrainingContext, slam: SpeechLlm, encoder: WhisperEncoder) -> float:
    states = context.encoded(encoder, "dev", context.used("dev"))
    return 100 * SplitResult.of(context.decode(slam, "dev", states)).errors.wer


def repaired(context: TrainingContext, removed: tuple[int, ...], table: Table) -> Start:
    """A row for each variant; returns the parts of the last one."""
    plain = Start(context.pruned_encoder(Candidate(removed)), starting_projector(context))
    name = " ".join(map(str, removed))
    table.add_row(name, "nothing", f"{dev_wer(context, plain):.1f}", "", "")
    begin = time.perf_counter()
    Repair(context, removed).projector(plain.projector)
    seconds = time.perf_counter() - begin
    table.add_row("", "projector", "", f"{dev_wer(context, plain):.1f}", f"{seconds:.1f}")
    for variant, (attention, above) in VARIANTS.items():
        begin = time.perf_counter()
        repair = Repair(context, removed, attention, above)
        repair.layers()
        start = Start(repair.encoder, starting_projector(context))
        without = dev_wer(context, start)
        repair.projector(start.projector)
        seconds = time.perf_counter() - begin
        table.add_row("", variant, f"{without:.1f}", f"{dev_wer(context, start):.1f}", f"{seconds:.1f}")
    return start


def trained(context: TrainingContext, start: Start, rate: float) -> list[float]:
    """Dev WER in % after each share of the steps, at the study's learning rates times `rate`; a LoRA is not trained."""
    budget = context.budget()
    budget = replace(budget, learning_rate=rate * budget.learning_rate)
    slam = SpeechLlm(copy.deepcopy(start.projector), context.llm, context.llm.model)
    states = context.encoded(start.encoder, "train", context.drawn(budget))
    settings = FineTuneSettings(context.config.training, context.group, context.dtype)
    tuning = FineTune(slam, TrainingSet(states, context.targets), budget, settings)
    found = []
    for share in SHARES:
        tuning.run_to(round(share * budget.steps))
        found.append(percent(context, slam, start.encoder))
    return found


def main(study: Path, sets: Sequence[tuple[int, ...]], rates: Sequence[float]) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = load_study(study)
    training = config.training.model_copy(update={"repair": "layers"})
    context = TrainingContext.open(config.model_copy(update={"training": training}))
    title = f"{context.config.name}: dev WER in %, {len(context.repair_utterances)} utterances for the fit, {context.dtype}"
    repairs = Table("removed", "refitted", "layers only", "and projector", "seconds (with decoding)", title=title)
    steps = [f"{share:.0%}" for share in SHARES]
    trainings = Table("removed", "from", "rates", "0 %", *steps, title=f"training, {context.budget().steps} steps without LoRA")
    for removed in sets:
        best = repaired(context, removed, repairs)
        anchor = Start(context.pruned_encoder(Candidate(removed)), starting_projector(context))
        for origin, start in (("anchor", anchor), ("repair", best)):
            for rate in rates:
                shown = (f"{wer:.1f}" for wer in (dev_wer(context, start), *trained(context, start, rate)))
                trainings.add_row(" ".join(map(str, removed)), origin, f"x {rate:g}", *shown)
        print(f"{removed} done", flush=True)
    Console(width=110).print(repairs, trainings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--sets", default=SETS, help="removed layers, separated by spaces; sets, separated by semicolons")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0])
    a = parser.parse_args()
    main(a.study, [tuple(map(int, s.split())) for s in a.sets.split(";")], a.rates)
