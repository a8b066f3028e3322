"""The Space's page for everybody: screen readers, the keyboard, a phone; and no token in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from loopback_hub.accounts import Accounts
from tests.support.space_pages import Visit
from tests.support.space_runs import Town

Visitors = Callable[..., Visit]
PHONE = {"width": 380, "height": 780}


@pytest.mark.slow
def test_every_control_has_a_name(visit: Visitors) -> None:
    """A screen reader has a name for whatever can be acted on, in every state of the page."""
    guest = visit()

    guest.example()
    guest.plan()
    guest.page.get_by_text("Here and on other hardware", exact=True).click()
    guest.merge()
    guest.expect_state("Done")
    guest.page.get_by_text("Log", exact=True).click()
    unnamed = {"Merge": guest.unnamed_controls()}
    for tab in ("My jobs", "Explore", "From code"):
        guest.tab(tab)
        unnamed[tab] = guest.unnamed_controls()

    assert not any(unnamed.values()), unnamed


@pytest.mark.slow
def test_the_keyboard_is_enough(visit: Visitors) -> None:
    """With Tab and Enter alone the form is reached past the head, and the example is merged."""
    guest = visit()

    press_until(guest, "Skip to the form", most=1)
    guest.page.keyboard.press("Enter")
    press_until(guest, "Plan", most=13)  # each of its fields and lists once
    # A list that Tab left open would cover the form.
    expect(guest.page.get_by_role("option")).to_have_count(0)
    guest.open()
    press_until(guest, "Try the example", most=12)
    guest.page.keyboard.press("Enter")

    guest.expect_state("Done")


def press_until(guest: Visit, name: str, *, most: int) -> None:
    """Press Tab until a control of that name has the focus, so many times at most."""
    focused = "document.activeElement ? document.activeElement.innerText.trim() : ''"
    for _ in range(most):
        guest.page.keyboard.press("Tab")
        if guest.page.evaluate(focused) == name:
            return
    raise AssertionError(f"{name!r} is not reached with {most} times Tab")


@pytest.mark.slow
def test_nothing_sticks_out_on_a_phone(visit: Visitors) -> None:
    """On a narrow screen the page scrolls down only, with a plan and a result on it too."""
    guest = visit(viewport=PHONE, has_touch=True)

    before = guest.overflow()
    guest.example()
    guest.plan()
    planned = guest.overflow()
    guest.merge()
    guest.expect_state("Done")

    assert (before, planned, guest.overflow()) == (0, 0, 0)


@pytest.mark.slow
def test_the_browser_keeps_no_token(
    visit: Visitors, town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sign-in gave the Space is in no page, storage, script-readable cookie, file or log."""
    given: list[str] = []
    real = Accounts.add_app_token

    def noting(*args: object, **kwargs: object) -> str:
        given.append(real(*args, **kwargs))  # type: ignore[arg-type]
        return given[-1]

    monkeypatch.setattr(Accounts, "add_app_token", noting)
    alice = visit("alice")
    alice.start("signed-in")
    alice.expect_state("Done")

    page = alice.page
    seen = [
        page.content(),
        page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])"),
        town.space.log.read_text(),
    ]
    assert len(given) == 1
    assert not [text for text in seen if given[0] in text]
    assert not holding(town.space.folder, given[0])


def holding(folder: Path, secret: str) -> list[Path]:
    """The files below a folder that a secret is in."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]
