"""Which errors a system makes: errors by kind, confused words, and utterances whose errors changed most."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jiwer

from prunesearch.report.decodings import SPLITS, DecodedPair, Split
from prunesearch.study.languages import characters
from prunesearch.study.record import RunRecord, SplitResult, UtteranceResult, WordErrors

MOST = 10  # confusions, and changed utterances in each direction, that a report shows

KINDS = ("errors", "substitutions", "deletions", "insertions")


@dataclass(frozen=True)
class ErrorChange:
    """Two systems' errors on the same split, in one language or in all (None)."""

    system: RunRecord
    reference: RunRecord
    split: Split
    language: str | None
    ours: WordErrors
    theirs: WordErrors

    def of(self, kind: str) -> float | None:
        """The system's rate of these errors per reference word, divided by that of the reference, minus one: -0.1 is 10 %
        fewer.

        `kind` is one of KINDS. None if the reference makes no such errors.
        """
        theirs = getattr(self.theirs, kind) / max(1, self.theirs.reference_words)
        return getattr(self.ours, kind) / max(1, self.ours.reference_words) / theirs - 1 if theirs else None


@dataclass(frozen=True)
class Confusion:
    """A word (`said`) that was recognised as another one (`heard`), and how often each of two systems did that.

    `heard` is None for a deleted word, `said` is None for an inserted one.
    """

    said: str | None
    heard: str | None
    ours: int
    theirs: int


@dataclass(frozen=True)
class ChangedUtterance:
    """What two systems recognised in one utterance."""

    id: str
    reference: str
    ours: str
    theirs: str
    errors: int  # of ours, minus those of theirs


@dataclass(frozen=True)
class ErrorAnalysis:
    """One system beside another one, word by word."""

    system: RunRecord
    reference: RunRecord
    split: Split
    confusions: tuple[Confusion, ...]  # those whose counts differ most
    worse: tuple[ChangedUtterance, ...]
    better: tuple[ChangedUtterance, ...]


def error_changes(system: RunRecord, reference: RunRecord) -> list[ErrorChange]:
    """The change in all languages together and, if there are several, in each; on test if both were decoded there, else dev."""
    for split in SPLITS:
        ours, theirs = getattr(system, split), getattr(reference, split)
        if ours is None or theirs is None:
            continue
        shared = [language for language in ours.by_language if language in theirs.by_language]
        counts: list[tuple[str | None, WordErrors, WordErrors]] = [(None, ours.errors, theirs.errors)]
        if len(shared) > 1:
            counts += [(language, ours.by_language[language], theirs.by_language[language]) for language in shared]
        return [ErrorChange(system, reference, split, *each) for each in counts]
    return []


def unpruned_counterpart(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord | None:
    """The unpruned system of the nearest LoRA rank: with LoRA if the record has LoRA, without if it has none.

    None if there is no such system, or if the record is that system.
    """
    whole = [r for r in records if not r.removed_layers and bool(r.lora_rank) == bool(record.lora_rank)]
    nearest = min(whole, key=lambda r: abs(r.lora_rank - record.lora_rank), default=None)
    return None if nearest is None or nearest.candidate == record.candidate else nearest


def without_lora(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord | None:
    """The system with the same removed layers and no LoRA. None if the record has no LoRA, or if there is no such system."""
    if not record.lora_rank:
        return None
    return next((r for r in records if r.removed_layers == record.removed_layers and not r.lora_rank), None)


def length_ratio(split: SplitResult) -> float:
    """Recognised words per reference word."""
    errors = split.errors
    return (errors.reference_words - errors.deletions + errors.insertions) / max(1, errors.reference_words)


def analyse_errors(system: RunRecord, reference: RunRecord, pair: DecodedPair) -> ErrorAnalysis:
    """Compare the first training of each system, word by word."""
    ours, theirs = pair.system.results[0], pair.reference.results[0]
    counts, others = Counter(confused_words(ours)), Counter(confused_words(theirs))
    words = sorted(counts | others, key=lambda p: (-abs(counts[p] - others[p]), -counts[p], str(p)))
    confusions = (Confusion(*word, counts[word], others[word]) for word in words if counts[word] != others[word])
    both = [
        ChangedUtterance(a.id, a.reference, a.hypothesis, b.hypothesis, a.errors.errors - b.errors.errors)
        for a, b in zip(ours, theirs, strict=True)
    ]
    worse = sorted((c for c in both if c.errors > 0), key=lambda c: (-c.errors, c.id))
    better = sorted((c for c in both if c.errors < 0), key=lambda c: (c.errors, c.id))
    return ErrorAnalysis(system, reference, pair.split, tuple(confusions)[:MOST], tuple(worse[:MOST]), tuple(better[:MOST]))


def confused_words(results: Sequence[UtteranceResult]) -> Iterator[tuple[str | None, str | None]]:
    """(said, heard) of every word error, from the same alignment (jiwer) that counts the errors."""
    for result in results:
        reference, hypothesis = result.reference, result.hypothesis
        if result.unit == "characters":
            reference, hypothesis = characters(reference), characters(hypothesis)
        said, heard = reference.split(), hypothesis.split()
        if not result.errors.errors:
            continue
        if not said or not heard:
            yield from ((word, None) for word in said)
            yield from ((None, word) for word in heard)
            continue
        for part in jiwer.process_words(reference, hypothesis).alignments[0]:
            before = said[part.ref_start_idx : part.ref_end_idx]
            after = heard[part.hyp_start_idx : part.hyp_end_idx]
            if part.type == "substitute":
                yield from zip(before, after, strict=True)
            elif part.type == "delete":
                yield from ((word, None) for word in before)
            elif part.type == "insert":
                yield from ((None, word) for word in after)
