"""What went wrong, and for whom: errors by kind, words taken for others, utterances that changed, groups of speakers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer

from prunesearch.study.record import RunRecord, SplitResult, UtteranceResult, WordErrors

MOST = 10  # confusions, and changed utterances in each direction, that a report shows

KINDS = ("errors", "substitutions", "deletions", "insertions")


@dataclass(frozen=True)
class Change:
    """A system's errors beside another's on the same split, in one language or in all (None)."""

    system: RunRecord
    reference: RunRecord
    split: Literal["test", "dev"]
    language: str | None
    ours: WordErrors
    theirs: WordErrors

    def of(self, kind: str) -> float | None:
        """Errors of a kind per reference word, less those of the other, as a fraction of them; None where it makes none."""
        theirs = getattr(self.theirs, kind) / max(1, self.theirs.reference_words)
        return getattr(self.ours, kind) / max(1, self.ours.reference_words) / theirs - 1 if theirs else None


@dataclass(frozen=True)
class Confusion:
    """A word taken for another; without one of them, a word that was left out or put in. How often, in both systems."""

    said: str | None  # in the reference
    heard: str | None
    ours: int
    theirs: int


@dataclass(frozen=True)
class Changed:
    """An utterance in both systems' words."""

    id: str
    reference: str
    ours: str
    theirs: str
    errors: int  # of ours, less those of theirs


@dataclass(frozen=True)
class Anatomy:
    """One system beside its counterpart, word by word."""

    system: RunRecord
    reference: RunRecord
    split: Literal["test", "dev"]
    confusions: tuple[Confusion, ...]  # those whose counts differ most
    worse: tuple[Changed, ...]
    better: tuple[Changed, ...]


def changes(system: RunRecord, reference: RunRecord) -> list[Change]:
    """In all, and by language where there are several; on test where both were decoded there, else on dev."""
    splits: tuple[Literal["test", "dev"], ...] = ("test", "dev")
    for split in splits:
        ours, theirs = getattr(system, split), getattr(reference, split)
        if ours is None or theirs is None:
            continue
        shared = [language for language in ours.by_language if language in theirs.by_language]
        found = [Change(system, reference, split, None, ours.errors, theirs.errors)]
        for language in shared if len(shared) > 1 else ():
            found.append(Change(system, reference, split, language, ours.by_language[language], theirs.by_language[language]))
        return found
    return []


def counterpart(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord | None:
    """The complete unpruned system of the nearest LoRA rank: with LoRA for one with, without for one without."""
    whole = [r for r in records if not r.removed_layers and bool(r.lora_rank) == bool(record.lora_rank)]
    nearest = min(whole, key=lambda r: abs(r.lora_rank - record.lora_rank), default=None)
    return None if nearest is None or nearest.candidate == record.candidate else nearest


def without_lora(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord | None:
    """The same layers without LoRA."""
    if not record.lora_rank:
        return None
    return next((r for r in records if r.removed_layers == record.removed_layers and not r.lora_rank), None)


def length_ratio(split: SplitResult) -> float:
    """Words written per word said."""
    errors = split.errors
    return (errors.reference_words - errors.deletions + errors.insertions) / max(1, errors.reference_words)


def anatomy(
    system: RunRecord,
    reference: RunRecord,
    split: Literal["test", "dev"],
    ours: Sequence[UtteranceResult],
    theirs: Sequence[UtteranceResult],
) -> Anatomy:
    """Compare two decodings of the same utterances, in the same order, word by word."""
    counts, others = Counter(confused(ours)), Counter(confused(theirs))
    pairs = sorted(counts | others, key=lambda p: (-abs(counts[p] - others[p]), -counts[p], str(p)))
    confusions = (Confusion(*pair, counts[pair], others[pair]) for pair in pairs if counts[pair] != others[pair])
    both = [
        Changed(a.id, a.reference, a.hypothesis, b.hypothesis, a.errors.errors - b.errors.errors)
        for a, b in zip(ours, theirs, strict=True)
    ]
    worse = sorted((c for c in both if c.errors > 0), key=lambda c: (-c.errors, c.id))
    better = sorted((c for c in both if c.errors < 0), key=lambda c: (c.errors, c.id))
    return Anatomy(system, reference, split, tuple(confusions)[:MOST], tuple(worse[:MOST]), tuple(better[:MOST]))


def confused(results: Sequence[UtteranceResult]) -> Iterator[tuple[str | None, str | None]]:
    """(said, heard) of every word error, by the alignment that counts them (jiwer)."""
    for result in results:
        said, heard = result.reference.split(), result.hypothesis.split()
        if not result.errors.errors:
            continue
        if not said or not heard:
            yield from ((word, None) for word in said)
            yield from ((None, word) for word in heard)
            continue
        for part in jiwer.process_words(result.reference, result.hypothesis).alignments[0]:
            before = said[part.ref_start_idx : part.ref_end_idx]
            after = heard[part.hyp_start_idx : part.hyp_end_idx]
            if part.type == "substitute":
                yield from zip(before, after, strict=True)
            elif part.type == "delete":
                yield from ((word, None) for word in before)
            elif part.type == "insert":
                yield from ((None, word) for word in after)
