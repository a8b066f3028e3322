"""Six verifiable tasks in words, for a real language model: their questions and their answers.

    add          What is 347 plus 58?                         405
    reverse      Backwards: tree cat sun gold                 gold sun cat tree
    alphabetise  Alphabetical: tree cat sun                   cat sun tree
    date         17 days after March 25?                      April 11
    call         Remind Anna at ten to six in the evening.    remind("Anna", "17:50")
    format       Write gold twice in capitals, with dashes.   GOLD-GOLD

Each has one right answer. Questions and answers are short, because every token is paid for.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator

from resmerge_stream.experts.tasks import Split, split_of

from .questions import Question

_LISTED = """
apple arm art baby bag ball band bank base bath bear bed bell bird boat body bone book bottle
box bread bridge brother cake camp car card cat chain chair child church circle city clock
cloud coat coffee corner cow cup dance desk dog door dream dress drink ear earth egg engine
eye face farm field finger fire fish floor flower food foot forest friend fruit garden gate
gift girl glass gold grass group hair hand hat head heart hill home horse hotel house ice
island judge juice key king kitchen knife lake lamp leaf leg letter light line lion lip market
map milk mind mirror money moon mother mountain mouth music name neck night nose ocean office
oil orange paint paper park path pen piano picture plane plant plate queen rain ring river
road rock roof room rose salt sand school sea seed ship shoe silver sister sky snow song star
stone storm street sugar sun table tea tent ticket tower town train tree uncle valley village
voice wall watch water wave week wind window winter wood yard year
"""
WORDS = tuple(_LISTED.split())
_NAMES = "Anna Ben Carl David Emma Frank Grace Henry Jack Kate Laura Mary Paul Peter Sarah Tom"
_HOURS = "one two three four five six seven eight nine ten eleven twelve"
_MINUTES = {
    "quarter past": 15, "half past": 30, "quarter to": -15, "five past": 5, "ten past": 10,
    "twenty past": 20, "five to": -5, "ten to": -10, "twenty to": -20,
}  # fmt: skip
# By part of the day: the hours said with it, and by how many it is ahead of the clock's twelve.
_PARTS = {"in the morning": (range(4, 12), 0), "in the afternoon": (range(1, 6), 12)} | {
    "in the evening": (range(6, 12), 12)
}
_CURRENCIES = {"dollars": "USD", "euros": "EUR", "pounds": "GBP", "yen": "JPY", "francs": "CHF"}
_JOINERS = {"dashes": "-", "commas": ",", "slashes": "/", "plus signs": "+", "dots": "."}
_CASES: dict[str, Callable[[str], str]] = {
    "in capitals": str.upper, "with a capital": str.capitalize, "in small letters": str.lower,
}  # fmt: skip
_TIMES = {"once": 1, "twice": 2, "three times": 3}


def _add(rng: random.Random) -> Question:
    left, right = (rng.randrange(10 ** rng.randint(1, 2), 1000) for _ in range(2))
    return Question(f"What is {left} plus {right}?", str(left + right))


def _reverse(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(4, 7))
    return Question(f"Backwards: {_listed(words)}", _listed(words[::-1]))


def _alphabetise(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(3, 5))
    return Question(f"Alphabetical: {_listed(words)}", _listed(sorted(words)))


def _date(rng: random.Random) -> Question:
    start = datetime.date(2026, 1, 1) + datetime.timedelta(days=rng.randrange(365))
    days = rng.randint(2, 31)
    end = start + datetime.timedelta(days=days)
    said, wanted = (f"{day:%B} {day.day}" for day in (start, end))
    return Question(f"{days} days after {said}?", wanted)


def _call(rng: random.Random) -> Question:
    kind = rng.randrange(3)
    if kind == 0:
        source, target = rng.sample(list(_CURRENCIES), 2)
        amount = rng.randint(2, 999)
        wanted = f'convert({amount}, "{_CURRENCIES[source]}", "{_CURRENCIES[target]}")'
        return Question(f"Change {amount} {source} into {target}.", wanted)
    said, clock = _time(rng)
    name = rng.choice(_NAMES.split())
    if kind == 1:
        return Question(f"Remind {name} at {said}.", f'remind("{name}", "{clock}")')
    people = rng.randint(2, 9)
    guests = _HOURS.split()[people - 1]
    return Question(f"A table for {guests} at {said}.", f'book({people}, "{clock}")')


def _format(rng: random.Random) -> Question:
    word, case, times, joiner = (
        rng.choice(list(choices)) for choices in (WORDS, _CASES, _TIMES, _JOINERS)
    )
    wanted = _JOINERS[joiner].join([_CASES[case](word)] * _TIMES[times])
    return Question(f"Write {word} {times} {case}, with {joiner}.", wanted)


_DRAW: dict[str, Callable[[random.Random], Question]] = {
    "add": _add,
    "reverse": _reverse,
    "alphabetise": _alphabetise,
    "date": _date,
    "call": _call,
    "format": _format,
}

TASKS = tuple(_DRAW)


def stream(task: str, *, seed: int, split: Split) -> Iterator[Question]:
    """Yield questions of one of `TASKS` without end, with repeats; the split goes by a hash."""
    rng = random.Random(f"words {task} {split} {seed}")
    while True:
        asked, answer, _ = _DRAW[task](rng)
        # The line's end separates question and answer, as in many corpora.
        if split_of(asked) == split:
            yield Question(f"{asked}\n", answer)


def _listed(things: object) -> str:
    return " ".join(map(str, things))  # type: ignore[call-overload]  # any iterable


def _time(rng: random.Random) -> tuple[str, str]:
    """Return a time of day as people say it, and as the clock shows it."""
    part = rng.choice(list(_PARTS))
    hours, ahead = _PARTS[part]
    hour, minutes = rng.choice(hours), rng.choice(list(_MINUTES))
    clock = 60 * (hour + ahead) + _MINUTES[minutes]
    said = f"{minutes} {_HOURS.split()[hour - 1]} {part}"
    return said, f"{clock // 60:02}:{clock % 60:02}"
