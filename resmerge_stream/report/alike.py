"""Which experts have the same values: groups, and what two places say together. Plain data."""

from collections.abc import Iterable

# Experts by number, in groups of at least two; nobody is in two of them.
Groups = tuple[tuple[int, ...], ...]


def groups_of(parts: Iterable[Iterable[int]]) -> Groups:
    """Return parts that have nobody in common as groups, in order; who is alone is in none."""
    every = (tuple(sorted(part)) for part in parts)
    return tuple(sorted(group for group in every if len(group) > 1))


def together(one: Groups, other: Groups) -> Groups:
    """Return the groups of those who are in one group both times."""
    where = {number: i for i, group in enumerate(other) for number in group}
    parts: dict[tuple[int, int], list[int]] = {}
    for i, group in enumerate(one):
        for number in group:
            if number in where:
                parts.setdefault((i, where[number]), []).append(number)
    return groups_of(parts.values())
