"""Word and character errors per utterance, as counts: a corpus rate is the ratio of summed counts, not a mean of rates."""

import jiwer

from prunesearch.speech.corpus import Utterance
from prunesearch.speech.language import is_switched
from prunesearch.study.config import TextConfig
from prunesearch.study.languages import characters
from prunesearch.study.record import CharacterErrors, UtteranceResult, WordErrors


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


def is_loop_of_characters(reference: str, hypothesis: str) -> bool:
    """The same where characters count as words: a phrase has up to 16 of them, and occurs eight times in a row, since a laugh
    or a number may repeat a character four times.
    """
    repeated, before = (longest_repetition(text.split(), longest_phrase=16) for text in (hypothesis, reference))
    return repeated > max(7, before)


def score(utterance: Utterance, hypothesis: str, text: TextConfig) -> UtteranceResult:
    """Count a normalised hypothesis' errors against the utterance's reference.

    In characters, if `text` says so for the language: then, each character counts as a word, and spaces do not count.
    """
    reference, unit = utterance.reference, text.unit_of(utterance.language)
    in_characters = characters(reference), characters(hypothesis)
    counted = count_errors(*in_characters)
    return UtteranceResult(
        id=utterance.id,
        reference=reference,
        hypothesis=hypothesis,
        errors=counted if unit == "characters" else count_errors(reference, hypothesis),
        unit=unit,
        characters=CharacterErrors(errors=counted.errors, reference_characters=counted.reference_words),
        language=utterance.language,
        group=utterance.group,
        looped=is_loop_of_characters(*in_characters) if unit == "characters" else is_loop(reference, hypothesis),
        switched=is_switched(reference, hypothesis, utterance.language),
    )
