"""Sizes, times, prices and names as people read them."""

import re

from .errors import RecipeError

_UNITS = {"": 1, "B": 1}


for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power


def parse_size(text: str | int, *, name: str = "size") -> int:
    """Return a size in bytes from text such as ``5GB``, ``800MB``, ``12GiB`` or ``0``.

    Args:
        text: a number with an optional unit; KB, MB, GB, TB are powers of 1000 as on the Hub,
            KiB and so on powers of 1024. An integer is taken as bytes.
        name: what to call the value in an error.

    Raises:
        RecipeError: the text is not a size, or a few bytes, where a unit was forgotten.
    """
    compact = str(text).strip().upper().replace(" ", "").replace("_", "")
    digits = compact.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = compact[len(digits) :]
    try:
        number = float(digits)
    except ValueError:
        number = -1.0
    if unit not in _UNITS or not 0 <= number < 1e18:
        raise RecipeError(
            f"{name} {text!r} is not a size. Write a number and a unit, such as 5GB or 800MB.",
            field=name,
        )
    if not unit and isinstance(text, str) and 0 < number < 1000:
        raise RecipeError(
            f"{name} {text!r} would be {number:g} bytes. Did you mean {text.strip()}GB?", field=name
        )
    return int(number * _UNITS[unit])


def format_size(nbytes: float) -> str:
    """Return a size for people, in powers of 1000: ``942 MB``, ``15.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{int(nbytes)} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)")


def duration(text: str, *, name: str = "timeout", least: int = 60) -> int:
    """Return seconds from text such as ``90m``, ``2h``, ``1.5h`` or ``5400``.

    Args:
        text: a number with an optional unit; seconds without one.
        name: what to call the value in an error.
        least: seconds that it must be at least.

    Raises:
        RecipeError: the text is no duration.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = (
        float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else 0
    )
    if not least <= seconds <= 30 * 86400:
        raise RecipeError(
            f"{name} {text!r} is not a time from {least} s to 30 days. Write a number and a unit, "
            "such as 90m or 2h.",
            field=name,
        )
    return int(seconds)


def format_duration(seconds: float) -> str:
    """Return a time for people: ``12 s``, ``25 min``, ``4 h 20 min``, ``1 day 22 h``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return " ".join(_parts(divmod(minutes, 60), ("h", "min")))
    days, hours = divmod(round(minutes / 60), 24)
    return " ".join(_parts((days, hours), ("day" if days == 1 else "days", "h")))


def _parts(counts: tuple[int, int], words: tuple[str, str]) -> list[str]:
    """Return two counts with their units, without what is none."""
    return [f"{count} {word}" for count, word in zip(counts, words, strict=True) if count]


def dollars(amount: float) -> str:
    """Return a price for people: ``$0.07``, ``$120``; less than a cent is a cent."""
    amount = max(amount, 0.01) if amount > 0 else 0.0
    return f"${amount:.2f}" if amount < 100 else f"${amount:.0f}"


def printable(text: str, instead: str = " ", *, kept: str = "") -> str:
    """Return text without control characters: names come from strangers' files.

    Args:
        text: any.
        instead: stands for each.
        kept: those that stay, such as a line's end.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else instead for c in text)
