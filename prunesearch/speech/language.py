"""Texts that are in another language than they should be."""

import re
from functools import cache
from typing import Any

SURE = 0.9  # a text counts as another language's from this probability on


def is_switched(reference: str, hypothesis: str, language: str | None) -> bool | None:
    """Whether a hypothesis is surely in another language than its recording; None where that language is not known.

    By py3langid, which distinguishes 140 languages by the bytes of a text. `language`: as `da`, `da-DK` or `Danish`. A
    reference that is taken for the same other language clears its hypothesis.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    if language is None:
        return None
    identifier, name = _identifier(), language.lower()
    code = TO_LANGUAGE_CODE.get(name, re.split("[-_]", name)[0])
    if code not in identifier.labels:
        return None
    other, probability = identifier.classify(hypothesis)
    return bool(probability >= SURE and other != code and identifier.classify(reference)[0] != other)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
