"""The Space in a real browser: the whole way, a reload, a cancel, other visitors."""

from collections.abc import Callable

from playwright.sync_api import expect

from tests.support.space_pages import Visit
from tests.support.space_runs import Town, wait_for

Visitors = Callable[..., Visit]


def test_from_choosing_to_the_published_model(visit: Visitors, town: Town) -> None:
    """Sign in, choose, plan, merge: the repository is there, private, and the page links to it."""
    alice = visit("alice")

    alice.fill("by-browser")
    alice.plan()
    expect(alice.page.get_by_text("This can be merged into alice/by-browser")).to_be_visible()
    alice.merge()
    alice.expect_state("Done")

    link = alice.page.get_by_role("link", name=f"{town.hub.endpoint}/alice/by-browser")
    expect(link).to_be_visible()
    expect(alice.page.get_by_role("img", name="How far the heads agree").first).to_be_visible()
    assert town.hub.repo("alice/by-browser").settings["private"] is True
    assert "resmerge/report.json" in town.hub.files("alice/by-browser")
    assert "model.safetensors.index.json" in town.hub.files("alice/by-browser")


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

    alice.expect_state("Done")
    other.expect_state("Done")


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


def test_cancel_and_continue(visit: Visitors, town: Town) -> None:
    """Cancel stops a merge in the middle and says how to go on; Continue finishes it."""
    alice = visit("alice")
    with town.held("alice/stopped", lost=True) as hold:
        alice.start("stopped")
        wait_for(lambda: hold.hits, "the merge to stand still")
        alice.button("Cancel").click()
        alice.expect_state("Cancelled")
        expect(alice.page.get_by_text("“Continue” goes on from there")).to_be_visible()
        assert "model.safetensors.index.json" not in town.hub.files("alice/stopped")

    alice.button("Continue").click()
    alice.expect_state("Done")
    assert "model.safetensors.index.json" in town.hub.files("alice/stopped")


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


def test_a_refused_plan_says_why(visit: Visitors, town: Town) -> None:
    """What cannot be merged is said first and in words, and Merge stays off."""
    bob = visit("bob")

    bob.fill("mine")
    bob.plan()

    expect(bob.page.get_by_text("This cannot be merged")).to_be_visible()
    expect(bob.page.get_by_role("alert")).to_contain_text("alice/expert0")
    expect(bob.button("Merge")).to_be_disabled()


def test_the_built_in_example_needs_no_account(visit: Visitors) -> None:
    """A stranger merges the built-in models, and gets the result as files."""
    guest = visit()

    guest.example()
    guest.plan()
    guest.merge()
    guest.expect_state("Done")

    names = ("model.safetensors", "config.json", "report.json", "recipe.yml")
    for name in names:
        expect(guest.file_row(name)).to_be_visible()
    with guest.page.expect_download() as download:
        guest.file_row("config.json").get_by_role("link").click()
    assert b"qwen2" in download.value.path().read_bytes()


def test_a_published_report_can_be_explored(visit: Visitors, town: Town) -> None:
    """The Explore tab opens the report of a repository, and sets two beside each other."""
    alice = visit("alice")
    alice.start("explored")
    alice.expect_state("Done")

    shown = alice.explore("alice/explored")
    expect(shown.get_by_text("How far the heads agree").first).to_be_visible()
    shown = alice.explore("alice/explored", "alice/nothing")
    expect(shown.get_by_text("alice/nothing")).to_be_visible()
    shown = alice.explore("alice/explored", "alice/explored")
    expect(shown.get_by_role("table", name="Two merges beside each other")).to_be_visible()
