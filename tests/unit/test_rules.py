"""The rules about sentence pairs: each finds its own fault, and no other."""

from __future__ import annotations

import string
import unicodedata
from typing import get_args

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.data.rules import COLUMNS, FATAL, Judged, another_language, mark, mark_repeated, pairs_of, reasons
from tasks.pull import SPLITS
from tasks.settings import RuleName, Validation

Side = str | None
Row = tuple[Side, Side]
CLEAN: dict[str, list[Row]] = {
    split: [(f"This is {word} number {i}.", f"Esta es la {palabra} número {i}.") for i in range(5)]
    for split, word, palabra in (("train", "chair", "silla"), ("validation", "door", "puerta"), ("test", "cup", "taza"))
}
LIMITS = Validation()


def marked(splits: dict[str, list[Row]], limits: Validation = LIMITS) -> dict[str, pd.DataFrame]:
    """Splits after all rules have looked at them."""
    judged, marks = {}, {}
    for split in reversed(SPLITS):
        pairs = pairs_of(*zip(*splits[split], strict=True))
        batch = mark(pairs, limits, ("en", "es"), Judged(judged, limits.near_duplicate))
        marks[split] = pa.Table.from_batches([batch]).to_pandas()
        mark_repeated(marks[split])
        judged[split] = pairs
    return marks


def found(marks: dict[str, pd.DataFrame]) -> set[tuple[str, int, str]]:
    """Which rule found something in which row of which split."""
    return {
        (split, int(row), column)
        for split, table in marks.items()
        for column in COLUMNS
        for row in table.loc[table[column].notna(), "row"]
    }


def test_the_settings_know_every_rule() -> None:
    assert list(get_args(RuleName)) == COLUMNS


def test_clean_pairs_break_no_rule() -> None:
    marks = marked(CLEAN)
    assert found(marks) == set()
    assert all(table["usable"].all() for table in marks.values())
    assert all(reasons(table).empty for table in marks.values())


# Numbers, which are in no language, so that only what is planted can be in a wrong one.
words = st.lists(st.integers(100, 99_999).map(str), min_size=4, max_size=9)
text = words.map(" ".join)
prose_en = st.sampled_from(
    ["The children were playing in the garden", "We should have gone home before the rain started"]
)
prose_es = st.sampled_from(
    ["Los niños estaban jugando en el jardín", "Deberíamos habernos ido a casa antes de que empezara a llover"]
)
prose_de = st.sampled_from(
    ["Die Kinder haben den ganzen Nachmittag im Garten gespielt", "Wir hätten vor dem Regen nach Hause gehen sollen"]
)
control = st.characters(codec="utf-8", categories=["Cc", "Co"], exclude_characters="\t\n\v\f\r\x85")
tag = st.builds("<{}{}>".format, st.sampled_from(["", "/"]), st.text(string.ascii_letters, min_size=1, max_size=8))
accented = st.sampled_from("áéíóúñüÁÉÍÓÚÑ¿¡«»°")
decomposed = st.sampled_from("áéíóúñü").map(lambda char: unicodedata.normalize("NFD", char))
blank = st.none() | st.text(" \t\n\u00a0\u200b\ufeff", max_size=4)


def misread(char: str) -> str:
    """UTF-8 as somebody who thinks that it is Latin-1 reads it."""
    return char.encode().decode("latin-1")


def either(faulty: st.SearchStrategy[str], good: st.SearchStrategy[str]) -> st.SearchStrategy[Row]:
    """A pair with the faulty text on one side or the other."""
    return st.tuples(faulty, good) | st.tuples(good, faulty)


def within(inserted: st.SearchStrategy[str]) -> st.SearchStrategy[Row]:
    """A pair with something inserted into a side."""
    return either(st.builds("{} {}x {}".format, text, inserted, text), text)


# For each rule the pairs that break it and no other. The words of both sides differ enough not to be `identical`.
PLANTED: dict[str, st.SearchStrategy[Row]] = {
    "blank": st.tuples(blank, text) | st.tuples(text, blank),
    "too_long": st.tuples(text, text).map(lambda pair: (f"{pair[0]} " * 300, f"{pair[1]} , " * 300)),
    "ratio": either(st.just("7"), st.lists(st.integers(10_000, 99_999), min_size=20, max_size=40).map(str)),
    "identical": text.map(lambda side: (f"No. {side}", f"NO.\t{side}")),
    "markup": within(tag | st.sampled_from(["&lt;b&gt;", "&lt;", "&gt;"])),
    "mojibake": within(accented.map(misread).filter(lambda pair: not set(pair) & set(map(chr, range(0x80, 0xA0))))),
    "damaged": within(control.filter(lambda char: not "\x80" <= char < "\xa0") | st.just("\ufffd")),
    "language": st.tuples(prose_de | prose_es, prose_es)
    | st.tuples(prose_en, prose_de | prose_en.map(lambda t: t + " x")),
    "not_composed": within(decomposed),
    "entity": within(st.sampled_from(["&quot;", "&aacute;", "&#225;", "&#xE1;", "&nbsp;", "&amp;"])),
}


