"""The rules about sentence pairs: each finds its own fault, and no other."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.preprocess import normalise as normalise_text
from tasks.pull import SPLITS
from tasks.rules import RULES, mark, normalise, quarantine
from tasks.settings import Validation

Pair = tuple[str | None, str | None]
COLUMNS = [rule.column for rule in RULES]
CLEAN: dict[str, list[Pair]] = {
    split: [(f"This is {word} number {i}.", f"Esta es la {palabra} número {i}.") for i in range(5)]
    for split, word, palabra in (("train", "chair", "silla"), ("validation", "door", "puerta"), ("test", "cup", "taza"))
}


def marked(splits: dict[str, list[Pair]], limits: Validation | None = None) -> dict[str, pd.DataFrame]:
    """Splits after all rules have looked at them."""
    frames = {split: pd.DataFrame(splits[split], columns=["source", "target"]) for split in SPLITS}
    mark(frames, limits or Validation())
    return frames


def found(frames: dict[str, pd.DataFrame]) -> set[tuple[str, int, str]]:
    """Which rule found something in which row of which split."""
    return {
        (split, int(row), column)
        for split, frame in frames.items()
        for column in COLUMNS
        for row in frame.loc[frame[column], "row"]
    }


def test_clean_pairs_break_no_rule() -> None:
    frames = marked(CLEAN)
    assert found(frames) == set()
    assert all(frame["usable"].all() for frame in frames.values())
    assert quarantine(frames).empty


FAULTS: list[tuple[str, Pair]] = [
    ("blank", (None, "Buenos días a todos.")),
    ("blank", ("Good morning, all of you.", "")),
    ("blank", ("Good morning, all of you.", " \t\u00a0")),
    ("too_long", ("word " * 500, "palabra " * 400)),
    ("ratio", ("Yes.", "Sí, " + "y además todo lo que se dijo ayer en la reunión " * 3)),
    ("identical", ("Copyright Madrid", "Copyright Madrid")),
    ("markup", ("<i>Never again.</i>", "Nunca más, dijo él.")),
    ("markup", ("Never again, he said.", "Nunca m&aacute;s, dijo él.")),
    ("markup", ("Never again, he said.", "Nunca m&#225;s, dijo él.")),
    ("broken_text", ("Tomorrow is another day.", "MaÃ±ana será otro día.")),
    ("broken_text", ("Tomorrow is another day.", "Ma\ufffdana será otro día.")),
    ("broken_text", ("Tomorrow\u0007 is another day.", "Mañana será otro día.")),
    ("broken_text", ("Tomorrow is another day.", "\ue012 Mañana será otro día.")),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("rule", "pair"), FAULTS)
def test_a_planted_fault_is_found_by_its_rule_alone(rule: str, pair: Pair, split: str) -> None:
    frames = marked({**CLEAN, split: [*CLEAN[split][:2], pair, *CLEAN[split][2:]]})
    assert found(frames) == {(split, 2, rule)}
    (aside,) = quarantine(frames).to_dict("records")
    assert (aside["split"], aside["row"], aside["reasons"]) == (split, 2, rule)


@pytest.mark.parametrize("pair", [("5 < 6 and 7 > 3", "5 < 6 y 7 > 3 también"), ("Q&A at AT&T", "Preguntas en AT&T")])
def test_what_only_looks_like_markup_is_kept(pair: Pair) -> None:
    assert found(marked({**CLEAN, "train": [pair]})) == set()


def test_of_equal_pairs_the_first_is_kept() -> None:
    again = ("this is CHAIR  number 1", "Esta es la silla, número 1")  # as leakage sees it, the same
    assert found(marked({**CLEAN, "train": [*CLEAN["train"], again]})) == {("train", 5, "duplicate")}


@pytest.mark.parametrize("side", [0, 1])
def test_what_the_model_is_judged_on_is_taken_from_where_it_learns(side: int) -> None:
    other: list[str] = ["An entirely new sentence.", "Una frase del todo nueva."]
    other[side] = str(CLEAN["test"][3][side])
    pair = (other[0], other[1])
    splits = {**CLEAN, "train": [*CLEAN["train"], pair], "validation": [*CLEAN["validation"], pair]}
    assert found(marked(splits)) == {("train", 5, "leaked"), ("validation", 5, "leaked")}


@given(st.lists(st.tuples(st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text())), min_size=1, max_size=8))
def test_a_pair_is_usable_just_when_it_breaks_no_rule_whatever_it_holds(pairs: list[Pair]) -> None:
    frames = marked({"train": pairs, "validation": CLEAN["validation"], "test": pairs[:2]})
    for frame in frames.values():
        assert (frame["usable"] == ~frame[COLUMNS].any(axis=1)).all()
    aside = quarantine(frames)
    assert len(aside) == sum(int((~frame["usable"]).sum()) for frame in frames.values())
    assert (aside["reasons"] != "").all()


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise_text(normalise_text(text)) == normalise_text(text)
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(), st.text(alphabet=" \t\n.,;:!?¿¡", max_size=3))
def test_leakage_does_not_see_case_spacing_or_punctuation(text: str, noise: str) -> None:
    assert normalise(noise + text + noise) == normalise(text)
