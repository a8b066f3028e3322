"""The Space in a real browser: the whole way, a reload, a cancel, other visitors."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from space.page.ui import TICK_S
from tests.support.hub_runs import ROOT
from tests.support.space_pages import Visit
from tests.support.space_runs import Town, wait_for

Visitors = Callable[..., Visit]
EXPERTS = ROOT / "resmerge_stream" / "experts"
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 720}


@pytest.mark.slow
def test_from_choosing_to_the_published_model(visit: Visitors, town: Town) -> None:
    """Sign in, choose, plan, merge: the repository is there, private, and the page links to it."""
    alice = visit("alice")

    alice.fill("by-browser")
    alice.plan()
    expect(alice.page.get_by_text("This can be merged into alice/by-browser")).to_be_visible()
    alice.merge()
    expect(alice.page.get_by_role("heading", name="Your merge")).to_be_in_viewport()
    alice.expect_state("Done")

    link = alice.page.get_by_role("link", name=f"{town.hub.endpoint}/alice/by-browser")
    expect(link).to_be_visible()
    alice.page.get_by_text("What the gates decided").click()
    expect(alice.page.get_by_role("img", name="How far the heads agree").first).to_be_visible()
    assert town.hub.repo("alice/by-browser").settings["private"] is True
    assert "resmerge/report.json" in town.hub.files("alice/by-browser")
    assert "model.safetensors.index.json" in town.hub.files("alice/by-browser")


@pytest.mark.slow
def test_a_reload_finds_the_job_again(visit: Visitors, town: Town) -> None:
    """In the middle of a merge a reload, and the job's link in a new tab, show it as it runs."""
    with town.held("alice/reloaded"):
        alice = visit("alice")
        alice.start("reloaded")
        alice.expect_state("Merging")
        link = alice.link
        alice.open()
        alice.expect_state("Merging")
        other = Visit(alice.page.context.new_page(), town).open(link)
        other.expect_state("Merging")
        expect(other.page.get_by_text("3 experts of alice/base")).to_be_visible()
        other.expect_above_the_fold("Merging")

    alice.expect_state("Done")
    other.expect_state("Done")


@pytest.mark.slow
def test_a_lost_connection_is_found_again(visit: Visitors, town: Town) -> None:
    """A page that was without a network meanwhile asks for no help, and shows the end."""
    alice = visit("alice")
    with town.held("alice/offline"):
        alice.start("offline")
        alice.expect_state("Merging")
        alice.page.context.set_offline(True)
        with alice.page.expect_event("requestfailed", lambda request: "/news/" in request.url):
            pass
        expect(alice.page.get_by_text("Connection errored out")).to_have_count(0)
        alice.page.context.set_offline(False)

    alice.expect_state("Done")


@pytest.mark.slow
def test_cancel_and_continue(visit: Visitors, town: Town) -> None:
    """Cancel stops a merge in the middle and says how to go on; Continue finishes it.

    After a reload the job that is shown stands above the list of unfinished ones.
    """
    alice = visit("alice")
    with town.held("alice/stopped", lost=True) as hold:
        alice.start("stopped")
        wait_for(lambda: hold.hits, "the merge to stand still")
        alice.button("Cancel").click()
        alice.expect_state("Cancelled")
        expect(alice.page.get_by_text("“Continue” goes on from there")).to_be_visible()
        assert "model.safetensors.index.json" not in town.hub.files("alice/stopped")

    alice.open(alice.link)
    shown = alice.page.get_by_role("heading", name="Your merge").bounding_box()
    others = alice.page.get_by_role("button", name="Continue this merge")
    expect(others).to_be_visible()
    listed = others.bounding_box()
    assert shown is not None
    assert listed is not None
    assert shown["y"] < listed["y"]
    alice.button("Continue").click()
    alice.expect_state("Done")
    assert "model.safetensors.index.json" in town.hub.files("alice/stopped")


@pytest.mark.slow
def test_another_visitor_sees_nothing_of_a_job(visit: Visitors, town: Town) -> None:
    """With the link alone, another account and a stranger neither see nor can cancel a job."""
    with town.held("alice/hers"):
        alice = visit("alice")
        alice.start("hers")
        alice.expect_state("Merging")
        for somebody in ("bob", None):
            other = visit(somebody).open(alice.link)
            expect(other.page.get_by_text("no such job of yours")).to_be_visible()
            expect(other.button("Cancel")).not_to_be_visible()
            assert "alice/hers" not in other.page.content()
            news = f"{town.space.url}/news/{alice.link.rpartition('=')[2]}"
            assert other.page.request.get(news).status == 404
        assert alice.page.request.get(news).json()["state"] == "running"
        bob = visit("bob")
        bob.tab("My jobs")
        expect(bob.page.get_by_text("No jobs yet.")).to_be_visible()
        alice.expect_state("Merging")

    alice.expect_state("Done")


