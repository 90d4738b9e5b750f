"""A comparison in words and numbers: sentences, tables for the terminal, JSON and CSV for other programs."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from prunesearch.record import RunRecord, SplitResult
from prunesearch.report.comparison import CLAIMS, TO_BEAT, Comparison, Contrast
from prunesearch.report.front import dev_wer

OBJECTIVES = {
    "speech_params": "speech parameters (encoder + projector + LoRA)",
    "encoder_params": "encoder parameters",
    "total_params": "total parameters (speech and LLM)",
}


@dataclass(frozen=True)
class Table:
    """A table that the terminal and the page both show. The first column names its row; `records` are those that the rows
    stand for, where a reader of the page may pin them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    records: tuple[RunRecord, ...] = ()


def render(comparison: Comparison) -> RenderableType:
    """The whole comparison for a rich console."""
    parts: list[RenderableType] = [Text(comparison.study, style="bold"), Text("\n".join(verdict(comparison)) + "\n")]
    return Group(*parts, *(_rich(table) for table in tables(comparison)))


def tables(comparison: Comparison) -> list[Table]:
    """The tables that have something to say."""
    made = (
        systems_table(comparison),
        parameters_table(comparison),
        removed_table(comparison),
        contrasts_table(comparison),
        claims_table(comparison),
        layers_table(comparison),
        languages_table(comparison),
    )
    return [table for table in made if table.rows]


def systems_table(comparison: Comparison) -> Table:
    """Front and baselines, fewest parameters first."""
    beating = {c.system.candidate for c in comparison.dominating}
    on_front = {r.candidate for r in comparison.front}
    shown = _shown(comparison)
    return Table(
        "Front and baselines, WER in %",
        ("system", "removed", "rank", "dev WER", "test WER", "S/D/I", "train s"),
        tuple(
            (
                f"{r.name or 'found'}{' ●' * (r.candidate in on_front)}{' ★' * (r.candidate in beating)}"
                + (f" ×{times}" if (times := comparison.trainings[r.candidate]) > 1 else ""),
                *_what(r),
                error_kinds(r),
                f"{r.cost.train_seconds:.0f}",
            )
            for r in shown
        ),
        "● on the front, chosen on dev. ★ no more parameters than top2+lora and a lower dev WER. S/D/I: substitutions, "
        "deletions and insertions per 100 reference words on test, or on dev (*) where test is not decoded. ×2: the mean of "
        "two trainings.",
        tuple(shown),
    )


def parameters_table(comparison: Comparison) -> Table:
    """The sizes of front and baselines, and their change under three denominators."""
    groups = ("encoder", "speech", "total")
    return Table(
        "Parameters, millions",
        ("system", *(column for group in groups for column in (group, "change"))),
        tuple((title(r), *(cell for size in sizes(comparison, r) for cell in size)) for r in _shown(comparison)),
        "Speech is encoder, projector and LoRA; total adds the LLM. Change against the unpruned system without LoRA.",
    )


def removed_table(comparison: Comparison) -> Table:
    """How low WER gets at each number of removed layers, whatever the LoRA rank."""
    return Table(
        "Best at each number of removed layers, WER in %",
        ("layers fewer", "removed", "rank", "dev WER", "test WER", "tried"),
        tuple((str(n), *_what(b.record), str(b.tried)) for n, b in comparison.best_by_removed.items()),
        "Chosen on dev, at any LoRA rank. The more were tried, the more the best dev WER flatters.",
    )


def contrasts_table(comparison: Comparison) -> Table:
    """Every paired difference: what beats top2+lora, and the published claims."""
    rows = [(c, c.difference) for c in (*comparison.dominating, *comparison.differences)]
    return Table(
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
            for c, d in rows
            if d is not None
        ),
        "Corpus WER of the system less that of the other. The interval is a paired bootstrap over utterances: it covers the "
        "choice of utterances, not that of the seed.",
    )


def claims_table(comparison: Comparison) -> Table:
    """What was published, and what this study measured."""
    rows = []
    for f in comparison.claims:
        published = "" if f.published is None else "{:g} to {:g}".format(*sorted(f.published, key=abs)).replace("-", "−")
        interval = f"{signed(f.low)} to {signed(f.high)}" if f.low != f.high else "exact"
        rows.append((f.claim, f.language or "all", published, f"{signed(f.measured)} {f.unit}", interval, f.word))
    return Table(
        "The paper's claims",
        ("claim", "language", "published, %", "measured", "95 % interval", "here it"),
        tuple(rows),
        "arXiv 2603.27981. Intervals: paired bootstrap over utterances, one seed. A claim of a size holds where the interval "
        "lies on its side of zero and meets the published range; a claim of a direction, where it lies on that side of zero.",
    )


