"""Tables of errors: by language and group, what LoRA and removing layers change, failures, and single words."""

from prunesearch.report.comparison import Comparison
from prunesearch.report.error_analysis import KINDS, ChangedUtterance, ErrorAnalysis, ErrorChange, length_ratio
from prunesearch.report.table import Table
from prunesearch.report.values import UNKNOWN, language_percent, signed, signed_count, title
from prunesearch.study.record import RunRecord, SplitResult

MOST_GROUPS = 12  # if there are more, groups have no columns of their own
NOTHING = "(nothing)"


def languages_table(comparison: Comparison) -> Table:
    """WER of front and baselines in each language, if there are several."""
    shown = comparison.front_and_baselines
    languages = sorted({language for r in shown for split in (r.dev, r.test) if split for language in split.by_language})
    return Table(
        "languages",
        "WER in % by language, dev → test",
        ("system", *languages),
        tuple(
            (title(r), *(" → ".join(language_percent(split, language) for split in (r.dev, r.test)) for language in languages))
            for r in shown
            if len(languages) > 1
        ),
    )


def lora_table(comparison: Comparison) -> Table:
    """What LoRA changes: errors of each kind, in all languages together and in each."""
    return Table(
        "lora",
        "What LoRA changes: errors per reference word, in %",
        ("system", "against", "split", "language", *KINDS),
        tuple(
            (title(c.system), title(c.reference), c.split, c.language or "all", *(_changed(c, kind) for kind in KINDS))
            for c in comparison.lora_changes
        ),
        "Each system against the same layers without LoRA.",
        text_columns=("against",),
    )


def pruning_table(comparison: Comparison) -> Table:
    """What removing layers changes: errors of each kind in all languages, and all errors in each language."""
    languages = sorted({c.language for c in comparison.pruning_changes if c.language})
    by_system = {(c.system.candidate, c.language): c for c in comparison.pruning_changes}

    def in_each_language(change: ErrorChange) -> list[str]:
        found = (by_system.get((change.system.candidate, language)) for language in languages)
        return [_changed(c, "errors") if c else UNKNOWN for c in found]

    return Table(
        "pruning",
        "What removing layers changes: errors per reference word, in %",
        ("system", "against", "split", *KINDS, *languages),
        tuple(
            (title(c.system), title(c.reference), c.split, *(_changed(c, kind) for kind in KINDS), *in_each_language(c))
            for c in comparison.pruning_changes
            if c.language is None
        ),
        "Each system against an unpruned one: a system with LoRA against that of the nearest LoRA rank, others against that "
        "without LoRA.",
        text_columns=("against",),
    )


def _changed(change: ErrorChange, kind: str) -> str:
    found = change.of(kind)
    return f"0 → {getattr(change.ours, kind)}" if found is None else f"{signed(100 * found)} %"


def failures_table(comparison: Comparison) -> Table:
    """Rates of hypotheses that loop, are empty, end at their token limit or are in another language; their length; and CER."""

    def row(record: RunRecord, split: str, result: SplitResult) -> tuple[str, ...]:
        rates = (result.loop_rate, result.empty_rate, result.token_limit_rate, result.switched_rate)
        cer = UNKNOWN if result.characters is None else f"{100 * result.characters.cer:.2f}"
        return (title(record), split, *map(_percent, rates), f"{length_ratio(result):.3f}", cer)

    return Table(
        "failures",
        "Loops, empty hypotheses, token limits, languages and length",
        (
            *("system", "split", "loops, %", "empty, %", "at token limit, %", "other language, %"),
            *("recognised words per reference word", "CER, %"),
        ),
        tuple(row(*reported) for reported in _reported(comparison)),
        "A loop is a phrase that the hypothesis repeats four times in a row or more, and more often than the reference. A "
        "hypothesis that ends at its token limit is cut off: if it is no loop, `decoding.tokens_per_second` or "
        "`decoding.max_tokens` is too small. Another language: surely not that of the recording, by py3langid. CER: errors in "
        "characters, without spaces.",
    )


def _percent(rate: float | None) -> str:
    return UNKNOWN if rate is None else f"{100 * rate:.1f}"


def groups_table(comparison: Comparison) -> Table:
    """WER of front and baselines in each group of speakers: the worst group, and the gap between groups."""
    shown = [(r, split, s) for r, split, s in _reported(comparison) if len(s.by_group) > 1]
    groups = sorted({group for _, _, s in shown for group in s.by_group})
    listed = groups if len(groups) <= MOST_GROUPS else []
    rows = []
    for r, split, s in shown:
        assert s.worst_group_wer is not None
        assert s.group_gap is not None
        each = (f"{100 * s.by_group[g].wer:.2f}" if g in s.by_group else UNKNOWN for g in listed)
        rows.append((title(r), split, str(s.worst_group), f"{100 * s.worst_group_wer:.2f}", f"{100 * s.group_gap:.2f}", *each))
    note = "" if listed else f" There are {len(groups)} groups; report.json has all of them."
    return Table(
        "groups",
        "WER in % by group",
        ("system", "split", "worst group", "WER of worst group", "worst minus best", *listed),
        tuple(rows),
        f"Groups are the values of `data.group` in the study file.{note}",
    )


def confusions_table(comparison: Comparison) -> Table:
    """Words that the chosen candidate and its unpruned counterpart confused with others."""
    found = comparison.error_analysis
    ours, theirs = _analysed(found)
    return Table(
        "confusions",
        "Confused words",
        ("reference word", "recognised as", ours, theirs),
        tuple((c.said or NOTHING, c.heard or NOTHING, str(c.ours), str(c.theirs)) for c in found.confusions) if found else (),
        f"On {found.split}: the confusions whose counts differ most." if found else "",
        text_columns=("recognised as",),
    )


def worse_table(comparison: Comparison) -> Table:
    """The utterances in which the chosen candidate makes more errors than its unpruned counterpart."""
    found = comparison.error_analysis
    return _utterances_table("worse", "Utterances with more errors", found, found.worse if found else ())


def better_table(comparison: Comparison) -> Table:
    """The utterances in which the chosen candidate makes fewer errors than its unpruned counterpart."""
    found = comparison.error_analysis
    return _utterances_table("better", "Utterances with fewer errors", found, found.better if found else ())


def _utterances_table(name: str, what: str, found: ErrorAnalysis | None, utterances: tuple[ChangedUtterance, ...]) -> Table:
    ours, theirs = _analysed(found)
    return Table(
        name,
        f"{what}: {ours} against {theirs}",
        ("utterance", "errors", "reference", ours, theirs),
        tuple((u.id, signed_count(u.errors), u.reference, u.ours or NOTHING, u.theirs or NOTHING) for u in utterances),
        f"On {found.split}: the utterances whose number of errors differs most." if found else "",
        text_columns=("reference", ours, theirs),
    )


def _analysed(found: ErrorAnalysis | None) -> tuple[str, str]:
    return (title(found.system), title(found.reference)) if found else ("system", "reference")


def _reported(comparison: Comparison) -> list[tuple[RunRecord, str, SplitResult]]:
    return [(r, *r.reported) for r in comparison.front_and_baselines if r.reported]