@pytest.mark.parametrize("rule", PLANTED)
@settings(max_examples=30)
@given(data=st.data(), split=st.sampled_from(SPLITS), place=st.integers(0, 5))
def test_a_planted_fault_is_found_by_its_rule_alone(rule: str, data: st.DataObject, split: str, place: int) -> None:
    pair = data.draw(PLANTED[rule])
    assume(rule == "identical" or (pair[0] or "").casefold() != (pair[1] or "").casefold())
    marks = marked({**CLEAN, split: [*CLEAN[split][:place], pair, *CLEAN[split][place:]]})
    assert found(marks) == {(split, place, rule)}
    assert bool(marks[split]["usable"][place]) is (rule not in FATAL)
    if rule in FATAL:
        (aside,) = reasons(marks[split]).to_dict("records")
        assert (aside["row"], aside["reasons"]) == (place, rule)
        assert aside["evidence"].startswith(f"{rule}: ")


@pytest.mark.parametrize(
    ("fault", "evidence"),
    [
        (("Good morning to you.", "Mañana & tarde <br> noche"), "markup: <br>"),
        (("Tomorrow is another day.", "MaÃ±ana serÃ¡ otro día."), "mojibake: Ã±"),
        (("Tomorrow is another day.", "â€œMañanaâ€\x9d será otro día."), "mojibake: â€œ; damaged: U+009D"),
        (("Tomorrow\u0007 is another day.", "Mañana será otro día."), "damaged: U+0007"),
        (("Tomorrow is another day.", "\uf0b7 Mañana será otro día."), "damaged: U+F0B7"),
        (("The children play in the garden all day.", "Die Kinder spielen den ganzen Tag im Garten."), "language: de "),
        (("Yes.", "Sí, " + "y todo lo que se dijo ayer en la reunión " * 3), "ratio: 126 to 4 characters"),
    ],
)
def test_evidence_says_what_is_wrong(fault: Row, evidence: str) -> None:
    table = marked({**CLEAN, "train": [*CLEAN["train"], fault]})["train"]
    assert reasons(table)["evidence"].tolist()[0].startswith(evidence)


@pytest.mark.parametrize(
    "pair",
    [
        ("5 < 6 and 7 > 3", "5 < 6 y 7 > 3 también"),
        ("Q&A at AT&T; fine", "Preguntas en AT&T; bien"),
        ("He said: “Good day”…", "Dijo: «Buenos días»…"),
        ("Ångström, São Paulo, ÉVORA", "ÁNGEL, MAÑANA, PINGÜINO, ¿QUÉ?"),
        ("Yes.\tOf course.\n", "Sí.\u00a0Claro."),
        ("Tom lives in Boston.", "Tom vive en Boston."),
        ("See https://example.org/index.php?a=1", "Véase https://example.org/index.php?a=1"),
    ],
)
def test_what_only_looks_like_a_fault_is_kept(pair: Row) -> None:
    assert found(marked({**CLEAN, "train": [pair]})) == set()


def test_of_equal_pairs_the_first_is_kept() -> None:
    again = ("this is CHAIR  number 1", "Esta es la silla, número 1")  # as leakage sees it, the same
    marks = marked({**CLEAN, "train": [*CLEAN["train"], again, ("", ""), ("", ""), again]})
    assert found(marks) == {
        ("train", 5, "duplicate"),
        ("train", 8, "duplicate"),
        *(("train", r, "blank") for r in (6, 7)),
    }
    assert reasons(marks["train"])["evidence"].tolist()[0] == "duplicate: row 1"


def test_other_translations_of_a_source_are_counted_and_kept() -> None:
    other = ("This is chair number 1.", "He aquí otra frase distinta.")
    table = marked({**CLEAN, "train": [*CLEAN["train"], other, other]})["train"]
    assert table["conflicting"].tolist() == [False, True, False, False, False, True, False]
    assert table["usable"].tolist() == [*[True] * 6, False]  # the repetition is no other translation


