"""Text normalisers. References and hypotheses get the same one."""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

Normalizer = Callable[[str], str]


def paper(text: str) -> str:
    """Lowercase without punctuation, but with apostrophes (arXiv 2603.27981)."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'").replace("`", "'")
    return " ".join(re.sub(r"[^\w\s']|_", "", text).split())


def none(text: str) -> str:
    """The text as it is, with single spaces."""
    return " ".join(text.split())


@cache
def normalizer_for(name: str, language: str | None = None) -> Normalizer:
    """The normaliser of this name: `paper`, `none` or `whisper`.

    `whisper` is Whisper's English normaliser (without its spelling map) for the language `en`, else its basic one.
    """
    if name == "paper":
        return paper
    if name == "none":
        return none
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    whisper: Normalizer = EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()
    return lambda text: none(whisper(text))
