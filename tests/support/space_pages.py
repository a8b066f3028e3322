"""The Space's page as its users know it: labels, buttons and words, no element behind them."""

import re
from dataclasses import dataclass
from typing import Any

from playwright.sync_api import CDPSession, Locator, Page, expect

from tests.support.hub_runs import MODELS
from tests.support.space_runs import Town, wait_for

LONG_S = 240.0  # for a whole merge beside other work
# What a visitor can act on.
CONTROLS = {"button", "checkbox", "combobox", "link", "radio", "slider", "spinbutton", "tab",
            "textbox", "searchbox", "listbox"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Visit:
    """One visitor's tab."""

    page: Page
    town: Town

    def open(self, query: str = "") -> "Visit":
        """Go to the Space, and wait until it can be used."""
        self.page.goto(f"{self.town.space.url}/{query}")
        expect(self.button("Plan")).to_be_visible()
        expect(
            self.page.get_by_text(re.compile("^(Signed in as|Without an account)"))
        ).to_be_visible()
        # From now on what changes in the form was changed by a visitor.
        self.page.wait_for_function("window.resmergeReady === true")
        return self

    def sign_in(self, user: str) -> "Visit":
        """Press the sign-in button and choose a user on the Hub's consent page."""
        self.page.get_by_role("button", name="Sign in with Hugging Face").click()
        self.page.get_by_role("link", name=f"Sign in as {user}").click()
        expect(self.page.get_by_text(f"Signed in as {user}")).to_be_visible()
        return self

    def button(self, name: str) -> Locator:
        """The button of that name."""
        return self.page.get_by_role("button", name=name, exact=True)

    def tab(self, name: str) -> None:
        """Turn to a tab."""
        self.page.get_by_role("tab", name=name).click()

    def choose(self, label: str, text: str) -> None:
        """Write into a field that suggests ids, and leave it."""
        field = self.page.get_by_role("combobox", name=label, exact=True)
        field.fill(text)
        field.press("Enter")
        expect(field).to_have_value(text)

    def pick(self, label: str, text: str) -> None:
        """Choose what a field offers."""
        field = self.page.get_by_role("combobox", name=label, exact=True)
        field.click()
        offered = self.page.get_by_role("option", name=text, exact=True)
        offered.click()
        expect(field).to_have_value(text)
        expect(offered).to_have_count(0)

    def fill(self, name: str, *, namespace: str = "alice") -> None:
        """Write the group's models and the result's name into the form; ResMerge, for its gates."""
        if not self.page.get_by_role("combobox", name="Base model", exact=True).is_visible():
            self.page.get_by_role("button", name=re.compile("^Merge your own")).click()
        base, *experts = MODELS
        self.choose("Base model", f"{namespace}/{base}")
        for number, expert in enumerate(experts, 1):
            if number > 2:
                self.button("Add an expert").click()
            self.choose(f"Expert {number}", f"{namespace}/{expert}")
        self.page.get_by_role("textbox", name="Name of the result", exact=True).fill(name)
        self.method("ResMerge")

    def method(self, title: str) -> None:
        """Choose one of all methods."""
        self.all_methods()
        self.pick("Method", title)

    def all_methods(self) -> Locator:
        """Show the list of all methods, and return it."""
        field = self.page.get_by_role("combobox", name="Method", exact=True)
        if not field.is_visible():
            self.page.get_by_role("button", name=re.compile(r"^All \d+ methods")).click()
        return field

    def recipes(self) -> None:
        """Open or close where a recipe is pasted, or an example taken."""
        self.page.get_by_role("button", name=re.compile("^Or paste a recipe")).click()

    def advanced(self) -> None:
        """Open or close what is seldom needed."""
        self.page.get_by_role("button", name=re.compile("^Advanced")).click()

    def try_example(self) -> None:
        """Merge the built-in example with one click."""
        self.button("Try the example").click()
        expect(self.page.get_by_role("heading", name="Your merge")).to_be_visible()

    def example(self) -> None:
        """Fill the form with the built-in models."""
        self.recipes()
        self.button("Built-in experts").click()
        field = self.page.get_by_role("combobox", name="Base model", exact=True)
        expect(field).to_have_value("built-in/base")

    def explore(self, *names: str) -> Locator:
        """Open one report, or two beside each other, and return where they are shown."""
        self.tab("Explore")
        for label, name in zip(("Merged model", "Compare with (optional)"), names, strict=False):
            self.choose(label, name)
        self.button("Open").click()
        return self.page.get_by_role("tabpanel").filter(visible=True)

    def plan(self) -> None:
        """Plan, and wait for the answer."""
        self.button("Plan").click()
        expect(
            self.page.get_by_text(re.compile("(This|These models) (can|cannot) be merged"))
        ).to_be_visible()

    def merge(self) -> None:
        """Start the merge that was planned."""
        expect(self.button("Merge")).to_be_enabled()
        self.button("Merge").click()
        expect(self.page.get_by_role("heading", name="Your merge")).to_be_visible()

    def start(self, name: str) -> None:
        """Choose, plan and merge the group."""
        self.fill(name)
        self.plan()
        self.merge()

    def expect_state(self, words: str) -> None:
        """Wait until the followed job's badge says this."""
        badge = self.page.locator("#follow .rm-badge").first
        expect(badge).to_have_text(words, timeout=LONG_S * 1000)

    def expect_above_the_fold(self, words: str) -> None:
        """Wait until some text is seen without scrolling: a page is laid out a moment later."""
        found = self.page.get_by_text(words).first

        def is_seen() -> bool:
            box, size = found.bounding_box(), self.page.viewport_size
            return bool(box and size and box["y"] + box["height"] < size["height"])

        wait_for(is_seen, f"{words!r} above the fold")

    @property
    def link(self) -> str:
        """The query that opens the followed job."""
        link = self.page.get_by_role("link", name="Link to this job").get_attribute("href")
        return str(link)

    def file_row(self, name: str) -> Locator:
        """The line of a file among the downloads."""
        link = self.page.get_by_role("link", name=name, exact=True)
        return self.page.get_by_role("row").filter(has=link)

    def unnamed_controls(self) -> list[str]:
        """What can be acted on but has no name for a screen reader."""
        session: CDPSession = self.page.context.new_cdp_session(self.page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
        return [
            str(node["role"]["value"])
            for node in nodes
            if not node.get("ignored")
            and node["role"]["value"] in CONTROLS
            and not str(_value(node.get("name"))).strip()
        ]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        wide = "document.scrollingElement.scrollWidth - window.innerWidth"
        return int(self.page.evaluate(wide))


def _value(field: dict[str, Any] | None) -> Any:
    return "" if field is None else field.get("value", "")