def layers_table(comparison: Comparison) -> Table:
    """How often each layer is gone on the front and near it: of the complete candidates that removed as many layers, the better
    half counts as near."""
    complete = [r for r in comparison.complete if r.removed_layers]
    if not complete:
        return Table("How often a layer is gone", ("layer",), ())
    near: list[RunRecord] = []
    for count in sorted({len(r.removed_layers) for r in complete}):
        same = sorted((r for r in complete if len(r.removed_layers) == count), key=dev_wer)
        near += same[: -(-len(same) // 2)]
    front = [r for r in comparison.front if r.removed_layers]

    def share(layer: int, records: list[RunRecord]) -> str:
        return f"{sum(layer in r.removed_layers for r in records)} of {len(records)}" if records else "–"

    depth = complete[0].encoder_layers
    rows = tuple((str(i), *(share(i, some) for some in (front, near, complete))) for i in range(depth))
    return Table(
        "How often a layer is gone",
        ("layer", "on the front", "in the better half of its size", "in all that were tried"),
        rows,
        "Candidates that lost at least one layer.",
    )


def languages_table(comparison: Comparison) -> Table:
    """Front and baselines by language, where there are several."""
    shown = _shown(comparison)
    languages = sorted({language for r in shown for split in (r.dev, r.test) if split for language in split.by_language})
    return Table(
        "WER in % by language, dev → test",
        ("system", *languages),
        tuple(
            (title(r), *(" → ".join(language_percent(split, language) for split in (r.dev, r.test)) for language in languages))
            for r in shown
            if len(languages) > 1
        ),
    )


def verdict(comparison: Comparison) -> tuple[str, ...]:
    """What can be said, in sentences: how far the study is, whether top2+lora is beaten, and the published claims."""
    counts = f"{len(comparison.complete)} complete, {len(comparison.pruned)} ended at a rung, {len(comparison.failed)} failed"
    claims = (_claim(c) for c in comparison.differences if c.difference is not None)
    return (f"Candidates: {counts}; {len(comparison.front)} on the front.", *_beaten(comparison), *claims)


def _beaten(comparison: Comparison) -> list[str]:
    noun = OBJECTIVES[comparison.objective].split(" (")[0]
    if TO_BEAT not in comparison.baselines:
        return [f"{TO_BEAT} is not evaluated yet, so it cannot be said whether anything beats it."]
    to_beat, winner = comparison.baselines[TO_BEAT], comparison.winner
    if winner is None:
        bound = f"at most its {millions(to_beat.parameters.of(comparison.objective))} M {noun}"
        return [f"Nothing found beats {TO_BEAT}: no candidate has {bound} and a dev WER below {wer_percent(to_beat.dev)} %."]
    saved = to_beat.parameters.of(comparison.objective) - winner.system.parameters.of(comparison.objective)
    fewer = f"{millions(saved)} M fewer {noun}" if saved else f"as many {noun}"
    several = f"{len(comparison.dominating)} candidates have" if len(comparison.dominating) > 1 else "One candidate has"
    lines = [
        f"{several} no more {noun} than {TO_BEAT} and a lower dev WER. Dev chooses {title(winner.system)}: {fewer} and a dev "
        f"WER of {wer_percent(winner.system.dev)} % against {wer_percent(to_beat.dev)} %."
    ]
    if winner.system.name:
        lines.append(f"{winner.system.name} is itself a baseline.")
    if winner.difference is None:
        return [*lines, "Their utterances are not stored, so the difference has no interval."]
    lines.append(_sentence(winner))
    if winner.split == "dev":
        lines.append("Dev also chose it, which flatters it: only test can tell.")
    return lines


def _claim(contrast: Contrast) -> str:
    control = (contrast.system.name, contrast.reference.name) == CLAIMS[-1]
    return _sentence(contrast) + (" This is the fair control: LoRA on both sides." if control else "")


def _sentence(contrast: Contrast) -> str:
    system, reference, found = title(contrast.system), title(contrast.reference), contrast.difference
    assert found is not None
    size = f"{points(found.estimate)} points (95 % interval {points(found.low)} to {points(found.high)})"
    if found.verdict in ("lower", "higher"):
        return f"On {contrast.split}, {system} has a {found.verdict} WER than {reference}: {size}."
    return f"On {contrast.split}, {found.verdict} between {system} and {reference}: {size}."


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data. WERs and reductions are fractions; null is unknown or not decoded."""

    def record(r: RunRecord) -> dict[str, Any]:
        return record_data(comparison, r)

    return {
        "study": comparison.study,
        "objective": comparison.objective,
        "candidates": {
            "complete": len(comparison.complete),
            "pruned": len(comparison.pruned),
            "failed": len(comparison.failed),
        },
        "verdict": list(verdict(comparison)),
        "baselines": {name: record(r) for name, r in comparison.baselines.items()},
        "front": [record(r) for r in comparison.front],
        "dominating": [{**record(c.system), "difference_to_top2_lora": difference_data(c)} for c in comparison.dominating],
        "best_by_removed": {str(n): {**record(b.record), "tried": b.tried} for n, b in comparison.best_by_removed.items()},
        "claims": [asdict(f) for f in comparison.claims],
        "knee": comparison.knee and comparison.knee.candidate.key,
        "hypervolume": {"reference": comparison.reference, **comparison.hypervolumes},
        "differences": {f"{c.system.name} - {c.reference.name}": difference_data(c) for c in comparison.differences},
    }


def to_csv(comparison: Comparison) -> str:
    """All complete records, one a line; layers are separated by spaces, results by language are JSON objects."""
    rows = [record_data(comparison, r) for r in comparison.complete]
    for row in rows:
        row["removed_layers"] = " ".join(map(str, row["removed_layers"]))
        for split in ("dev", "test"):
            row[f"{split}_wer_by_language"] = json.dumps(row[f"{split}_wer_by_language"])
    text = io.StringIO()
    writer = csv.DictWriter(text, RECORD_KEYS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


RECORD_KEYS = (
    *("name", "key", "removed_layers", "lora_rank", "dev_wer", "test_wer"),
    *("encoder_params", "projector_params", "lora_params", "llm_params", "speech_params", "total_params"),
    *("errors_split", "substitutions", "deletions", "insertions", "reference_words"),
    *("dev_wer_by_language", "test_wer_by_language"),
    *("encoder_reduction", "speech_reduction", "total_reduction", "train_seconds", "trainings", "state"),
)


def record_data(comparison: Comparison, record: RunRecord) -> dict[str, Any]:
    """A complete record under the keys of RECORD_KEYS."""
    split, errors = ("test", record.test.errors) if record.test else ("dev", record.dev and record.dev.errors)
    reductions = comparison.reductions(record)
    parameters = record.parameters
    groups = ("encoder", "projector", "lora", "llm", "speech", "total")
    data: dict[str, Any] = {
        "name": record.name,
        "key": record.candidate.key,
        "removed_layers": list(record.removed_layers),
        "lora_rank": record.lora_rank,
        "dev_wer": dev_wer(record),
        "test_wer": record.test.errors.wer if record.test else None,
        **{f"{group}_params": getattr(parameters, group) for group in groups},
        "errors_split": split,
        **(errors.model_dump() if errors else {}),
        "dev_wer_by_language": _by_language(record.dev),
        "test_wer_by_language": _by_language(record.test),
        **{f"{g}_reduction": getattr(reductions, g) if reductions else None for g in ("encoder", "speech", "total")},
        "train_seconds": record.cost.train_seconds,
        "trainings": comparison.trainings.get(record.candidate, 0),
        "state": record.state,
    }
    return {key: data[key] for key in RECORD_KEYS}


def difference_data(contrast: Contrast) -> dict[str, Any] | None:
    found = contrast.difference
    if found is None:
        return None
    return {
        "split": contrast.split,
        "estimate": found.estimate,
        "low": found.low,
        "high": found.high,
        "verdict": found.verdict,
    }


def _by_language(split: SplitResult | None) -> dict[str, float] | None:
    return None if split is None else {language: errors.wer for language, errors in split.by_language.items()}


def _what(record: RunRecord) -> tuple[str, ...]:
    """Removed layers, rank, dev and test WER."""
    return layers(record), str(record.lora_rank or "–"), wer_percent(record.dev), wer_percent(record.test)


def _shown(comparison: Comparison) -> list[RunRecord]:
    """Front and baselines, each once."""
    wanted = {r.candidate for r in (*comparison.front, *comparison.baselines.values())}
    return [r for r in comparison.complete if r.candidate in wanted]


# How single values look at the edge of a report.


def title(record: RunRecord) -> str:
    return record.name or record.candidate.key


def layers(record: RunRecord) -> str:
    return " ".join(map(str, record.removed_layers)) or "–"


def wer_percent(split: SplitResult | None) -> str:
    return f"{100 * split.errors.wer:.2f}" if split else "–"


def language_percent(split: SplitResult | None, language: str) -> str:
    return f"{100 * split.by_language[language].wer:.2f}" if split and language in split.by_language else "–"


def error_kinds(record: RunRecord) -> str:
    split = record.test or record.dev
    if split is None:
        return "–"
    errors, words = split.errors, max(1, split.errors.reference_words)
    kinds = "/".join(f"{100 * n / words:.1f}" for n in (errors.substitutions, errors.deletions, errors.insertions))
    return kinds if record.test else f"{kinds} *"


def sizes(comparison: Comparison, record: RunRecord) -> list[tuple[str, str]]:
    """Encoder, speech and total parameters in millions, each with its change against the unpruned system."""
    found = comparison.reductions(record)
    return [
        (millions(getattr(record.parameters, group)), f"{signed(-100 * getattr(found, group))} %" if found else "–")
        for group in ("encoder", "speech", "total")
    ]


def points(wer: float) -> str:
    """A difference of WERs in percentage points."""
    return signed(100 * wer)


def signed(value: float) -> str:
    """Two decimals, a true minus sign, and no sign on zero."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def millions(params: int) -> str:
    return f"{params / 1e6:,.2f}" if params >= 1e6 else f"{params / 1e6:.3g}"


def _rich(table: Table) -> RichTable:
    shown = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text(table.note, style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(table.columns):
        wraps = column == "removed" or (i == 0 and "removed" not in table.columns)
        shown.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold", no_wrap=not wraps)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown
