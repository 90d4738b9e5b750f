"""A comparison in words and numbers: sentences, and tables that the terminal, the page and a paper show."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from prunesearch.report.anatomy import KINDS, Change, length_ratio
from prunesearch.report.comparison import CLAIMS, TO_BEAT, Comparison, Contrast
from prunesearch.study.front import dev_wer, non_dominated, within
from prunesearch.study.record import RunRecord, SplitResult

OBJECTIVES = {
    "speech_params": "speech parameters (encoder + projector + LoRA)",
    "encoder_params": "encoder parameters",
    "total_params": "total parameters (speech and LLM)",
}


MOST_GROUPS = 12  # that have a column each


@dataclass(frozen=True)
class Table:
    """A table that the terminal and the page both show. The first column names its row; `records` are those that the rows
    stand for, where a reader of the page may pin them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    prose: bool = False  # whether its cells hold sentences
    records: tuple[RunRecord, ...] = ()


def render(comparison: Comparison) -> RenderableType:
    """The whole comparison for a rich console."""
    parts: list[RenderableType] = [Text(comparison.study, style="bold"), Text("\n".join(verdict(comparison)) + "\n")]
    return Group(*parts, *(rich_table(table) for table in tables(comparison)))


def tables(comparison: Comparison) -> list[Table]:
    """The tables that have something to say."""
    made = (
        systems_table(comparison),
        parameters_table(comparison),
        removed_table(comparison),
        contrasts_table(comparison),
        claims_table(comparison),
        layers_table(comparison),
        sizes_table(comparison),
        languages_table(comparison),
        repairs_table(comparison),
        losses_table(comparison),
        failures_table(comparison),
        groups_table(comparison),
        costs_table(comparison),
        *anatomy_tables(comparison),
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
        records=tuple(shown),
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
        "Corpus WER of the system less that of the other. The interval is a paired bootstrap over utterances, and over "
        "trainings where a system has several: of one training, it covers the choice of utterances, not that of the seed.",
    )


def claims_table(comparison: Comparison) -> Table:
    """What was published, and what this study measured."""
    rows = []
    for f in comparison.claims:
        published = "" if f.published is None else "{:g} to {:g}".format(*sorted(f.published, key=abs)).replace("-", "−")
        interval = "exact" if f.exact else "too few errors" if f.low == f.high else f"{signed(f.low)} to {signed(f.high)}"
        rows.append((f.claim, f.language or "all", published, f"{signed(f.measured)} {f.unit}", interval, f.word))
    return Table(
        "The paper's claims",
        ("claim", "language", "published, %", "measured", "95 % interval", "here it"),
        tuple(rows),
        "arXiv 2603.27981. Intervals: paired bootstrap over utterances, and over trainings where there are several. A claim of "
        "a size holds where the interval lies on its side of zero and meets the published range; a claim of a direction, "
        "where it lies on that side of zero.",
    )


def layers_table(comparison: Comparison) -> Table:
    """A map of the layers: how often each is gone on the front, on each language's own front, and near the front; beside it
    what it costs alone."""
    complete = [r for r in comparison.complete if r.removed_layers]
    if not complete:
        return Table("How often a layer is gone", ("layer",), ())
    objective = comparison.objective
    languages = sorted({language for r in complete if r.dev for language in r.dev.by_language})
    columns = {"on the front": [r for r in comparison.front if r.removed_layers]}
    for language in languages if len(languages) > 1 else ():
        columns[f"front of {language}"] = [r for r in _front_of(language, comparison.complete, objective) if r.removed_layers]
    near = better_half_by_size(complete)
    columns["better half of its size"] = [r for some in near.values() for r in some]
    columns["all tried"] = complete

    def share(layer: int, records: list[RunRecord]) -> str:
        return f"{sum(layer in r.removed_layers for r in records)} of {len(records)}" if records else "–"

    alone = comparison.importance
    rows = tuple(
        (str(i), *(share(i, some) for some in columns.values()), *([f"{alone[i]:.3f}" if i in alone else "–"] if alone else []))
        for i in range(complete[0].encoder_layers)
    )
    return Table(
        "How often a layer is gone",
        ("layer", *columns, *(["alone costs, nats"] if alone else [])),
        rows,
        "Candidates that lost at least one layer; of those that lost as many, the better half on dev is near the front."
        + (" Alone: the anchor's loss without this layer, before any training." if alone else ""),
    )


