"""Numbers by patterns of module names, as PEFT matches them, in bounded time whatever they say.

PEFT asks ``re.match(rf"(.*\\.)?({key})$", module)`` of one key after the other, and takes the first
that matches. Nearly all keys are names, which are looked up by the ends of a module's name (so
their dots are dots). The others are parsed as Python parses them, and run as sets of states
(Thompson 1968): nothing is tried twice, so time grows with the pattern times the name.
"""

import re
from collections.abc import Mapping
from re import _constants as c  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, Generic, TypeVar

_V = TypeVar("_V")
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
_MAX_STATES = 2_000
# Of all patterns and names together: seconds.
_MAX_STEPS = 10_000_000

_CATEGORIES = {
    c.CATEGORY_DIGIT: str.isdecimal,
    c.CATEGORY_SPACE: str.isspace,
    c.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
}
_CATEGORIES |= {
    c.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    c.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    c.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}


class Patterns(Generic[_V]):
    """Values by pattern; the first that a module's name matches counts.

    Args:
        values: by PEFT's keys, in order.

    Raises:
        ValueError: a key is no regex, or not one that is matched here; says which and why.
    """

    def __init__(self, values: Mapping[str, _V]) -> None:
        self._values = list(values.items())
        self._names: dict[str, int] = {}
        self._machines: list[tuple[int, _Machine]] = []
        self._steps = 0
        for number, key in enumerate(values):
            if _NAME.fullmatch(key):
                self._names.setdefault(key, number)
                continue
            try:
                self._machines.append((number, _Machine(rf"(.*\.)?({key})$")))
            except (re.error, OverflowError, RecursionError) as exc:
                raise ValueError(
                    f"the pattern {key[:80]!r}, which is not a regex that PEFT can use: {exc}"
                ) from exc
            except ValueError as exc:
                raise ValueError(f"the pattern {key[:80]!r}, {exc}") from exc

    def get(self, module: str, default: _V) -> _V:
        """Return the value for a module's name.

        Raises:
            ValueError: so many patterns take more time than any real adapter's.
        """
        ends = (i for i in range(len(module)) if i == 0 or module[i - 1] == ".")
        found = [self._names[module[i:]] for i in ends if module[i:] in self._names]
        first = min(found, default=len(self._values))
        for number, machine in self._machines:
            if number > first:
                break
            self._steps += len(module)
            if machine.matches(module):
                first = number
                break
            if self._steps + machine.steps > _MAX_STEPS:
                raise ValueError("patterns that take too long to be matched")
        return self._values[first][1] if first < len(self._values) else default


class _Machine:
    """A regex as states: each reads a character, or stands for others at once."""

    def __init__(self, pattern: str) -> None:
        self._reads: list[Any] = []  # what a state reads: a test of a character, or None
        self._next: list[list[int]] = []
        self._at: list[Any] = []  # where it may be entered only: an AT code, or None
        self._moves: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self.steps = 0
        tree = _parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE.value:
            raise ValueError("which sets flags for all of itself")
        self._end = self._state()
        self._start = self._sequence(list(tree), self._end)

    def matches(self, name: str) -> bool:
        """Return whether the regex matches from the beginning of a name on."""
        states = self._closed({self._start}, name, 0)
        for place, char in enumerate(name):
            if self._end in states or not states:
                break
            # What stands next to the end is not the same as elsewhere.
            is_last = place + 2 >= len(name)
            moved = None if is_last else self._moves.get((states, char))
            if moved is None:
                self.steps += len(states)
                entered = {
                    n
                    for s in states
                    if self._reads[s] is not None and self._reads[s](char)
                    for n in self._next[s]
                }
                moved = self._closed(entered, name, place + 1)
                if not is_last:
                    self._moves[states, char] = moved
            states = moved
        return self._end in states

    def _closed(self, states: set[int], name: str, place: int) -> frozenset[int]:
        """Return the states that are reached without reading."""
        waiting, found = list(states), set[int]()
        while waiting:
            state = waiting.pop()
            if state in found or not _holds(self._at[state], name, place):
                continue
            found.add(state)
            self.steps += 1
            if self._reads[state] is None:
                waiting += self._next[state]
        return frozenset(found)

    def _state(self, *after: int, reads: Any = None, at: Any = None) -> int:
        if len(self._reads) >= _MAX_STATES:
            raise ValueError("too complicated to be matched")
        self._reads.append(reads)
        self._next.append(list(after))
        self._at.append(at)
        return len(self._reads) - 1

    def _sequence(self, items: list[Any], after: int) -> int:
        for op, argument in reversed(items):
            after = self._item(op, argument, after)
        return after

    def _item(self, op: Any, argument: Any, after: int) -> int:
        """Return the state that begins an item of a parsed regex, and goes on after it."""
        if op in _TESTS:
            return self._state(after, reads=_TESTS[op](argument))
        if op is c.AT and argument in _PLACES:
            return self._state(after, at=argument)
        if op is c.BRANCH:
            return self._state(*(self._sequence(list(one), after) for one in argument[1]))
        if op is c.SUBPATTERN and not argument[1] and not argument[2]:
            return self._sequence(list(argument[3]), after)
        if op in (c.MAX_REPEAT, c.MIN_REPEAT):
            low, high, inner = argument
            if high is c.MAXREPEAT:
                again = self._state(after)
                self._next[again].append(self._sequence(list(inner), again))
                after = again
            else:
                for _ in range(high - low):
                    after = self._state(after, self._sequence(list(inner), after))
            for _ in range(low):
                # A state a turn, so that turns of nothing end too.
                after = self._sequence(list(inner), self._state(after))
            return after
        raise ValueError(f"which has {str(op).lower().replace('_', ' ')}, not matched here")


def _holds(at: Any, name: str, place: int) -> bool:
    """Return whether a place in a name is one where a state may be entered."""
    if at in (c.AT_BEGINNING, c.AT_BEGINNING_STRING):
        return place == 0
    if at is c.AT_END:
        return name[place:] in ("", "\n")
    return at is None or place == len(name)


def _is_in(items: list[Any]) -> Any:
    """Return the test that a set in brackets stands for."""
    is_negated = bool(items) and items[0][0] is c.NEGATE
    tests = [_TESTS[op](argument) for op, argument in items[is_negated:]]
    return lambda char: any(test(char) for test in tests) is not is_negated


_PLACES = (c.AT_BEGINNING, c.AT_BEGINNING_STRING, c.AT_END, c.AT_END_STRING)
_TESTS: dict[Any, Any] = {
    c.LITERAL: lambda code: lambda char: ord(char) == code,
    c.NOT_LITERAL: lambda code: lambda char: ord(char) != code,
    c.ANY: lambda _: lambda char: char != "\n",
    c.RANGE: lambda ends: lambda char: ends[0] <= ord(char) <= ends[1],
    c.CATEGORY: lambda category: _CATEGORIES[category],
    c.IN: _is_in,
}
