"""As much English and Spanish grammar as the demo's corpus needs: conjugation, agreement and spelling.

Persons are numbered as in a Spanish textbook: 0 yo, 1 tú, 2 él or ella, 3 nosotros, 4 vosotros, 5 ellos.
Rules give the regular forms; only what they get wrong is listed.
"""

from __future__ import annotations

import re
from functools import cache


def _table(text: str) -> dict[str, str]:
    """`"hacer haz, ir ve"` as a dictionary: the first word of each entry is its key."""
    return dict(entry.split(maxsplit=1) for entry in " ".join(text.split()).split(", "))


# --- Spanish verbs ---------------------------------------------------------------------------------------------------

ENDINGS = {  # tense -> endings of -ar, -er and -ir verbs
    "present": ("o as a amos áis an", "o es e emos éis en", "o es e imos ís en"),
    "preterite": ("é aste ó amos asteis aron", "í iste ió imos isteis ieron", "í iste ió imos isteis ieron"),
    "imperfect": ("aba abas aba ábamos abais aban", "ía ías ía íamos íais ían", "ía ías ía íamos íais ían"),
    "subjunctive": ("e es e emos éis en", "a as a amos áis an", "a as a amos áis an"),
}
ADDED_TO_INFINITIVE = {"future": "é ás á emos éis án", "conditional": "ía ías ía íamos íais ían"}
STRONG_ENDINGS = "e iste o imos isteis ieron"
STRESSED_STEM = _table(  # in forms that carry the stress on the stem
    """acostar acuest, almorzar almuerz, aprobar aprueb, calentar calient, cerrar cierr, dormir duerm, empezar empiez,
    encender enciend, encontrar encuentr, enviar enví, fregar frieg, jugar jueg, pedir pid, perder pierd, poder pued,
    preferir prefier, probar prueb, querer quier, regar rieg, reprobar reprueb, sentar sient, tender tiend,
    tener tien"""
)
RAISED_STEM = _table("dormir durm, pedir pid")  # in third persons of the preterite, the gerund, the subjunctive
FIRST_PERSON = _table(
    """coger cojo, conducir conduzco, dar doy, estar estoy, hacer hago, ir voy, nacer nazco, poner pongo,
    recoger recojo, ser soy, tener tengo, ver veo"""
)
STRONG_PRETERITE = _table("conducir conduj, estar estuv, hacer hic, poder pud, poner pus, querer quis, tener tuv")
SHORT_FUTURE = _table("hacer har, poder podr, poner pondr, querer querr, tener tendr")
PARTICIPLE = _table(
    """abrir abierto, escribir escrito, hacer hecho, imprimir impreso, inscribir inscrito, poner puesto, romper roto,
    ver visto"""
)
IMPERATIVE = _table("hacer haz, ir ve, poner pon, tener ten")
IRREGULAR = _table(
    """dar-preterite di diste dio dimos disteis dieron, dar-present doy das da damos dais dan,
    dar-subjunctive dé des dé demos deis den, estar-present estoy estás está estamos estáis están,
    haber-present he has ha hemos habéis han, ir-imperfect iba ibas iba íbamos ibais iban,
    ir-present voy vas va vamos vais van, ir-preterite fui fuiste fue fuimos fuisteis fueron,
    ir-subjunctive vaya vayas vaya vayamos vayáis vayan, ser-imperfect era eras era éramos erais eran,
    ser-present soy eres es somos sois son, ver-imperfect veía veías veía veíamos veíais veían,
    ver-present veo ves ve vemos veis ven, ver-preterite vi viste vio vimos visteis vieron"""
)
REFLEXIVE = ("me", "te", "se", "nos", "os", "se")
ACCENTED = dict(zip("aeiou", "áéíóú", strict=True))
PLAIN = dict(zip("áéíóú", "aeiou", strict=True))


