"""Texts that are in another language than they should be."""

import re
from functools import cache
from typing import Any

# a text counts as another language's if its own has a smaller probability, and that of the other is so many times as large
UNLIKELY, MUCH = 0.01, 20.0


def is_switched(reference: str, hypothesis: str, language: str | None) -> bool | None:
    """Whether a hypothesis is surely not in the language of its recording; None where that language is not known.

    By py3langid, which distinguishes 140 languages by the bytes of a text. `language`: as `da`, `da-DK` or `Danish`. Of 650
    short prompts, it takes nine in ten for foreign that are, and one in forty that is not. A reference that is as unlikely
    clears its hypothesis.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    if language is None:
        return None
    name = language.lower()
    code = TO_LANGUAGE_CODE.get(name, re.split("[-_]", name)[0])
    if code not in _identifier().labels:
        return None
    return _is_unlikely(hypothesis, code) and not _is_unlikely(reference, code)


def _is_unlikely(text: str, code: str) -> bool:
    """Whether another language is far more likely. Digits alone, for example, are as likely in every language."""
    ranked = _identifier().rank(text)
    own = float(dict(ranked)[code])
    return own < UNLIKELY and float(ranked[0][1]) > MUCH * own


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