@pytest.mark.slow
def test_a_refused_plan_says_why(visit: Visitors, town: Town) -> None:
    """What cannot be merged is said first and in words, and Merge stays off."""
    bob = visit("bob")

    bob.fill("mine")
    bob.plan()

    expect(bob.page.get_by_text("This cannot be merged")).to_be_visible()
    expect(bob.page.get_by_role("alert")).to_contain_text("alice/expert0")
    expect(bob.button("Merge")).to_be_disabled()


@pytest.mark.slow
def test_the_built_in_example_needs_no_account(visit: Visitors) -> None:
    """One click merges the built-in models; a stranger gets the answers' bars, and the files."""
    guest = visit()
    for size in (PHONE, LAPTOP):
        guest.page.set_viewport_size(size)
        for text in ("Merge language models", "Try the example", "Base model"):
            guest.expect_above_the_fold(text)

    guest.try_example()
    guest.expect_state("Done")

    expect(guest.page.get_by_role("listitem").filter(has_text="merged")).to_be_visible()

    made = ("resmerge/report.json", "resmerge/recipe.yml")
    names = ("merged.zip", "model.safetensors", "config.json", *made)
    for name in names:
        expect(guest.file_row(name)).to_be_visible()
    with guest.page.expect_download() as download:
        guest.file_row("config.json").get_by_role("link").click()
    assert b"qwen2" in download.value.path().read_bytes()


@pytest.mark.slow
def test_a_published_report_can_be_explored(visit: Visitors, town: Town) -> None:
    """The Explore tab opens the report of a repository, and sets two beside each other. It offers
    a merge as soon as that is done, without a reload."""
    alice = visit("alice")
    alice.start("explored")
    alice.expect_state("Done")

    shown = alice.explore("alice/explored")
    shown.get_by_text("What the gates decided").click()
    expect(shown.get_by_text("How far the heads agree").first).to_be_visible()
    shown = alice.explore("alice/explored", "alice/nothing")
    expect(shown.get_by_text("alice/nothing")).to_be_visible()
    alice.tab("Merge")
    alice.tab("Explore")
    alice.pick("Merged model", "alice/explored")
    alice.pick("Compare with (optional)", "alice/explored")
    alice.button("Open").click()
    shown = alice.page.get_by_role("tabpanel").filter(visible=True)
    expect(shown.get_by_role("table", name="Settings, what differs first")).to_be_visible()
    shown.get_by_text("What was decided in each").click()
    expect(shown.get_by_role("table", name="Two merges beside each other")).to_be_visible()


@pytest.mark.slow
def test_three_clicks_compare_methods_on_the_example(visit: Visitors) -> None:
    """The recipe's place, the example, Compare: scores side by side, without an account. Then a new
    merge begins with an open form and no name."""
    guest = visit()
    guest.example()
    guest.page.get_by_role("textbox", name="Name of the result", exact=True).fill("used")
    guest.button("Compare").click()
    guest.expect_state("Done")

    bars = guest.page.locator("#follow .rm-bars")
    for name in ("Head regression", "SWUDI", "TSV-Merge", "built-in/base"):
        expect(bars.get_by_text(name, exact=True)).to_be_visible()
    expect(guest.page.locator("#follow").get_by_text(re.compile("^Best: "))).to_be_visible()
    expect(guest.button("Plan")).to_be_hidden()
    guest.button("New merge").click()
    expect(guest.button("Plan")).to_be_visible()
    expect(guest.page.get_by_role("textbox", name="Name of the result", exact=True)).to_have_value(
        ""
    )


@pytest.mark.slow
def test_the_form_is_kept(visit: Visitors, town: Town) -> None:
    """What was typed is there after a reload and after signing in; a token never is. What was
    changed under Advanced stands above it."""
    guest = visit()
    guest.fill("kept")
    guest.method("TIES")
    expect(guest.page.get_by_text("density", exact=True)).to_have_count(0)
    guest.advanced()
    seed = guest.page.get_by_role("spinbutton", name=re.compile("^Seed"))
    seed.fill("7")
    seed.press("Tab")
    expect(guest.page.get_by_text("Seed: 7", exact=True)).to_be_visible()

    guest.open()
    for _ in range(2):
        base = guest.page.get_by_role("combobox", name="Base model", exact=True)
        expect(base).to_have_value("alice/base")
        third = guest.page.get_by_role("combobox", name="Expert 3", exact=True)
        expect(third).to_have_value("alice/expert2")
        expect(guest.all_methods()).to_have_value("TIES")
        expect(guest.page.get_by_text("Seed: 7", exact=True)).to_be_visible()
        if guest.page.get_by_text("Signed in as").count() == 0:
            guest.sign_in("alice")