def conjugate(infinitive: str, form: str, person: int) -> str:
    """The verb group of one Spanish verb, reflexive pronoun included: `("lavarse", "perfect", 0)` -> "me he lavado"."""
    verb = infinitive.removesuffix("se")
    pronoun = REFLEXIVE[person] if verb != infinitive else ""
    if form == "infinitive":
        return verb + pronoun
    if form == "going":
        return f"{_finite('ir', 'present', person)} a {verb}{pronoun}"
    if form == "imperative":
        return _imperative(verb, person, pronoun)
    if form == "perfect":
        group = f"{_finite('haber', 'present', person)} {_participle(verb)}"
    elif form == "progressive":
        group = f"{_finite('estar', 'present', person)} {_gerund(verb)}"
    else:
        group = _finite(verb, form, person)
    return f"{pronoun} {group}".strip()


@cache
def _finite(verb: str, tense: str, person: int) -> str:
    if irregular := IRREGULAR.get(f"{verb}-{tense}"):
        return irregular.split()[person]
    if tense in ADDED_TO_INFINITIVE:
        return SHORT_FUTURE.get(verb, verb) + ADDED_TO_INFINITIVE[tense].split()[person]
    if tense == "present" and person == 0 and verb in FIRST_PERSON:
        return FIRST_PERSON[verb]
    if tense == "preterite" and verb in STRONG_PRETERITE:
        form = STRONG_PRETERITE[verb] + STRONG_ENDINGS.split()[person]
        return form.replace("hico", "hizo").replace("jieron", "jeron")
    ending = ENDINGS[tense][("ar", "er", "ir").index(verb[-2:])].split()[person]
    stem = _stem(verb, tense, person)
    if tense == "preterite" and verb[-2] != "a" and stem[-1] in "aeo":  # leíste, leyó, leyeron
        ending = ending.replace("i", "y" if person in {2, 5} else "í", 1)
    if verb[-2] == "a" and ending[0] in "eé":  # the consonant keeps its sound: saqué, llegué, crucé
        for letter, respelled in (("c", "qu"), ("g", "gu"), ("z", "c")):
            if stem.endswith(letter):
                return stem[:-1] + respelled + ending
    return stem + ending


def _stem(verb: str, tense: str, person: int) -> str:
    stem = verb[:-2]
    stressed = person not in {3, 4}
    if tense == "subjunctive" and verb in FIRST_PERSON:
        return FIRST_PERSON[verb][:-1]
    if tense in {"present", "subjunctive"} and stressed:
        return STRESSED_STEM.get(verb, stem)
    if tense == "subjunctive" or (tense == "preterite" and person in {2, 5}):
        return RAISED_STEM.get(verb, stem)
    return stem


def _imperative(verb: str, person: int, pronoun: str) -> str:
    """An affirmative order to one (1), to several as in Spain (4) or to several as in America (5)."""
    if person == 4:
        return verb[:-1] + (pronoun or "d")
    form = _finite(verb, "subjunctive", 5) if person == 5 else IMPERATIVE.get(verb, _finite(verb, "present", 2))
    vowels = [match.end() - 1 for match in re.finditer("[aeiou]+", form)]
    if pronoun and len(vowels) > 1:  # with a syllable more, a stress that stays in its place is written
        at = vowels[-2]
        form = form[:at] + ACCENTED[form[at]] + form[at + 1 :]
    return form + pronoun


def _participle(verb: str) -> str:
    stem = verb[:-2]
    regular = "ado" if verb[-2] == "a" else "ído" if stem[-1:] in {"a", "e", "o"} else "ido"
    return PARTICIPLE.get(verb, stem + regular)


def _gerund(verb: str) -> str:
    stem = RAISED_STEM.get(verb, verb[:-2])
    return stem + ("ando" if verb[-2] == "a" else "yendo" if stem[-1:] in {"", "a", "e", "o"} else "iendo")


# --- Spanish nouns and adjectives ------------------------------------------------------------------------------------

DETERMINERS = {  # masculine, feminine, their plurals
    "el": ("el", "la", "los", "las"),
    "un": ("un", "una", "unos", "unas"),
    "este": ("este", "esta", "estos", "estas"),
}
POSSESSIVES = ("mi", "tu", "su", "nuestro", "vuestro", "su")
THIRD_PLURAL = _table("cuesta cuestan, duele duelen, es son, estaba estaban, está están, vale valen")


