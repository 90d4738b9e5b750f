"""Names of languages as models take them."""

import re

from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE


def language_code(language: str) -> str:
    """The code of a language that is given as `da`, `da-DK` or `Danish`."""
    name = language.lower()
    return TO_LANGUAGE_CODE.get(name, re.split("[-_]", name)[0])
