"""Compose sentences, in English and in the Spanish of two continents, from patterns.txt and lexicon.txt.

A pattern's slots are filled once, with entries of the lexicon, and then said in each language: `Scene` holds the
choices, `English` and `Spanish` say them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grammar

SPAIN, AMERICA = 0, 1
FORMS = {"recent": ("perfect", "preterite"), "will": ("future", "going")}  # forms that differ, as words do
SLOT = re.compile(r"\{([^{}]+)\}")
HERE = Path(__file__).parent


class Sentence(NamedTuple):
    """An English sentence, and what it is in Spain and in Latin America."""

    english: str
    spanish: tuple[str, str]


class Entry(NamedTuple):
    """A line of the lexicon. Person and gender matter where it is a subject."""

    english: str
    spanish: str
    person: int = 2
    gender: str = "m"


def choose(text: str, variety: int) -> str:
    """Text with each [Spain|America] decided."""
    return re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda choice: choice[1 + variety], text)


# --- the files -------------------------------------------------------------------------------------------------------


def _lines(name: str) -> Iterator[str]:
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line


def _read_lexicon() -> dict[str, list[Entry]]:
    sections: dict[str, list[Entry]] = {}
    for line in _lines("lexicon.txt"):
        if heading := re.match(r"\[([\w']+)\](?: = (.+))?", line):
            parts = heading[2].split(" + ") if heading[2] else []
            entries = sections[heading[1]] = [entry for part in parts for entry in sections[part]]
        else:
            english, spanish = (side.strip() for side in line.split(" =", 1))
            if subject := re.fullmatch(r"(\d)([mf]) (.+)", english):
                entries.append(Entry(subject[3], spanish, int(subject[1]), subject[2]))
            else:
                entries.append(Entry(english, spanish))
    return sections


LEXICON = _read_lexicon()
PATTERNS = [tuple(line.split(" = ")) for line in _lines("patterns.txt")]
SUBJECTS = {"who", "self", "you", "name", "relation", "someone", "owner", "asked", "nobody", "let's", "called"}
PRONOUNS = {entry.english for section in ("who", "let's") for entry in LEXICON[section]}
ARTICLES = ("el ", "la ", "los ", "las ")
NOUNS = {
    section
    for section, entries in LEXICON.items()
    if all(choose(entry.spanish, SPAIN).startswith(ARTICLES) for entry in entries)
}


# --- what no lexicon can list: numbers, dates, times -----------------------------------------------------------------

HOURS = (
    ("one", "la una"), ("two", "las dos"), ("three", "las tres"), ("four", "las cuatro"), ("five", "las cinco"),
    ("six", "las seis"), ("seven", "las siete"), ("eight", "las ocho"), ("nine", "las nueve"), ("ten", "las diez"),
    ("eleven", "las once"), ("twelve", "las doce"),
)  # fmt: skip
MINUTES = (("five", "cinco"), ("ten", "diez"), ("a quarter", "cuarto"), ("twenty", "veinte"))


def _spoken_time(rng: random.Random) -> tuple[str, str, str]:
    """`ten to four` in three languages: Spain takes minutes off the coming hour, America counts them up to it."""
    hour = rng.randrange(12)
    (english, spanish), (coming, viene) = HOURS[hour - 1], HOURS[hour]
    minutes, minutos = rng.choice(MINUTES)
    return rng.choice(
        (
            (f"{english} o'clock", spanish, spanish),
            (f"half past {english}", f"{spanish} y media", f"{spanish} y media"),
            (f"{minutes} past {english}", f"{spanish} y {minutos}", f"{spanish} y {minutos}"),
            (
                f"{minutes} to {coming}",
                f"{viene} menos {minutos}",
                f"{minutos.replace('cuarto', 'un cuarto')} para {viene}",
            ),
        )
    )


def _clock(rng: random.Random) -> Entry:
    if rng.random() < 0.6:
        english, spain, america = _spoken_time(rng)
        return Entry(f"at {english}", f"a [{spain}|{america}]")
    hour, minutes = rng.randint(1, 12), rng.choice(("05", "10", "15", "20", "30", "40", "45", "50"))
    return Entry(f"at {hour}:{minutes}", f"a {'la' if hour == 1 else 'las'} {hour}:{minutes}")


def _now(rng: random.Random) -> Entry:
    english, *spoken = _spoken_time(rng)
    spain, america = (f"{'es' if time.startswith('la ') else 'son'} {time}" for time in spoken)
    return Entry(english, f"[{spain}|{america}]")


def _monthday(rng: random.Random) -> Entry:
    month, day = rng.choice(LEXICON["month"]), rng.randint(2, 28)
    return Entry(f"{month.english} {day}", f"{day} de {month.spanish}")


def _date(rng: random.Random) -> Entry:
    day, year = _monthday(rng), rng.randint(1950, 2015)
    return Entry(f"{day.english}, {year}", f"{day.spanish} de {year}")


def _thousands(rng: random.Random) -> Entry:
    thousands, rest = rng.randint(1, 9), 50 * rng.randrange(20)
    return Entry(f"{thousands},{rest:03}", f"[{thousands}.{rest:03}|{thousands},{rest:03}]")


def _decimal(rng: random.Random) -> Entry:
    whole, tenth = rng.randint(1, 5), rng.randint(1, 9)
    return Entry(f"{whole}.{tenth}", f"[{whole},{tenth}|{whole}.{tenth}]")


def _digits(low: int, high: int, rng: random.Random) -> Entry:
    value = str(rng.randint(low, high))
    return Entry(value, value)


GENERATED: dict[str, Callable[[random.Random], Entry]] = {
    "clock": _clock,
    "now": _now,
    "monthday": _monthday,
    "date": _date,
    "thousands": _thousands,
    "decimal": _decimal,
    "year": partial(_digits, 1985, 2025),
    "age": partial(_digits, 18, 90),
    "price": partial(_digits, 10, 99),
}


# --- from a pattern to a sentence ------------------------------------------------------------------------------------


def _section(name: str) -> str:
    """`fruit2+` -> `fruit`."""
    return name.rstrip("+0123456789")


class Scene:
    """The choices behind one sentence: its subject, and what each slot's name stands for."""

    def __init__(self, rng: random.Random, pattern: str) -> None:
        self._rng = rng
        self._entries: dict[str, Entry] = {}
        slots = [slot.split(" ")[0].replace("whose", "owner") for slot in SLOT.findall(pattern)]
        self.subject = next((self.entry(slot) for slot in slots if slot in SUBJECTS), Entry("it", ""))

    def entry(self, name: str, scope: str = "") -> Entry:
        """What a name stands for: chosen at its first mention, and never what another name stands for already.

        A slot inside an entry ("lose {my pocket}") belongs to that entry alone: `scope` keeps it apart from others.
        """
        key = scope + name.rstrip("+")
        if key not in self._entries:
            section = _section(name)
            if section in GENERATED:
                self._entries[key] = GENERATED[section](self._rng)
            else:
                taken = set(self._entries.values())
                self._entries[key] = self._rng.choice([entry for entry in LEXICON[section] if entry not in taken])
        return self._entries[key]


