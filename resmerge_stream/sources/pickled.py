"""A pickle read as data: numbers, texts, lists, and notes of what would be called. Nothing is.

torch keeps where its tensors lie in pickles. Python's reader imports whatever a pickle names and
calls it; here a name stays a name, and a call a note of it. So no pickle can run code, and no list
of harmless names has to be kept.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointFormatError

# The metadata of 700 tensors on a thousand processes have 60 MB, thirty operations a part.
MAX_BYTES = 100_000_000
_MOST_OPERATIONS = 30_000_000
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TO_MEMO, _OF_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


@dataclass(frozen=True, slots=True)
class Name:
    """Something that a pickle names, such as ``torch.Size``."""

    name: str


@dataclass(slots=True, eq=False)
class Made:
    """What a call would have made.

    Attributes:
        what: what would be called, by name; of a reference to another file: ``persistent``.
        args: with which arguments.
        state: what it would be given afterwards.
        items: pairs of key and value that would be put into it.
    """

    what: str
    args: tuple[Any, ...]
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes that its state gives it."""
        return texts(self.state)


class Pairs(list[tuple[Any, Any]]):
    """A dictionary as its pairs: keys may be anything, and none is hashed."""


def texts(value: object) -> dict[str, Any]:
    """Return what a dictionary holds under texts; nothing where it is none."""
    pairs = value.items if isinstance(value, Made) else value if isinstance(value, Pairs) else ()
    return {key: item for key, item in pairs if isinstance(key, str)}


def numbers(value: object) -> tuple[int, ...] | None:
    """Return sizes, offsets or strides as numbers from zero on; None where they are none."""
    if isinstance(value, Made) and value.what == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if isinstance(value, tuple | list) and all(type(one) is int and one >= 0 for one in value):
        return tuple(value)
    return None


def loads(data: bytes, *, where: str) -> Any:
    """Return what a pickle holds.

    Args:
        data: the pickle.
        where: what to call it in errors.

    Returns:
        Numbers, texts, bytes, lists and tuples as they are; dictionaries as `Pairs`; names as
        `Name`; and what a call would make as `Made`.

    Raises:
        CheckpointFormatError: it is none, is cut short, or is larger than any that torch writes.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointFormatError(f"{where} is larger than {MAX_BYTES} bytes.")
    try:
        return _run(data)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise CheckpointFormatError(
            f"{where} is not a pickle that torch writes, or is damaged ({type(exc).__name__})."
        ) from exc


def _run(data: bytes) -> Any:
    """Follow a pickle's operations; whatever does not fit raises one of Python's own errors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    def last(count: int) -> tuple[Any, ...]:
        if count > len(stack):
            raise IndexError(count)
        taken = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return taken

    for number, (operation, arg, _) in enumerate(pickletools.genops(data)):
        kind = operation.name
        if number > _MOST_OPERATIONS:
            raise OverflowError
        if kind in _NUMBERS:
            stack.append(arg)
        elif kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind])
        elif kind in _TO_MEMO:
            memo[int(str(arg))] = stack[-1]
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind in _OF_MEMO:
            stack.append(memo[int(str(arg))])
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind in _TUPLES:
            stack.append(last(_TUPLES[kind]))
        elif kind == "TUPLE":
            stack.append(tuple(since_mark()))
        elif kind in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif kind in ("LIST", "FROZENSET"):
            stack.append(since_mark())
        elif kind == "EMPTY_DICT":
            stack.append(Pairs())
        elif kind == "DICT":
            stack.append(_pairs(Pairs(), since_mark()))
        elif kind == "APPEND":
            (item,) = last(1)
            _extend(stack[-1], [item])
        elif kind in ("APPENDS", "ADDITEMS"):
            items = since_mark()
            _extend(stack[-1], items)
        elif kind == "SETITEM":
            _pairs(stack[-2 - 1], list(last(2)))
        elif kind == "SETITEMS":
            items = since_mark()
            _pairs(stack[-1], items)
        elif kind == "GLOBAL":
            stack.append(Name(".".join(str(arg).split(" "))))
        elif kind == "STACK_GLOBAL":
            module, name = last(2)
            stack.append(Name(f"{module}.{name}"))
        elif kind in ("REDUCE", "NEWOBJ"):
            what, args = last(2)
            stack.append(_made(what, args))
        elif kind == "NEWOBJ_EX":
            what, args, _ = last(3)
            stack.append(_made(what, args))
        elif kind == "BUILD":
            (state,) = last(1)
            if isinstance(stack[-1], Made):
                stack[-1].state = state
        elif kind == "BINPERSID":
            stack.append(Made("persistent", last(1)))
        elif kind == "POP":
            last(1)
        elif kind == "STOP":
            (value,) = last(1)
            return value
        elif kind not in ("PROTO", "FRAME"):
            raise ValueError(kind)
    raise ValueError("no end")


def _made(what: object, args: object) -> Any:
    """Return a note of a call; an ordered dictionary and a set are what they hold."""
    if not isinstance(args, tuple):
        raise TypeError
    name = what.name if isinstance(what, Name) else ""
    if name == "collections.OrderedDict" and not args:
        return Pairs()
    return Made(name, args)


def _extend(onto: Any, items: list[Any]) -> None:
    if isinstance(onto, list) and not isinstance(onto, Pairs):
        onto.extend(items)
    elif not isinstance(onto, Made):
        raise TypeError


def _pairs(onto: Any, items: list[Any]) -> Any:
    """Put keys and values, which take turns, into a dictionary."""
    if len(items) % 2:
        raise ValueError
    pairs = zip(items[::2], items[1::2], strict=True)
    if isinstance(onto, Pairs):
        onto.extend(pairs)
    elif isinstance(onto, Made):
        onto.items.extend(pairs)
    else:
        raise TypeError
    return onto
