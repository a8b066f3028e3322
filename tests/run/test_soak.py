"""The soak itself: it draws the same cases again, and finds what is broken."""

from pathlib import Path

import pytest

from benchmarks.soak import GROUPS, METHODS, TROUBLES, Case, Soak

# Of seed 0: a full disk, with Xet storage.
CASES = (20,)


def test_a_case_is_drawn_from_seed_and_number_alone() -> None:
    """So that its number repeats it; other numbers draw others."""
    cases = [Case.drawn(7, number) for number in range(300)]

    assert cases == [Case.drawn(7, number) for number in range(300)]
    assert {case.group for case in cases} == set(GROUPS)
    assert {word for case in cases for word in case.merging} >= set(METHODS)
    assert {trouble for case in cases for trouble in case.troubles} == set(TROUBLES)


@pytest.mark.slow
@pytest.mark.parametrize("number", CASES)
def test_what_must_hold_does(number: int, tmp_path: Path) -> None:
    """A few cases of the long soak."""
    assert Soak(tmp_path).run(number) == []


@pytest.mark.slow
def test_a_broken_promise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is expected is not what is published, the soak says which file."""
    calm = Soak.calm

    def other(soak: Soak, case: Case) -> dict[str, bytes]:
        return {**calm(soak, case), "config.json": b"{}"}

    monkeypatch.setattr(Soak, "calm", other)

    assert Soak(tmp_path).run(5) == ["config.json has other bytes"]
