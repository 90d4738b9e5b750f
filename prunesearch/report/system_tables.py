"""Tables of systems: front and baselines, their size and speed, and the certainty of their differences."""

from collections.abc import Sequence

from prunesearch.report.comparison import Comparison
from prunesearch.report.table import Table
from prunesearch.report.values import (
    PARAMETER_GROUPS,
    UNKNOWN,
    kinds_text,
    layers,
    named,
    parameters_and_change,
    parameters_and_changes,
    points,
    rank,
    signed,
    title,
    wer_percent,
)
from prunesearch.study.record import RunRecord

SUMMARY_ROWS = 16  # with the verdict above, they fit a screen of about 40 lines


def marks(comparison: Comparison) -> str:
    """What the signs beside a system mean."""
    beaten = f"★ no more parameters than {comparison.to_beat} and a lower dev WER"
    return f"● on the front, chosen on dev. {beaten}. ×2: mean of two trainings."


def summary_table(comparison: Comparison) -> Table:
    """Front and baselines on one screen: a front of many members is thinned out."""
    group = comparison.objective.removesuffix("_params")
    shown = _thinned(comparison, SUMMARY_ROWS)
    hidden = len(comparison.front_and_baselines) - len(shown)
    note = f"{marks(comparison)} Change: against the unpruned system without LoRA."
    if hidden:
        note += f" {hidden} more members of the front are in the table `systems`."
    return Table(
        "summary",
        "Front and baselines",
        ("system", "removed layers", "rank", "dev WER, %", "test WER, %", f"{group} params, M", "change"),
        tuple((_marked(comparison, r), *_what(r), *parameters_and_change(comparison, r, group)) for r in shown),
        note,
        text_columns=("removed layers",),
    )


def _thinned(comparison: Comparison, most: int) -> list[RunRecord]:
    """Front and baselines. If they are more than `most`: baselines, winner, knee, and members evenly spaced along the front."""
    records = comparison.front_and_baselines
    if len(records) <= most:
        return list(records)
    chosen = [comparison.chosen, comparison.knee, *comparison.baselines.values()]
    wanted = {r.candidate for r in chosen if r}
    front = [r.candidate for r in comparison.front if r.candidate not in wanted]
    room = max(2, most - len(wanted))
    wanted |= {front[round(i * (len(front) - 1) / (room - 1))] for i in range(room)}
    return [r for r in records if r.candidate in wanted]


def systems_table(comparison: Comparison) -> Table:
    """Front and baselines, fewest parameters first."""
    shown = comparison.front_and_baselines
    return Table(
        "systems",
        "Front and baselines, WER in %",
        ("system", "removed", "rank", "dev WER", "test WER", "S/D/I", "train s"),
        tuple((_marked(comparison, r), *_what(r), _kinds(r), f"{r.cost.train_seconds:.0f}") for r in shown),
        f"{marks(comparison)} S/D/I: substitutions, deletions and insertions per 100 reference words on test, or on dev (*) if "
        "test is not decoded.",
        text_columns=("removed",),
        pins=tuple((r.candidate.key, title(r)) for r in shown),
    )


def repair_table(comparison: Comparison) -> Table:
    """How far the closed-form repair alone goes, beside the result after training."""
    rows = []
    for record in comparison.front_and_baselines:
        start = next((rung.errors for rung in record.rungs if rung.step == 0), None)
        if start is not None and record.steps:
            repaired = "–" if record.repair is None else record.repair.method
            share = "–" if record.share is None else f"{record.share:.0%}"
            before, after = f"{100 * start.wer:.2f}", wer_percent(record.dev)
            rows.append((title(record), layers(record), rank(record), repaired, before, after, share))
    return Table(
        "repair",
        "Before and after training, dev WER in %",
        ("system", "removed layers", "rank", "repaired", "before training", "after training", "kept"),
        tuple(rows),
        "Before training: layers removed, encoder and projector refitted by least squares, no step taken. Kept: the share of "
        "the way from there to the trained weights, by the loss on held-out utterances of train.",
        text_columns=("removed layers", "repaired"),
    )


def parameters_table(comparison: Comparison) -> Table:
    """The sizes of front and baselines, and their change under three denominators."""
    return Table(
        "parameters",
        "Parameters, millions",
        ("system", *(column for group in PARAMETER_GROUPS for column in (group, "change"))),
        tuple(
            (title(r), *(cell for size in parameters_and_changes(comparison, r) for cell in size))
            for r in comparison.front_and_baselines
        ),
        "Speech is encoder, projector and LoRA; total adds the LLM. Change: against the unpruned system without LoRA.",
    )