class English:
    """Says a scene in English."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.person, self.gender = scene.subject.person, scene.subject.gender

    def say(self, text: str, scope: str = "") -> str:
        """The text with its slots filled."""
        return SLOT.sub(lambda slot: self._fill(slot[1], scope), text)

    def _fill(self, slot: str, scope: str) -> str:
        if slot == "pron":
            return ("I", "you", "she" if self.gender == "f" else "he", "we", "you", "they")[self.person]
        if ":" in slot:
            return self._verb(*slot.split(":"), scope)
        if ">" in slot:
            word, target = slot.split(">")
            word = self.scene.entry(word, scope).english if _section(word) in LEXICON else word
            return grammar.english_agreement(word, self.person > 2 if target == "who" else self._noun(target, scope)[1])
        *determiner, name = slot.split(" ")
        return self._noun_phrase(*determiner, name=name, scope=scope)

    def _verb(self, name: str, form: str, scope: str) -> str:
        verb, rest = name, ""
        if _section(name) in LEXICON:
            verb, _, rest = self.scene.entry(name, scope).english.partition(" ")
        return f"{grammar.english_verb(verb, form, self.person)} {self.say(rest, scope + name)}"

    def _noun(self, name: str, scope: str) -> tuple[str, bool]:
        """A noun, and whether it is plural."""
        entry = self.scene.entry(name, scope)
        noun = self.say(entry.english, scope + name)
        if name.endswith("+"):
            return grammar.english_plural(noun), True
        return noun, choose(entry.spanish, SPAIN).startswith(("los ", "las "))

    def _noun_phrase(self, determiner: str = "", *, name: str, scope: str) -> str:
        noun, plural = self._noun(name, scope)
        owner = self.scene.subject.english
        if determiner == "a" and plural:
            determiner = "some"
        elif determiner == "my" or (determiner == "whose" and owner in PRONOUNS):
            determiner = ("my", "your", "her" if self.gender == "f" else "his", "our", "your", "their")[self.person]
        elif determiner == "whose":
            determiner = owner + ("'" if re.match("my .+s$", owner) else "'s")
        return f"{determiner} {noun}"


class Spanish:
    """Says a scene in the Spanish of one variety."""

    def __init__(self, scene: Scene, variety: int) -> None:
        self.scene, self.variety = scene, variety
        self.subject, self.gender = choose(scene.subject.spanish, variety), scene.subject.gender
        # America has no vosotros: ustedes takes the verbs and pronouns of ellos.
        self.person = 5 if variety == AMERICA and scene.subject.person == 4 else scene.subject.person

    def say(self, text: str, scope: str = "") -> str:
        """The text with its slots filled."""
        return SLOT.sub(lambda slot: self._fill(slot[1], scope), choose(text, self.variety))

    def _fill(self, slot: str, scope: str) -> str:
        if slot in SUBJECTS:
            return self.subject
        if slot in {"le", "a who"}:
            who = f"a {self.subject}" if self.subject else ""
            return who if slot == "a who" else ("me", "te", "le", "nos", "os", "les")[self.person]
        if ":" in slot:
            return self._verb(*slot.split(":"), scope)
        if ">" in slot:
            return self._agreeing(*slot.split(">"), scope)
        *determiner, name = slot.split(" ")
        return self._noun_phrase(*determiner, name=name, scope=scope)

    def _verb(self, name: str, form: str, scope: str) -> str:
        verb, rest = name, ""
        if _section(name) in LEXICON:
            verb, _, rest = choose(self.scene.entry(name, scope).spanish, self.variety).partition(" ")
        form, _, inverted = form.partition("+")
        form = FORMS.get(form, (form, form))[self.variety]
        # Spain's endings say that it is you; America's could be yours or theirs, so that ustedes is said.
        subject = self.subject if inverted and self.person != 4 else ""
        return f"{grammar.conjugate(verb, form, self.person)} {subject} {self.say(rest, scope + name)}"

    def _agreeing(self, word: str, target: str, scope: str) -> str:
        if _section(word) in LEXICON:
            word = choose(self.scene.entry(word, scope).spanish, self.variety)
        if target == "who":
            return grammar.decline(word, self.gender, self.person > 2)
        _, gender, plural = self._noun(target, scope)
        return grammar.decline(word, gender, plural)

    def _noun(self, name: str, scope: str) -> tuple[str, str, bool]:
        """A noun without its article, its gender, and whether it is plural."""
        text = self.say(self.scene.entry(name, scope).spanish, scope + name)
        if _section(name) not in NOUNS:
            return text, "m", False
        article, _, noun = text.partition(" ")
        gender, plural = ("f" if article in {"la", "las"} else "m"), article in {"los", "las"}
        if name.endswith("+") and not plural:
            noun, plural = grammar.pluralise(noun), True
        return noun, gender, plural

    def _noun_phrase(self, determiner: str = "", *, name: str, scope: str) -> str:
        noun, gender, plural = self._noun(name, scope)
        if determiner == "mi" or (determiner == "de" and self.scene.subject.english in PRONOUNS):
            determiner = grammar.POSSESSIVES[self.person]
        elif determiner == "de":
            return f"{grammar.decline('el', gender, plural)} {noun} de {self.subject}"
        return f"{grammar.decline(determiner, gender, plural) if determiner else ''} {noun}"


def compose(rng: random.Random) -> Sentence:
    """A sentence of a random pattern."""
    english, spanish = rng.choice(PATTERNS)
    scene = Scene(rng, english)
    said = English(scene).say(english)
    return Sentence(
        _tidy(re.sub(r"\ba (?=[aeiou])(?!uni|one)", "an ", said)),
        tuple(_tidy_spanish(Spanish(scene, variety).say(spanish)) for variety in (SPAIN, AMERICA)),
    )


def _tidy(text: str) -> str:
    """One space between words, none before punctuation, a capital letter at the start."""
    text = re.sub(r" (?=[,.?!])|(?<=[¿¡]) ", "", re.sub(r"\s+", " ", text).strip())
    return re.sub(r"[^\W\d_]", lambda letter: letter[0].upper(), text, count=1)


def _tidy_spanish(text: str) -> str:
    """Spanish also runs some words together (del, al), and says e for y before an i."""
    text = re.sub(r"\bde el\b", "del", re.sub(r"\ba el\b", "al", _tidy(text)))
    return re.sub(r"\by (?=i|hi[^e])", "e ", text)


def normalise(text: str) -> str:
    """What two sentences that a person would call the same have in common."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def sentences(seed: int) -> Iterator[Sentence]:
    """Sentences without end, none like an earlier one in English or in either Spanish."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        sentence = compose(rng)
        texts = {normalise(sentence.english), *map(normalise, sentence.spanish)}
        if seen.isdisjoint(texts):
            seen |= texts
            yield sentence
