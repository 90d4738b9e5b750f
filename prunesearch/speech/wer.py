"""Word errors per utterance, as counts: a corpus WER is the ratio of summed counts, not a mean of rates."""

import jiwer

from prunesearch.speech.corpus import Utterance
from prunesearch.study.record import UtteranceResult, WordErrors


def count_errors(reference: str, hypothesis: str) -> WordErrors:
    """Substitutions, deletions and insertions of a minimal word alignment (Levenshtein, by jiwer) of normalised texts."""
    if not reference or not hypothesis:
        return WordErrors(
            deletions=len(reference.split()), insertions=len(hypothesis.split()), reference_words=len(reference.split())
        )
    found = jiwer.process_words(reference, hypothesis)
    return WordErrors(
        substitutions=found.substitutions,
        deletions=found.deletions,
        insertions=found.insertions,
        reference_words=found.hits + found.substitutions + found.deletions,
    )


def longest_repetition(words: list[str], longest_phrase: int = 4) -> int:
    """The largest number of times in a row that a phrase of one to `longest_phrase` words occurs."""
    best = 1
    for size in range(1, longest_phrase + 1):
        run = 0
        for i in range(size, len(words)):
            run = run + 1 if words[i] == words[i - size] else 0
            best = max(best, run // size + 1)
    return best


def is_loop(reference: str, hypothesis: str) -> bool:
    """Whether the LLM repeats itself: a phrase occurs four or more times in a row, and more often than in the reference."""
    return longest_repetition(hypothesis.split()) > max(3, longest_repetition(reference.split()))


def score(utterance: Utterance, hypothesis: str) -> UtteranceResult:
    """Count a normalised hypothesis' errors against the utterance's reference."""
    return UtteranceResult(
        id=utterance.id,
        reference=utterance.reference,
        hypothesis=hypothesis,
        errors=count_errors(utterance.reference, hypothesis),
        language=utterance.language,
        group=utterance.group,
        looped=is_loop(utterance.reference, hypothesis),
    )