def sizes_table(comparison: Comparison) -> Table:
    """The same by size: of the better half of the candidates that lost as many layers, how many lost which."""
    near = better_half_by_size([r for r in comparison.complete if r.removed_layers])
    depth = comparison.complete[0].encoder_layers if near else 0
    rows = (
        (str(i), *(f"{sum(i in r.removed_layers for r in some)} of {len(some)}" for some in near.values()))
        for i in range(depth)
    )
    return Table(
        "How often a layer is gone, by number of layers removed",
        ("layer", *(f"{count} removed" for count in near)),
        tuple(rows) if len(near) > 1 else (),
        "Of the better half on dev of the candidates that lost as many.",
    )


def better_half_by_size(records: Sequence[RunRecord]) -> dict[int, list[RunRecord]]:
    """By number of removed layers, the better half of the records on dev."""
    found = {}
    for count in sorted({len(r.removed_layers) for r in records}):
        same = sorted((r for r in records if len(r.removed_layers) == count), key=dev_wer)
        found[count] = same[: -(-len(same) // 2)]
    return found


def _front_of(language: str, records: Sequence[RunRecord], objective: str) -> list[RunRecord]:
    """The front in one language's dev WER."""
    spoken = [r for r in records if r.dev and language in r.dev.by_language]
    points = [(float(r.parameters.of(objective)), r.dev.by_language[language].wer) for r in spoken if r.dev]
    return [spoken[i] for i in non_dominated(points)]


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


def repairs_table(comparison: Comparison) -> Table:
    """What LoRA changes at the same layers: all errors, substitutions, deletions and insertions, in all and by language."""
    return Table(
        "What LoRA changes, errors per word in %",
        ("system", "against", "split", "language", *KINDS),
        tuple(
            (title(c.system), title(c.reference), c.split, c.language or "all", *(_changed(c, kind) for kind in KINDS))
            for c in comparison.repairs
        ),
        "Each system against the same layers without LoRA. Change of errors per reference word, and of each kind of them.",
    )


def losses_table(comparison: Comparison) -> Table:
    """What removing layers changes: all errors by kind, then all kinds by language."""
    languages = sorted({c.language for c in comparison.losses if c.language})
    by_system = {(c.system.candidate, c.language): c for c in comparison.losses}

    def elsewhere(change: Change) -> list[str]:
        found = (by_system.get((change.system.candidate, language)) for language in languages)
        return [_changed(c, "errors") if c else "–" for c in found]

    return Table(
        "What removing layers changes, errors per word in %",
        ("system", "against", "split", *KINDS, *languages),
        tuple(
            (title(c.system), title(c.reference), c.split, *(_changed(c, kind) for kind in KINDS), *elsewhere(c))
            for c in comparison.losses
            if c.language is None
        ),
        "Each system against the whole encoder, with LoRA (of the nearest rank) where it has one, else without.",
    )


def _changed(change: Change, kind: str) -> str:
    found = change.of(kind)
    return f"0 → {getattr(change.ours, kind)}" if found is None else f"{signed(100 * found)} %"


def failures_table(comparison: Comparison) -> Table:
    """Texts that loop, that are empty, or of the wrong length."""
    shown = [(r, s) for r in _shown(comparison) if (s := r.test or r.dev)]
    return Table(
        "Loops, silence and length",
        ("system", "split", "loops, %", "empty, %", "words written per word said"),
        tuple(
            (title(r), "test" if r.test else "dev", f"{100 * s.loop_rate:.1f}", f"{100 * s.empty_rate:.1f}", f"{ratio:.3f}")
            for r, s in shown
            if (ratio := length_ratio(s))
        ),
        "A loop is a phrase said four times in a row or more, and oftener than in the reference.",
    )


def groups_table(comparison: Comparison) -> Table:
    """Front and baselines by group of speakers: the worst of them, and how far the groups lie apart."""
    shown = [(r, s) for r in _shown(comparison) if (s := r.test or r.dev) and len(s.by_group) > 1]
    groups = sorted({group for _, s in shown for group in s.by_group})
    listed = groups if len(groups) <= MOST_GROUPS else []
    rows = []
    for r, s in shown:
        assert s.worst_group_wer is not None
        assert s.group_gap is not None
        each = (f"{100 * s.by_group[g].wer:.2f}" if g in s.by_group else "–" for g in listed)
        split = "test" if r.test else "dev"
        rows.append((title(r), split, str(s.worst_group), f"{100 * s.worst_group_wer:.2f}", f"{100 * s.group_gap:.2f}", *each))
    return Table(
        "WER in % by group",
        ("system", "split", "worst group", "its WER", "worst less best", *listed),
        tuple(rows),
        "The groups are the study's `data.group`." + ("" if listed else f" There are {len(groups)}; report.json has all."),
    )


def costs_table(comparison: Comparison) -> Table:
    """What was measured of the systems' speed and size, over the unpruned system's."""
    found = comparison.measured
    where = f"{found.device}, {found.dtype}, torch {found.torch}, {found.threads} threads" if found else ""

    def over(median: float, low: float, high: float) -> str:
        return f"{median:.2f} ({low:.2f}–{high:.2f})"

    return Table(
        "What they take, over the unpruned system",
        ("system", "encoder alone", "encoder in batches", "samples to text", "the same in batches", "parameters", "file"),
        tuple(
            (
                s.name or s.candidate,
                over(s.ratios.encoder, s.lowest.encoder, s.highest.encoder),
                over(s.ratios.batch_encoder, s.lowest.batch_encoder, s.highest.batch_encoder),
                over(s.ratios.end_to_end, s.lowest.end_to_end, s.highest.end_to_end),
                over(s.ratios.batch_end_to_end, s.lowest.batch_end_to_end, s.highest.batch_end_to_end),
                f"{s.ratios.parameters:.3f}",
                f"{s.ratios.file:.3f}",
            )
            for s in (found.systems if found else ())
        ),
        f"Medians of ratios within a turn, and the turns' range, by `prunesearch measure`: {where}. Parameters, file: bytes.",
    )


def anatomy_tables(comparison: Comparison) -> list[Table]:
    """The candidate that dev chooses beside its unpruned counterpart, word by word."""
    found = comparison.anatomy
    if found is None:
        return []
    ours, theirs = title(found.system), title(found.reference)
    rows = tuple((c.said or "(nothing)", c.heard or "(nothing)", str(c.ours), str(c.theirs)) for c in found.confusions)
    note = f"On {found.split}: the confusions whose counts differ most."
    confusions = Table("Words taken for others", ("said", "heard", ours, theirs), rows, note)
    changed = [("More errors than before", found.worse), ("Fewer errors than before", found.better)]
    return [
        confusions,
        *(
            Table(
                f"{name}: {ours} against {theirs}",
                ("utterance", "errors", "reference", ours, theirs),
                tuple(
                    (c.id, signed_count(c.errors), c.reference, c.ours or "(nothing)", c.theirs or "(nothing)") for c in some
                ),
                f"On {found.split}, the utterances that changed most.",
                prose=True,
            )
            for name, some in changed
        ),
    ]


def verdict(comparison: Comparison) -> tuple[str, ...]:
    """What can be said, in sentences: how far the study is, whether top2+lora is beaten, and the published claims."""
    counts = f"{len(comparison.complete)} complete, {len(comparison.pruned)} ended at a rung, {len(comparison.failed)} failed"
    claims = (_claim(c) for c in comparison.differences if c.difference is not None)
    limit = comparison.max_worst_group_wer
    above = sum(not within(r, limit) for r in comparison.complete)
    kept = f" No worst group may have a dev WER above {100 * limit:g} %: {above} candidates are left out." if limit else ""
    return (f"Candidates: {counts}; {len(comparison.front)} on the front.{kept}", *_beaten(comparison), *claims)


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


def signed_count(count: int) -> str:
    return f"{count:+d}".replace("-", "−")


def millions(params: int) -> str:
    return f"{params / 1e6:,.2f}" if params >= 1e6 else f"{params / 1e6:.3g}"


def rich_table(table: Table) -> RichTable:
    shown = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text(table.note, style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(table.columns):
        wraps = (
            column == "removed" or (table.prose and i > 1) or (i == 0 and not table.prose and "removed" not in table.columns)
        )
        left = i == 0 or (table.prose and i > 1)
        shown.add_column(Text(column), justify="left" if left else "right", overflow="fold", no_wrap=not wraps)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown
