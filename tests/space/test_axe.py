"""What axe-core finds in every state of the page: nothing serious or critical."""

import importlib.resources
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.support.space_pages import Visit
from tests.support.space_runs import Town, wait_for

Visitors = Callable[..., Visit]
AXE = (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text()
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
# A colour is only seen when it has stopped changing.
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"


def found(visit: Visit) -> list[str]:
    """What hinders somebody seriously, wide and narrow, light and dark, and where it is first."""
    page, wide = visit.page, visit.page.viewport_size
    page.add_style_tag(content=STILL)
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(AXE)
    violations: list[str] = []
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        for dark in (False, True):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            # Of what axe looks at, only contrast depends on the colours.
            rules = ", runOnly: ['color-contrast']" if dark else ""
            results = page.evaluate(f"axe.run(document, {{resultTypes: ['violations']{rules}}})")
            violations += [
                f"{size['width']} px{', dark' * dark}: {each['id']} ({each['impact']}): "
                f"{each['nodes'][0]['html'][:160]}"
                for each in results["violations"]
                if each["impact"] in ("serious", "critical")
            ]
    page.evaluate("document.body.classList.remove('dark')")
    page.set_viewport_size(wide or WIDE)
    return violations


@pytest.mark.slow
def test_nothing_serious_is_found_in_any_state(visit: Visitors, town: Town) -> None:
    """From the empty form over plans, a merge and its result to every tab."""
    seen: dict[str, list[str]] = {}

    guest = visit()
    seen["empty form"] = found(guest)
    guest.example()
    guest.plan()
    guest.page.get_by_text("Here and on other hardware", exact=True).click()
    expect(guest.page.get_by_text("Advice.")).to_be_visible(timeout=60_000)
    seen["a plan with advice"] = found(guest)
    guest.advanced()
    seen["advanced"] = found(guest)
    guest.advanced()
    guest.choose("Expert 1", "no repository")
    guest.button("Plan").click()
    expect(guest.page.get_by_role("alert")).to_be_visible()
    seen["refused plan"] = found(guest)
    guest.try_example()
    guest.expect_state("Done")
    guest.page.get_by_text("What changed, tensor by tensor").click()
    guest.page.get_by_text("Task by task").click()
    guest.page.get_by_role("button", name=re.compile("^Log ")).click()
    seen["done"] = found(guest)
    guest.button("New merge").click()
    guest.button("Compare").click()
    guest.expect_state("Done")
    seen["compared"] = found(guest)
    for tab, shown in (
        ("My jobs", guest.page.get_by_role("table", name="Jobs")),
        ("Explore", guest.button("Open")),
        ("From code", guest.page.get_by_role("heading", name="curl")),
    ):
        guest.tab(tab)
        expect(shown).to_be_visible()
        seen[tab] = found(guest)
    with town.held("alice/axe", lost=True) as hold:
        alice = visit("alice")
        alice.start("axe")
        wait_for(lambda: hold.hits, "the merge to stand still", patience_s=120)
        alice.expect_state("Merging")
        seen["merging"] = found(alice)
        alice.button("Cancel").click()
        alice.expect_state("Cancelled")
        seen["cancelled"] = found(alice)

    assert not any(seen.values()), {state: what for state, what in seen.items() if what}