@pytest.mark.parametrize("side", [0, 1])
def test_what_the_model_is_judged_on_is_taken_from_where_it_learns(side: int) -> None:
    other: list[str] = ["An entirely new sentence.", "Una frase del todo nueva."]
    other[side] = str(CLEAN["test"][3][side]).upper()
    pair = (other[0], other[1])
    splits = {**CLEAN, "train": [*CLEAN["train"], pair], "validation": [*CLEAN["validation"], pair]}
    marks = marked(splits)
    assert found(marks) == {("train", 5, "leaked"), ("validation", 5, "leaked")}
    assert marks["test"]["usable"].all()  # never taken from test
    assert marks["validation"]["leaked"][5] == "test row 3"


LONG = ("One two three four five six seven eight nine ten", "Uno dos tres cuatro cinco seis siete ocho nueve diez")


@pytest.mark.parametrize(
    ("pair", "near"),
    [
        ((f"{LONG[0]}!", f"{LONG[1]} once"), True),  # 20 of 21 words
        ((f"{LONG[0]} eleven", f"{LONG[1]} once"), True),  # 20 of 22
        (("One two three four five six", LONG[1]), True),  # 16 of 20: just so
        (("One two three four five", LONG[1]), False),  # 15 of 20
        (("Ten nine eight seven six five four three two one", f"{LONG[1]} once"), True),  # in any order
    ],
)
def test_a_pair_with_nearly_all_words_of_one_that_judges_has_leaked_too(pair: Row, near: bool) -> None:
    pair = (pair[0], f"{pair[1]} más" if not near else pair[1])
    splits = {**CLEAN, "train": [*CLEAN["train"], pair], "test": [*CLEAN["test"], LONG]}
    kinds = {column for _, _, column in found(marked(splits))}
    assert kinds in (({"nearly_leaked"}, {"leaked"}) if near else (set(),))


sentence = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8).map(" ".join)


@given(st.lists(st.tuples(sentence, sentence), min_size=1, max_size=12), sentence, sentence, st.floats(0.3, 1))
def test_prefix_filtering_loses_no_near_duplicate(
    pairs: list[tuple[str, str]], source: str, target: str, similarity: float
) -> None:
    def words_of(pair: tuple[str, str]) -> set[tuple[int, str]]:
        return {(side, word) for side in (0, 1) for word in pair[side].split()}

    mine = words_of((source, target))
    alike = [len(mine & words_of(pair)) / len(mine | words_of(pair)) for pair in pairs]
    judged = Judged({"test": pairs_of(*zip(*pairs, strict=True))}, similarity)
    evidence = judged.nearly_holds(source, target)
    assert (evidence is not None) is (max(alike) >= similarity)
    if evidence:
        assert evidence == f"{max(alike):.0%} of test row {alike.index(max(alike))}"


any_side = st.none() | st.text()


@given(st.lists(st.tuples(any_side, any_side), min_size=1, max_size=8))
def test_a_pair_is_usable_just_when_it_breaks_no_rule_whatever_it_holds(pairs: list[Row]) -> None:
    marks = marked({"train": pairs, "validation": CLEAN["validation"], "test": pairs[:2]})
    for table in marks.values():
        assert (table["usable"] == table[FATAL].isna().all(axis=1)).all()
        aside = reasons(table)
        assert aside["row"].tolist() == table.loc[~table["usable"], "row"].tolist()
        assert (aside["reasons"] != "").all()


@pytest.mark.parametrize(
    ("sentence", "expected", "other"),
    [
        ("Where have you been all this time, my friend?", "es", "en"),
        ("¿Dónde has estado todo este tiempo, amigo mío?", "en", "es"),
        ("Wo bist du die ganze Zeit gewesen, mein Freund?", "en", "de"),
        ("Where have you been all this time, my friend?", "en", None),
        ("Tom!", "es", None),  # too short to tell
        (":meth:`loop.remove_writer` <https://docs.python.org/3/library/asyncio.html> loop.add_reader()", "es", None),
        (
            "Where have you been all this time, my friend?",
            "qaa",
            None,
        ),  # of a language it does not know it says nothing
    ],
)
def test_a_language_is_recognised_only_where_there_is_prose_enough(
    sentence: str, expected: str, other: str | None
) -> None:
    seen = another_language(sentence, expected)
    assert (seen or "").split(" ")[0] == (other or "")
