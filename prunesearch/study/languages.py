"""Languages that are written without spaces between words. Errors are counted in characters there."""

import re

# Chinese (Mandarin, Cantonese, Wu), Japanese, Thai, Lao, Burmese, Khmer, Tibetan, Dzongkha: codes, and names in English
_WITHOUT_SPACES = frozenset(
    "zh zho chi cmn yue wuu ja jpn th tha lo lao my mya bur km khm bo bod tib dz dzo "
    "chinese mandarin cantonese wu japanese thai lao burmese myanmar khmer tibetan dzongkha".split()
)


def has_spaces(language: str | None) -> bool:
    """Whether spaces separate the words of a language, which is given as `th`, `zh-TW`, `jpn` or `Chinese (Taiwan)`. True where
    the language is not known.
    """
    return re.split("[^a-z]", (language or "").lower())[0] not in _WITHOUT_SPACES


def characters(text: str) -> str:
    """The characters of a text as if they were words: one space between two of them."""
    return " ".join("".join(text.split()))
