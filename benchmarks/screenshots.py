"""The pictures of the Space in docs/images: ``python -m benchmarks.screenshots [NAME ...]``.

A Space and a loopback Hub are started, and a browser goes the way that a user goes.
"""

import argparse
import re
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, expect

from benchmarks.synthetic import Shape
from tests.support.browser import running_browser, visitor
from tests.support.space_pages import Visit
from tests.support.space_runs import Town, running_town, wait_for

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SHAPE = Shape(hidden_size=96, intermediate_size=256, num_hidden_layers=24, vocab_size=1024)
WIDE, PHONE = {"width": 940, "height": 800}, {"width": 390, "height": 800}
FORM = "Merge your own"
_COLOURS = 256


def enter(browser: Browser, town: Town, *, dark: bool = False, phone: bool = False) -> Visit:
    """Let somebody in, with a light or dark preference and a wide or narrow window."""
    size, scheme = (PHONE if phone else WIDE), "dark" if dark else "light"
    context = visitor(browser, viewport=size, color_scheme=scheme, reduced_motion="reduce")
    return Visit(context.new_page(), town).open("?__theme=dark" if dark else "")


def keep(visit: Visit, name: str, *, top: str | None = None, height: int | None = None) -> None:
    """Save what the page shows from a text down; the whole page without one."""
    visit.page.mouse.move(0, 0)
    visit.page.wait_for_timeout(700)  # for images that fade in
    whole = Image.open(BytesIO(visit.page.screenshot(full_page=True)))
    y = 0
    if top is not None:
        found = visit.page.get_by_text(top, exact=True).filter(visible=True).first
        box = found.bounding_box()
        if box is not None:
            y = int(box["y"] + visit.page.evaluate("window.scrollY")) - 16
    end = whole.height if height is None else min(y + height, whole.height)
    picture = whole.crop((0, y, whole.width, end)).convert("RGB")
    # kmeans: without it, small spots of colour are lost among the greys of the letters.
    picture = picture.quantize(_COLOURS, kmeans=1, dither=Image.Dither.NONE)
    path = IMAGES / f"{name}.png"
    picture.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {picture.width} x {picture.height}")


def choose(browser: Browser, town: Town) -> None:
    """The page as it opens, wide and on a phone in the dark; then everything under Advanced."""
    keep(enter(browser, town, dark=True, phone=True), "space-phone-start", height=1100)
    guest = enter(browser, town)
    keep(guest, "space-choose", height=1150)
    guest.advanced()
    keep(guest, "space-advanced", top=FORM)


def plan(browser: Browser, town: Town) -> None:
    """A plan that can be merged, with what it takes on other hardware; and as a pull request."""
    alice = enter(browser, town).sign_in("alice")
    alice.fill("math-and-code")
    alice.plan()
    alice.page.get_by_text("Here and on other hardware", exact=True).click()
    keep(alice, "space-plan", top=FORM)


def refused(browser: Browser, town: Town) -> None:
    """A plan that is refused: what is wrong stands at its fields too."""
    bob = enter(browser, town).sign_in("bob")
    bob.fill("math-and-code")
    bob.choose("Expert 2", "not a model")
    bob.plan()
    keep(bob, "space-refused", top=FORM)


def follow(browser: Browser, town: Town) -> None:
    """A merge in the middle, wide and light, and on a phone in the dark; then cancelled."""
    with town.held("alice/followed", commits=3, lost=True) as hold:
        alice = enter(browser, town).sign_in("alice")
        alice.start("followed")
        wait_for(lambda: hold.hits, "the merge to stand still")
        expect(alice.page.get_by_text("How far the heads agree").first).to_be_visible()
        alice.page.wait_for_timeout(9000)
        alice.page.get_by_role("button", name=re.compile("^Log ")).click()
        keep(alice, "space-follow", height=1250)
        link = alice.link
        small = enter(browser, town, dark=True, phone=True).sign_in("alice")
        small.open(f"{link}&__theme=dark")
        small.expect_state("Merging")
        keep(small, "space-phone", height=1100)
        alice.button("Cancel").click()
        alice.expect_state("Cancelled")
        alice.page.get_by_role("button", name=re.compile("^Log ")).click()
        keep(alice, "space-cancelled", height=900)
    again = enter(browser, town).sign_in("alice")
    expect(again.button("Continue this merge")).to_be_visible()
    keep(again, "space-continue", height=900)


def example(browser: Browser, town: Town) -> None:
    """What one click on the example gives, wide and on a phone in the dark."""
    guest = enter(browser, town)
    guest.try_example()
    guest.expect_state("Done")
    keep(guest, "space-example", height=1250)
    small = enter(browser, town, dark=True, phone=True)
    small.open(f"{guest.link}&__theme=dark")
    small.expect_state("Done")
    keep(small, "space-phone-result", height=1500)


def result(browser: Browser, town: Town) -> None:
    """What was merged: the published model and its gates; a pull request; then the jobs."""
    alice = enter(browser, town).sign_in("alice")
    alice.start("math-and-code")
    alice.expect_state("Done")
    alice.page.get_by_text("What the gates decided").click()
    keep(alice, "space-result", height=2300)
    town.hub.add_repo("bob/model", {"config.json": b"{}"})
    alice.open()
    alice.fill("bob/model")
    alice.advanced()
    alice.page.get_by_role("radio", name="a pull request").check()
    alice.plan()
    alice.merge()
    expect(alice.page.locator("#follow")).to_contain_text("a pull request on bob/model")
    alice.expect_state("Done")
    keep(alice, "space-pull-request", height=700)
    alice.open()
    alice.tab("My jobs")
    keep(alice, "space-jobs", height=700)
    alice.tab("From code")
    keep(alice, "space-code", height=1500)


def explore(browser: Browser, town: Town) -> None:
    """Two published reports beside each other, in the dark."""
    alice = enter(browser, town).sign_in("alice")
    for name, rho in (("compared-a", "0.2"), ("compared-b", "0.5")):
        alice.open()
        alice.fill(name)
        alice.advanced()
        alice.page.get_by_role("spinbutton", name=re.compile("^rho")).fill(rho)
        alice.plan()
        alice.merge()
        expect(alice.page.locator("#follow")).to_contain_text(f"alice/{name}")
        alice.expect_state("Done")
    alice.page.emulate_media(color_scheme="dark")
    alice.open("?__theme=dark")
    shown = alice.explore("alice/compared-a", "alice/compared-b")
    expect(shown.get_by_role("table", name="Settings, what differs first")).to_be_visible()
    keep(alice, "space-explore", height=1300)


STEPS: dict[str, Callable[[Browser, Town], None]] = {
    step.__name__: step for step in (choose, plan, refused, follow, example, result, explore)
}


def main() -> None:
    """Take the pictures that were asked for, or all."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.screenshots", description=__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help=", ".join(STEPS))
    wanted = options.parse_args().names or list(STEPS)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_town(Path(folder), shape=SHAPE, shard_bytes=1_500_000) as town,
        running_browser() as browser,
    ):
        for name in wanted:
            STEPS[name](browser, town)


if __name__ == "__main__":
    main()
