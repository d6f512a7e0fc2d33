"""The rules about sentence pairs: which pair breaks which, and which are set aside."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from tasks.pull import SPLITS
from tasks.settings import Validation

MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|&(?:[a-z]{2,8}|#\d{1,6});")
# UTF-8 read as Latin-1 shows as these pairs; a replacement or private-use character has lost what it was.
BROKEN = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\ufffd|[\ue000-\uf8ff]|[\u0000-\u0008\u000e-\u001f\u007f]"
)


@dataclass(frozen=True)
class Rule:
    """A rule about single pairs: the column that marks those who break it, and the reason in plain language."""

    column: str
    reason: str


RULES = (
    Rule("blank", "a side is missing or blank: there is nothing to translate"),
    Rule("too_long", "a side is longer than the limit: most likely several sentences, or a page"),
    Rule("ratio", "one side is many times longer than the other: they cannot say the same"),
    Rule("identical", "both sides are the same text: it was never translated"),
    Rule("markup", "a side holds markup or entities: the model would learn to write them"),
    Rule("broken_text", "a side holds mojibake, control or private-use characters: its text was damaged"),
    Rule("duplicate", "the same pair stands earlier in this split: it would count twice"),
    Rule("leaked", "a side also stands in a split that judges the model: it would be judged on what it has seen"),
)


def mark(frames: dict[str, pd.DataFrame], limits: Validation) -> None:
    """Add to each split a column for every rule, and `usable`: none of them broken."""
    judged_later: set[str] = set()
    for split in reversed(SPLITS):  # test first: what it holds may stand in neither of the others
        frame = frames[split]
        source, target = frame["source"].fillna(""), frame["target"].fillna("")
        lengths = pd.DataFrame({"source": source.str.len(), "target": target.str.len()})
        frame["row"] = range(len(frame))
        frame["blank"] = (source.str.strip() == "") | (target.str.strip() == "")
        frame["too_long"] = lengths.max(axis=1) > limits.max_characters
        frame["ratio"] = (lengths.max(axis=1) + 10) / (lengths.min(axis=1) + 10) > limits.max_length_ratio
        frame["identical"] = (source == target) & ~frame["blank"]
        frame["markup"] = source.map(_holds(MARKUP)) | target.map(_holds(MARKUP))
        frame["broken_text"] = source.map(_holds(BROKEN)) | target.map(_holds(BROKEN))
        normal = pd.DataFrame({"source": source.map(normalise), "target": target.map(normalise)})
        frame["duplicate"] = normal.duplicated() & ~frame["blank"]
        frame["leaked"] = (normal["source"].isin(judged_later) | normal["target"].isin(judged_later)) & ~frame["blank"]
        judged_later |= set(normal["source"]) | set(normal["target"])
        frame["usable"] = ~frame[[rule.column for rule in RULES]].any(axis=1)


def normalise(text: str) -> str:
    """A sentence as leakage sees it: case, accents' encoding, punctuation and spacing do not make it another one."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold())
    return words.strip()


def quarantine(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The pairs set aside, with their reasons."""
    columns = [rule.column for rule in RULES]
    parts = []
    for split, frame in frames.items():
        aside = frame[~frame["usable"]]
        reasons = [", ".join(c for c in columns if row[c]) for row in aside[columns].to_dict("records")]
        parts.append(aside[["row", "source", "target"]].assign(split=split, reasons=reasons))
    return pd.concat(parts, ignore_index=True)[["split", "row", "source", "target", "reasons"]]


def _holds(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.search(text) is not None
