"""Text in the form in which it is trained on, and in the form in which sentences are compared."""

from __future__ import annotations

import html
import re
import unicodedata

ENTITY = re.compile(r"&(?:[A-Za-z]{2,8}\d{0,2}|#\d{1,6}|#[xX][0-9A-Fa-f]{1,6});")
# Typographic quotes say the same as plain ones; soft hyphens, zero-width spaces and byte-order marks say nothing.
PLAIN = str.maketrans("“”„‟‘’‚‛", "\"\"\"\"''''", "\u00ad\u200b\u2060\ufeff")
NOT_PLAIN = re.compile("[" + "".join(map(chr, PLAIN)) + "]")
NOT_WORDS = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """The same text in one form: composed (NFC), plain quotes, single spaces, letters instead of their entities.

    Nothing that changes the meaning: `&lt;` stays, since `<` might become markup. Idempotent.
    """
    text = _plain(text)
    if "&" in text:
        while (unescaped := ENTITY.sub(_character, text)) != text:  # again, for &amp;aacute;
            text = unescaped
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def fold(text: str) -> str:
    """A sentence as comparisons see it: case, encoding, punctuation and spacing do not make it another one."""
    return NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _plain(text: str) -> str:
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text.translate(PLAIN) if NOT_PLAIN.search(text) else text)


def _character(entity: re.Match[str]) -> str:
    character = _plain(html.unescape(entity[0]))
    # What is no entity comes back as it is, what means no character as U+FFFD.
    known = len(character) <= 1 and (character.isprintable() or character.isspace()) and character not in "<>\ufffd"
    return character if known or not character else entity[0]
