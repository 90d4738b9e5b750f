"""Text normalisers. References and hypotheses get the same one.

Texts that differ only in how a character is encoded or typed are equal: accents composed or not, ligatures, full-width
letters, and the many characters that stand for an apostrophe.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

Normalizer = Callable[[str], str]

# What people type or programs write for '. \x91 and \x92 are cp1252's quotation marks in a text that was read as latin-1.
APOSTROPHES = "‘’‛ʼʻʽʹˈˊˋ´`′‵＇｀❛❜՚׳Ꞌꞌ᾽\x91\x92"
QUOTATION_MARKS = "ʺˮ"  # letters to Unicode, but people type them for "
_FORMS_OF_ANY = ("<wide>", "<narrow>")  # of letters, digits and punctuation
_FORMS_OF_LETTERS = ("<font>", "<initial>", "<medial>", "<final>", "<isolated>")
# Thai and Lao "am", typed as two characters, around the tone mark
_AM = ((re.compile("\u0e4d([\u0e48-\u0e4b]*)\u0e32"), "\u0e33"), (re.compile("\u0ecd([\u0ec8-\u0ecb]*)\u0eb2"), "\u0eb3"))


def plain(text: str) -> str:
    """The text with one spelling for each letter and apostrophe: ligatures and full-width letters are written out, accents are
    composed (NFC), every apostrophe is ', and characters that only control layout (soft hyphens, joiners) are left out."""
    if not text.isascii():
        text = "".join(map(_plain_character, unicodedata.normalize("NFC", text)))
        for typed, letter in _AM:
            text = typed.sub(rf"\1{letter}", text)
        text = unicodedata.normalize("NFC", text)
    return text.replace("`", "'")


@cache
def _plain_character(character: str) -> str:
    if character in APOSTROPHES:
        return "'"
    if character in QUOTATION_MARKS:
        return '"'
    category = unicodedata.category(character)
    if category == "Cf" or _is_ignorable_mark(character):
        return ""
    if _is_form_of_others(character, category):
        written_out = unicodedata.normalize("NFKC", character)
        if not any(c.isspace() for c in written_out):  # ﷺ is a whole sentence
            return "".join(_plain_character(c) for c in written_out)
    return character


def _is_form_of_others(character: str, category: str) -> bool:
    """Whether the character is a ligature, or a form of a letter or digit, that is never the usual way to write it.

    Others stay, though NFKC would rewrite them: it turns 5½ into 51⁄2, and և, ำ and ㄱ into what nobody writes.
    """
    form = unicodedata.decomposition(character).split(" ")[0]
    if form == "<compat>":
        return category[0] == "L" and (
            "\ufb00" <= character <= "\ufb4f" or unicodedata.name(character).startswith(("LATIN", "GREEK", "MICRO"))
        )
    return form in _FORMS_OF_ANY or (form in _FORMS_OF_LETTERS and (category[0] == "L" or category == "Nd"))


def _is_ignorable_mark(character: str) -> bool:
    """Tatweel, variation selectors and the grapheme joiner: they choose a glyph, but change no word."""
    return character in "\u0640\u034f\u180f" or any(
        first <= character <= last for first, last in (("\u180b", "\u180d"), ("\ufe00", "\ufe0f"), ("\U000e0100", "\U000e01ef"))
    )


def paper(text: str) -> str:
    """Lowercase without punctuation, but with apostrophes (arXiv 2603.27981) and with the marks that belong to a letter, such
    as the vowel signs of Devanagari, Thai or Arabic."""
    text = plain(text).lower().replace("i\u0307", "i")  # what lower() makes of İ
    if text.isascii():
        return " ".join(re.sub(r"[^\w\s']|_", "", text).split())
    return " ".join(unicodedata.normalize("NFC", _without_punctuation(text)).split())


def _without_punctuation(text: str) -> str:
    kept = []
    after_letter = False  # a mark goes with the character that carries it: the accent on a removed symbol is removed, too
    for character in text:
        if _is_mark(character):
            if after_letter:
                kept.append(character)
            continue
        after_letter = character.isalnum()
        if after_letter or character == "'" or character.isspace():
            kept.append(character)
    return "".join(kept)


@cache
def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Mc")


def none(text: str) -> str:
    """The text as it is, with single spaces, and with its accents composed (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).split())


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
    return lambda text: none(whisper(plain(text)))