@pytest.mark.slow
def test_adapters_become_an_adapter(visit: Visitors, town: Town) -> None:
    """Two LoRA adapters are chosen by id, planned, merged as an adapter and published as PEFT has
    it; the page says what it is."""
    for name in ("base", "lora-add", "lora-sort"):
        files = {file.name: file.read_bytes() for file in (EXPERTS / name).iterdir()}
        town.hub.add_repo(f"alice/page-{name}", files)
    alice = visit("alice")
    alice.choose("Base model", "alice/page-base")
    alice.choose("Expert 1", "alice/page-lora-add")
    alice.choose("Expert 2", "alice/page-lora-sort")
    alice.page.get_by_role("textbox", name="Name of the result", exact=True).fill("one-adapter")
    alice.advanced()
    alice.pick("Output", "adapter")
    alice.plan()
    expect(alice.page.get_by_text("This can be merged into alice/one-adapter")).to_be_visible()
    alice.merge()
    alice.expect_state("Done")

    expect(alice.page.get_by_text("PeftModel").first).to_be_visible()
    files = town.hub.files("alice/one-adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert not [name for name in files if name.startswith("model")]


@pytest.mark.slow
def test_a_recipe_is_a_link_or_a_file(visit: Visitors, tmp_path: Path) -> None:
    """The link that a plan gives fills the form of whoever opens it; so does a file."""
    guest = visit()
    guest.example()
    guest.plan()
    link = guest.page.get_by_role("link", name="Share this recipe").get_attribute("href")

    other = visit(query=str(link))

    base = other.page.get_by_role("combobox", name="Base model", exact=True)
    expect(base).to_have_value("built-in/base")
    file = tmp_path / "recipe.yml"
    file.write_text("base_model: org/base\nmodels: [org/math]\n")
    other.recipes()
    with other.page.expect_file_chooser() as chooser:
        other.button("Open a file").click()
    chooser.value.set_files(file)
    text = other.page.get_by_role("textbox", name=re.compile("^Recipe"))
    expect(text).to_have_value(file.read_text())
    other.button("Fill the form from it").click()
    expect(base).to_have_value("org/base")


def test_ten_seconds_are_enough_to_notice() -> None:
    """A tab asks every so often, and waits so long for an answer: together less than ten."""
    script = (ROOT / "space" / "page" / "watch.js").read_text()

    (patience,) = re.findall(r"AbortSignal\.timeout\((\d+)\)", script)

    assert TICK_S + int(patience) / 1000 <= 10


@pytest.mark.slow
def test_a_server_that_is_gone_is_noticed(visit: Visitors, town: Town) -> None:
    """An open tab says that nobody answers, and when it can go on."""
    alice = visit("alice")
    with town.held("alice/gone"):
        alice.start("gone")
        alice.expect_state("Merging")
        alice.page.context.set_offline(True)
        expect(alice.page.get_by_text("The connection is lost")).to_be_visible()
        alice.page.context.set_offline(False)

    alice.expect_state("Done")
    expect(alice.page.get_by_text("The connection is lost")).not_to_be_visible()


@pytest.mark.slow
def test_a_logout_forgets(visit: Visitors, town: Town) -> None:
    """Afterwards this browser shows nothing of the account: no job, and an empty form."""
    alice = visit("alice")
    alice.start("before-leaving")
    alice.expect_state("Done")
    alice.fill("typed")

    alice.page.get_by_role("button", name="Sign out (alice)").click()
    expect(alice.page.get_by_text("Without an account")).to_be_visible()
    alice.open()

    expect(alice.page.get_by_role("heading", name="Your merge")).not_to_be_visible()
    base = alice.page.get_by_role("combobox", name="Base model", exact=True)
    expect(base).to_have_value("")
    assert "before-leaving" not in alice.page.content()


@pytest.mark.slow
def test_a_restarted_server_is_noticed(visit: Visitors, lone_town: Town) -> None:
    """An open tab says that nobody answers, then by itself that the job can be continued."""
    guest = Visit(visit().page, lone_town).open()
    with lone_town.held("alice/restarted", lost=True) as hold:
        guest.sign_in("alice")
        guest.start("restarted")
        wait_for(lambda: hold.hits, "the merge to stand still")
        guest.expect_state("Merging")
        lone_town.space.stop(signal.SIGKILL)
        # By gradio, which then loads the page again by itself, or by the page.
        lost = guest.page.get_by_text(re.compile("connection (to the server was|is) lost", re.I))
        expect(lost.first).to_be_visible()
    lone_town.space.start()

    guest.expect_state("Stopped, can go on")
    expect(guest.page.get_by_text("The Space was restarted")).to_be_visible()
    expect(lost.first).not_to_be_visible()
