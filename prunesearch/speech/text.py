"""Text normalisers: the same for references and hypotheses."""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

Normalizer = Callable[[str], str]


def paper(text: str) -> str:
    """Lowercase, punctuation out, apostrophes kept (arXiv 2603.27981)."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'").replace("`", "'")
    return " ".join(re.sub(r"[^\w\s']|_", "", text).split())


def none(text: str) -> str:
    """As written, but for runs of white space."""
    return " ".join(text.split())


@cache
def normalizer_for(name: str, language: str | None = None) -> Normalizer:
    """`paper`, `none` or `whisper`: Whisper's English normaliser (less its spelling map) for `en`, its basic one else."""
    if name == "paper":
        return paper
    if name == "none":
        return none
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    whisper: Normalizer = EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()
    return lambda text: none(whisper(text))