def removed_table(comparison: Comparison) -> Table:
    """The lowest dev WER at each number of removed layers."""
    return Table(
        "removed",
        "Best candidate at each number of removed layers, WER in %",
        ("number removed", "removed", "rank", "dev WER", "test WER", "tried"),
        tuple((str(n), *_what(b.record), str(b.tried)) for n, b in comparison.best_by_removed.items()),
        "Chosen on dev, at any LoRA rank. The more candidates were tried, the more optimistic the best one's dev WER is.",
        text_columns=("removed",),
    )


def contrasts_table(comparison: Comparison) -> Table:
    """Paired differences: of the candidates that beat top2+lora, and between baselines."""
    contrasts = (*comparison.dominating, *comparison.differences)
    return Table(
        "contrasts",
        "Paired differences",
        ("system", "against", "split", "WER, points", "95 % interval", "WER is"),
        tuple(
            (
                title(c.system),
                title(c.reference),
                str(c.split),
                points(d.estimate),
                f"{points(d.low)} to {points(d.high)}",
                d.verdict,
            )
            for c in contrasts
            if (d := c.difference)
        ),
        "WER of the system minus WER of the other. The interval is a paired bootstrap over utterances, and over trainings if a "
        "system has several. With one training, the interval does not cover the choice of the seed.",
        text_columns=("against", "WER is"),
    )


def paper_claims_table(comparison: Comparison) -> Table:
    """What the paper claims, and what this study measured."""
    rows = []
    for c in comparison.paper_claims:
        published = "{:g} to {:g}".format(*sorted(c.published, key=abs)).replace("-", "−") if c.published else ""
        interval = "exact" if c.exact else "too few errors" if c.low == c.high else f"{signed(c.low)} to {signed(c.high)}"
        rows.append(
            (
                named(c.claim, comparison.rate),
                c.language or "all",
                published,
                f"{signed(c.measured)} {c.unit}",
                interval,
                c.verdict,
            )
        )
    return Table(
        "paper-claims",
        "The paper's claims",
        ("claim", "language", "published, %", "measured", "95 % interval", "verdict in this study"),
        tuple(rows),
        "arXiv 2603.27981. Intervals: paired bootstrap over utterances, and over trainings if there are several. A claim "
        "about a size holds if the interval lies on its side of zero and overlaps the published range; a claim about a "
        "direction holds if the interval lies on that side of zero.",
        text_columns=("verdict in this study",),
    )


def ratios_table(comparison: Comparison) -> Table:
    """Measured speed and size of systems, as ratios to the unpruned system's."""
    found = comparison.measured
    where = f"{found.device}, {found.dtype}, torch {found.torch}, {found.threads} threads" if found else ""

    def ratio(median: float, low: float, high: float) -> str:
        return f"{median:.2f} ({low:.2f}–{high:.2f})"

    return Table(
        "measurement",
        "Measured speed and size, as ratios to the unpruned system",
        (
            "system",
            "encoder alone",
            "encoder in batches",
            "samples to text",
            "samples to text in batches",
            "parameters",
            "file",
        ),
        tuple(
            (
                s.name or s.candidate,
                ratio(s.ratios.encoder, s.lowest.encoder, s.highest.encoder),
                ratio(s.ratios.batch_encoder, s.lowest.batch_encoder, s.highest.batch_encoder),
                ratio(s.ratios.end_to_end, s.lowest.end_to_end, s.highest.end_to_end),
                ratio(s.ratios.batch_end_to_end, s.lowest.batch_end_to_end, s.highest.batch_end_to_end),
                f"{s.ratios.parameters:.3f}",
                f"{s.ratios.file:.3f}",
            )
            for s in (found.systems if found else ())
        ),
        "Seconds of the system over seconds of the unpruned one: median of the ratios over runs and, in brackets, their range. "
        f"Parameters and file: bytes. Measured by `prunesearch measure` on {where}.",
    )


def _marked(comparison: Comparison, record: RunRecord) -> str:
    on_front = any(r.candidate == record.candidate for r in comparison.front)
    beating = any(c.system.candidate == record.candidate for c in comparison.dominating)
    times = comparison.trainings[record.candidate]
    return f"{record.name or 'found'}{' ●' * on_front}{' ★' * beating}{f' ×{times}' * (times > 1)}"


def _what(record: RunRecord) -> Sequence[str]:
    """Removed layers, rank, dev and test WER."""
    return layers(record), rank(record), wer_percent(record.dev), wer_percent(record.test)


def _kinds(record: RunRecord) -> str:
    if record.reported is None:
        return UNKNOWN
    split, result = record.reported
    return kinds_text(result.errors) + " *" * (split == "dev")
