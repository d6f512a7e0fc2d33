"""Normalising changes the form of a text and never what it says; folding finds what only looks different."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.text import fold, normalise


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("man\u0303ana", "mañana"),
        (" two\u00a0 \t words\n", "two words"),
        ("M&aacute;s &amp; m&#225;s&nbsp;&quot;todo&quot;", 'Más & más "todo"'),
        ("&amp;aacute;", "á"),
        ("“Yes”, he said: ‘no’. It’s", "\"Yes\", he said: 'no'. It's"),
        ("soft\u00adhyphen zero\u200bwidth \ufeffmark", "softhyphen zerowidth mark"),
    ],
)
def test_what_says_the_same_becomes_the_same(text: str, same: str) -> None:
    assert normalise(text) == same


@pytest.mark.parametrize(
    "text",
    ["a &lt; b", "&amp;lt;p&gt;"[5:], "AT&T; R&D", "&unknown;", "«¿Qué?» — 1.º… ½", "&#0;", "x² ≠ x2", "niño, nino"],
)
def test_what_could_change_the_meaning_stays(text: str) -> None:
    assert normalise(text) == text


@given(
    st.text()
    | st.lists(st.sampled_from(["&", "amp;", "#38;", "lt;", "a", "\u0301", "\u00ad", "\u037e", " "])).map("".join)
)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert fold(fold(text)) == fold(text)


@given(st.text(), st.text(alphabet=" \t\n.,;:!?¿¡", max_size=3))
def test_comparison_does_not_see_case_spacing_or_punctuation(text: str, noise: str) -> None:
    assert fold(noise + text + noise) == fold(text)