def decline(word: str, gender: str, plural: bool) -> str:
    """A determiner, adjective or verb that agrees with a noun: `("nuevo", "f", True)` -> "nuevas"."""
    if word in THIRD_PLURAL:
        return THIRD_PLURAL[word] if plural else word
    if word in DETERMINERS:
        return DETERMINERS[word][2 * plural + (gender == "f")]
    if gender == "f":
        word = re.sub("o$", "a", word) if word[-1] == "o" else re.sub("([dst]or)$", r"\1a", word)
    return pluralise(word) if plural else word


def pluralise(noun: str) -> str:
    """The plural of a Spanish noun or adjective; of several words, the first changes."""
    head, *rest = noun.split(" ", 1)
    if head[-1] in "aeiouáéó":
        head += "s"
    elif head[-1] == "z":
        head = head[:-1] + "ces"
    elif match := re.fullmatch("(.*)([áéíóú])([ns])", head):  # the stress no longer needs its accent: camiones
        head = match[1] + PLAIN[match[2]] + match[3] + "es"
    elif head[-1] != "s":
        head += "es"
    return " ".join([head, *rest])


# --- English ---------------------------------------------------------------------------------------------------------

ENGLISH_VERBS = _table(  # past, participle
    """be was been, break broke broken, buy bought bought, catch caught caught, cut cut cut, do did done,
    drink drank drunk, drive drove driven, eat ate eaten, feed fed fed, find found found, fly flew flown,
    get got gotten, give gave given, go went gone, have had had, leave left left, lose lost lost, make made made,
    meet met met, pay paid paid, put put put, quit quit quit, read read read, ride rode ridden, run ran run,
    see saw seen, sell sold sold, send sent sent, set set set, sit sat sat, sleep slept slept, speak spoke spoken,
    stand stood stood, sweep swept swept, swim swam swum, take took taken, think thought thought,
    throw threw thrown, wear wore worn, withdraw withdrew withdrawn, write wrote written"""
)
DOUBLED = {"chat", "cut", "get", "mop", "put", "quit", "run", "set", "sit", "swim"}  # getting, mopped
IRREGULAR_ENGLISH = _table(
    """be-present am are is are are are, be-past was were was were were were,
    aren't-present am_not aren't isn't aren't aren't aren't, do-present do do does do do do,
    don't-present don't don't doesn't don't don't don't, have-present have have has have have have,
    haven't-present haven't haven't hasn't haven't haven't haven't"""
)
ENGLISH_AGREEMENT = _table("is are, was were, does do, this these")
ENGLISH_PLURALS = {"a child": "children"}


def english_verb(verb: str, form: str, person: int) -> str:
    """One English verb form: `("buy", "past", 0)` -> "bought"; `("aren't", "present", 0)` -> "am not"."""
    if irregular := IRREGULAR_ENGLISH.get(f"{verb}-{form}"):
        return irregular.split()[person].replace("_", " ")
    if form == "present":
        return _with_s(verb) if person == 2 else verb
    if form == "gerund":
        return re.sub("(?<=.[^e])e$", "", _doubled(verb)) + "ing"  # making, but seeing and being
    if form in {"past", "participle"}:
        if verb in ENGLISH_VERBS:
            return ENGLISH_VERBS[verb].split()[form == "participle"]
        return re.sub("([^aeiou])yed$", r"\1ied", _doubled(verb).removesuffix("e") + "ed")
    return verb


def _doubled(verb: str) -> str:
    return verb + verb[-1] if verb in DOUBLED else verb


def _with_s(word: str) -> str:
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|sh|ch|x|ato|go|do)$", word) and word != "avocado" else "s")


def english_plural(noun: str) -> str:
    """The plural of an English noun, without its article; of several words, the last changes."""
    return ENGLISH_PLURALS.get(noun) or _with_s(re.sub("^an? ", "", noun))


def english_agreement(word: str, plural: bool) -> str:
    """A verb, "this" or a noun in the number given: `("costs", True)` -> "cost", `("a nurse", True)` -> "nurses"."""
    if not plural:
        return word
    if re.match("an? ", word):
        return english_plural(word)
    return ENGLISH_AGREEMENT.get(word) or word.removesuffix("s")
