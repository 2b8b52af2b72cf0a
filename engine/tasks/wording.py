"""Templates and words of the contrasts, of our own making, and how pairs are drawn of them.

A field of a template stands for a word with the space before it: what differs between a prompt and its partner, or is
asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations, product
from random import Random
from typing import NamedTuple, TypeAlias

from engine.tasks import pairs

# How many tokens a text has more with what follows it; 0 where its own become others.
Added: TypeAlias = Callable[[str, str], int]

NAMES = """
Mary John Tom Anna James Peter Alice Robert Sarah David Laura Emma Paul Kate Simon Lucy Henry Jane Michael Susan George
Helen Julia Andrew Martin Rachel Kevin Diana Adam Sophie Daniel Emily Eric Linda Jack Claire Steve Maria Brian Lisa
Oscar Nancy Philip Charles Karen Joe Amy Ben Max Ellen Sam Alex Chris Nick Matt Tim Jim Bob Dan Ryan Jason Scott Thomas
William Richard Edward Elizabeth Margaret Jennifer Jessica Barbara Patricia
"""
PLACES = "station market office library hospital school airport museum garden harbor restaurant theater"
THINGS = "book letter ticket key ring camera map guitar lamp basket watch phone"
IOI = (
    "When{names} got to the {place},{{S2}} handed the {thing} to",
    "After{names} had lunch at the {place},{{S2}} gave the {thing} to",
    "While{names} were waiting at the {place},{{S2}} passed the {thing} to",
    "Yesterday{names} met at the {place}, and{{S2}} lent the {thing} to",
    "Before{names} left the {place},{{S2}} showed the {thing} to",
    "Once{names} were home from the {place},{{S2}} sent the {thing} to",
    "Then{names} talked for an hour at the {place}, and{{S2}} offered the {thing} to",
    "As soon as{names} sat down in the {place},{{S2}} brought the {thing} to",
)
ORDERS = ("{IO} and{S1}", "{S1} and{IO}")  # ABBA and BABA

EVENTS = """
war siege famine voyage reign trial strike drought revolt expedition campaign conflict dispute project festival journey
rebellion occupation construction negotiation
"""
GREATER_THAN = (
    "The {event} lasted from the year {century}{start} to the year {century}",
    "The {event} began in the year {century}{start} and ended in the year {century}",
    "The {event} went on from {century}{start} until {century}",
)

NOUNS = """
author teacher doctor driver king farmer boy girl student lawyer artist actor singer soldier manager player guard bird
horse dog cat car truck house tree road table chair door window bridge book letter picture boat tower school garden
river hill shop store key
"""
PREPOSITIONS = ("near", "behind", "beside", "next to")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))

FACTS = (
    "The capital of{subject} is the city of",
    "The capital city of{subject} is called",
    "Everyone knows that the capital of{subject} is",
)
WITH_ARTICLE = ("Maldives", "Netherlands", "Philippines", "United Arab Emirates", "United Kingdom")


class Drawn(NamedTuple):
    """A template, what its fields are in the prompt and in its partner, and the two answers."""

    template: str
    clean: dict[str, str]
    source: dict[str, str]
    target: str
    other: str


def ioi(draw: Random, added: Added, flipped: bool = False) -> Iterator[Drawn]:
    """Every two names once. The partner has three other names, or (flipped) the other of the two as its subject."""
    names = [f" {name}" for name in NAMES.split() if added("When", f" {name}") == 1]
    if len(names) < 5:
        raise ValueError(f"ioi needs 5 names of one token, the tokenizer has {len(names)} of {len(NAMES.split())}")
    people = list(permutations(names, 2))
    draw.shuffle(people)
    for io, s in people:
        scene = dict(place=draw.choice(PLACES.split()), thing=draw.choice(THINGS.split()))
        template = draw.choice(IOI).format(names=draw.choice(ORDERS), **scene)
        strangers = draw.sample([name for name in names if name not in (io, s)], 3)
        source = (io, s, io) if flipped else strangers
        yield Drawn(template, dict(IO=io, S1=s, S2=s), dict(zip(("IO", "S1", "S2"), source, strict=True)), io, s)


def greater_than(draw: Random, added: Added) -> Iterator[Drawn]:
    """Years of the decades 2 to 8; answers a decade later and earlier, of which the first digit says all.

    The partner begins in the year 01, after which both answers are right.
    """
    n_tokens = added("The war lasted from the year 17", "32")
    if n_tokens not in (1, 2):
        raise ValueError("greater_than needs years that end in one or two tokens: the tokenizer cuts 1732 elsewhere")
    fields = ("year",) if n_tokens == 1 else ("decade", "year")
    start = "".join(f"{{{field}}}" for field in fields)
    drawn = list(product(GREATER_THAN, EVENTS.split(), range(11, 19), range(2, 9), range(1, 10)))
    draw.shuffle(drawn)
    for template, event, century, decade, one in drawn:
        # Of two digits by themselves, or each digit: as the tokenizer has it.
        year, later, earlier, corrupted = (
            [digits] if n_tokens == 1 else list(digits)
            for digits in (f"{decade}{one}", f"{decade + 1}{one}", f"{decade - 1}{one}", "01")
        )
        clean, source = (dict(zip(fields, some, strict=True)) for some in (year, corrupted))
        yield Drawn(template.format(event=event, century=century, start=start), clean, source, later[0], earlier[0])


def agreement(draw: Random, added: Added) -> Iterator[Drawn]:
    """A noun of the other number stands between subject and verb; the partner's subject has that number too."""
    nouns = [noun for noun in NOUNS.split() if added("The", f" {noun}") == added("The", f" {noun}s") == 1]
    if len(nouns) < 2:
        many = len(NOUNS.split())
        raise ValueError(
            f"agreement needs 2 nouns of one token in both numbers, the tokenizer has {len(nouns)} of {many}"
        )
    drawn = list(product(permutations(nouns, 2), PREPOSITIONS, (False, True)))
    draw.shuffle(drawn)
    for (subject, attractor), near, plural in drawn:
        forms, verbs = (f" {subject}", f" {subject}s"), draw.choice(VERBS)
        between = dict(attractor=f" {attractor}" if plural else f" {attractor}s")
        clean, source = dict(subject=forms[plural], **between), dict(subject=forms[not plural], **between)
        yield Drawn(f"The{{subject}} {near} the{{attractor}}", clean, source, verbs[plural], verbs[not plural])


def facts(draw: Random, added: Added) -> Iterator[Drawn]:
    """Countries whose capital is one token; the partner is another whose name has as many."""
    begin, end = FACTS[0].split("{subject}")
    known: dict[int, list[tuple[str, str]]] = {}
    for country, capital in pairs.load("capitals").pairs:
        subject = f" the {country}" if country in WITH_ARTICLE else f" {country}"
        if added(f"{begin}{subject}{end}", f" {capital}") == 1:
            known.setdefault(added(begin, subject), []).append((subject, f" {capital}"))
    drawn = [(template, *fact, alike) for template in FACTS for alike in known.values() for fact in alike]
    draw.shuffle(drawn)
    for template, subject, capital, alike in drawn:
        if others := [fact for fact in alike if fact[0] != subject]:
            instead, other = draw.choice(others)
            yield Drawn(template, dict(subject=subject), dict(subject=instead), capital, other)


DRAWN: dict[str, Callable[[Random, Added], Iterator[Drawn]]] = {
    "ioi": ioi,
    "ioi_flipped": partial(ioi, flipped=True),
    "greater_than": greater_than,
    "agreement": agreement,
    "facts": facts,
}
