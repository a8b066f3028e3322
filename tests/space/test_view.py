"""The words, tables and drawings of the Space, as text."""

import re

import pytest

from resmerge_stream.methods import find_methods
from resmerge_stream.recipe import DEFAULT_METHOD
from resmerge_stream.run.events import Progressed
from resmerge_stream.studies.advice import evidence
from space.explore import Opened
from space.hardware import MODEL, Hardware
from space.jobs.jobs import expected_seconds
from space.jobs.progress import Live, apply
from space.jobs.records import Job
from space.page.fields import SHORT
from space.view import jobs as view
from space.view import plan as view_plan
from space.view import report as view_report
from space.view.words import code, table


def plan(**values):
    """Return a plan as the page gets it."""
    made = {
        "refused": False, "problems": [], "warnings": [], "tensors": 3,
        "by_rule": {"mean": 1, "resmerge": 2}, "shards": [{"name": "a", "bytes": 5, "tensors": 3}],
        "read_bytes": 61e9, "write_bytes": 15e9, "peak_memory_bytes": 2e9, "peak_disk_bytes": 1e10,
        "method": "ties", "chosen_by": "recipe", "seconds_estimate": 1220.0, "plan_hash": "0",
        "sources": [
            {"part": "base", "id": "org/base", "revision": "0123456789abcdef", "bytes": 15e9,
             "license": "apache-2.0", "gated": False},
            {"part": "expert 1", "id": "org/<b>", "revision": None, "bytes": 1,
             "license": None, "gated": True},
        ],
        "hardware": [], "target_checked": True,
    }  # fmt: skip
    return made | values


def test_a_refused_plan_shows_its_problems_first():
    """Problems stand before everything else, escaped, and nothing is promised."""
    html = view_plan.plan_html(plan(refused=True, problems=["org/<x> is gated"]), push_to="me/m")

    assert html.index("cannot be merged") < html.index("org/base")
    assert "org/&lt;x&gt; is gated" in html
    assert "can be merged</b>" not in html


def test_a_plan_says_what_it_takes():
    """Bytes in and out, memory, disk, time, rules, and each source's commit, licence and gate."""
    html = view_plan.plan_html(plan(), push_to="me/m").replace("&nbsp;", " ")

    for text in ("61 GB", "15 GB", "2 GB", "10 GB", "20 min", "0123456789", "apache-2.0"):
        assert text in html
    assert re.findall(r">(yes|no)</td>", html) == ["no", "yes"]
    assert "org/&lt;b&gt;" in html


def test_the_table_of_hardware_says_what_is_too_small():
    """A machine without enough says so and has no time; a fitting one has time and price."""
    has = (2, int(16e9), int(50e9))
    found = [
        Hardware("this machine", *has, 8.0),
        Hardware("small", *has, 1220.0, 0.002, "the merge needs <20 GB>"),
        Hardware("large", *has, 1220.0, 0.85),
    ]

    html = view_plan.hardware_html(found)

    assert "the merge needs &lt;20 GB&gt;" in html
    assert html.count("20 min") == 1
    assert "$0.85" in html
    assert MODEL[:20] in html


def test_the_built_in_merge_shows_what_it_can_do():
    """Shares of right answers stand model by model, with intervals and a mean."""
    row = {"add": [0.5, 0.3, 0.7, 32], "sort": [1.0, 0.9, 1.0, 32]}
    done = job(state="done", accuracies={"base": row, "merged": row})

    html = view.result_html(done)

    assert "32 questions a task" in html
    assert "50% " in html
    assert "75%" in html


def test_a_published_merge_can_be_asked_as_a_job():
    """The result has the command for base, experts and merge, where a Job can see them all."""
    asked = {
        "recipe": {"base_model": "org/base@v1", "models": ["me/a", {"model": "me/b", "weight": 2}]},
        "push_to": "me/merged",
    }
    command = (
        "resmerge-stream evaluate org/base@v1 me/a me/b me/merged --tasks gsm8k "
        "--card me/merged --job"
    )

    found = view.result_html(job(state="done", url="https://h.co/me/merged", asked=asked))
    asked["recipe"]["base_model"] = "built-in/base"
    built_in = view.result_html(job(state="done", url="https://h.co/me/merged", asked=asked))

    assert f"<code>{command}</code>" in found
    assert "--job" not in built_in


@pytest.mark.parametrize(
    ("method", "base", "models", "sources", "counted", "title", "parts"),
    [
        ("resmerge", "o/b", ["o/a", "o/c"], 3, "<dt>Experts</dt><dd>2<", "2 experts of o/b",
         ["base", "expert 1", "expert 2"]),
        ("linear", None, ["o/a", "o/c"], 2, "<dt>Models</dt><dd>2<", "2 models by Linear",
         ["expert 1", "expert 2"]),
        ("linear", "o/b", ["o/a", "o/b"], 2, "<dt>Models</dt><dd>2<", "2 models by Linear",
         ["base", "expert 1"]),
        ("resmerge", "o/b", ["o/a"], 2, "<dt>Experts</dt><dd>1<", "1 expert of o/b",
         ["base", "expert 1"]),
    ],
    ids=["beside a base", "no base", "the base takes part", "one"],
)  # fmt: skip
def test_models_are_counted_as_they_take_part(method, base, models, sources, counted, title, parts):
    """A base is no expert, unless it is merged too; without one all are models that are merged."""
    recipe = {"merge_method": method, "models": [{"model": name} for name in models]}
    recipe |= {"base_model": base} if base else {}
    report = {"summary": {}, "recipe": recipe, "sources": [{"id": "o/x"}] * sources}

    html = view_report.opened_html(Opened("x/y", report, []))

    assert counted in html
    assert re.findall(r'<th scope="row">(base|expert \d)</th>', html) == parts
    assert view.title_of({"recipe": recipe, "push_to": "me/m"}).startswith(title)


@pytest.mark.parametrize(
    ("finished", "planned", "seconds"),
    [
        ([], 3, None),
        ([(1, 11), (2, 14), (3, 15)], 3, 15),  # what each took beside its bytes
        ([(100, 200), (300, 600)], 1000, 2000),  # a machine half as fast
        ([(1, 11), (100, 210)], 1000, 2010),  # both
    ],
)
def test_an_estimate_is_what_merges_took_here(finished, planned, seconds):
    """Short merges tell the time beside the bytes, long ones the machine's speed."""
    jobs = [
        job(state="done", took=took, plan={"seconds_estimate": estimate}, created=number)
        for number, (estimate, took) in enumerate(finished)
    ]
    stopped = job(state="done", took=9999.0, bytes_kept=5, plan={"seconds_estimate": 1})

    found = expected_seconds(planned, [*jobs, stopped, job(state="failed", took=9999.0)])

    assert found == pytest.approx(seconds)


def job(**values):
    """Return a job that merges org/base into me/m."""
    asked = {"recipe": {"base_model": "org/<base>", "models": [1, 2]}, "push_to": "me/m"}
    made = Job("i" * 43, "me", "", asked)
    for key, value in values.items():
        setattr(made, key, value)
    return made


def test_a_waiting_job_says_how_many_are_before_it():
    """The queue's length before a job is said in words."""
    assert "2 merges before yours" in view.status_html(job(), place=2)


def test_a_running_job_shows_how_far_it_is():
    """Bytes with speeds, tensors, files, memory and time left, and a bar that is announced."""
    live, running = Live(), job()
    totals = {
        "tensors": 4, "shards": [{}, {}], "read_bytes": 4e9, "write_bytes": 1e9,
        "peak_memory_bytes": 2e9, "seconds_estimate": 9,
        "notices": {"problems": [], "warnings": []},
    }  # fmt: skip
    apply(running, live, {"event": "planned", "plan": totals, "memory_bytes": 1})
    progress = Progressed(
        bytes_read=2_000_000_000, bytes_written=250_000_000, read_speed=4e7, seconds_left=300.0
    )
    apply(running, live, {**progress.to_dict(), "memory_bytes": 700_000_000})

    html = view.status_html(running, place=0).replace("&nbsp;", " ")

    for text in (
        "2 GB of 4 GB",
        "40 MB/s",
        "250 MB of 1 GB",
        "0 of 4",
        "0 of 2",
        "700 MB",
        "5 min",
    ):
        assert text in html
    assert 'aria-valuenow="25"' in html
    assert "org/&lt;base&gt;" in html


def test_a_stopped_job_says_what_remains():
    """A job that can go on says how many files are kept, and how."""
    stopped = job(state="resumable", shards_done=1, plan={"shards": 3, "read_bytes": 1,
                  "write_bytes": 1, "tensors": 1})  # fmt: skip

    assert "1 of 3 files are finished" in view.what_remains(stopped)
    assert "Continue" in view.status_html(stopped, place=0)


def test_a_published_result_leads_with_what_a_person_came_for():
    """The model's link, then lines to try it, then the GGUF's Space, then an evaluation."""
    recipe = {"base_model": "org/base", "models": [{"model": "org/a"}]}
    done = job(state="done", url="https://h.co/me/m/commit/abc")
    done.asked["recipe"] = recipe

    html = view.result_html(done)

    steps = [
        'href="https://h.co/me/m"', "pipeline(", "ggml-org/gguf-my-repo",
        "evaluate org/base org/a me/m",
    ]  # fmt: skip
    places = [html.index(step) for step in steps]
    assert places == sorted(places)


def test_an_adapter_says_what_it_holds_and_how_it_is_loaded():
    """The result of a merge written as an adapter has rank and share, and names PEFT."""
    adapter = {"modules": 35, "rank": 16, "kept": 0.8783, "by_rank": {"16": 0.8783}}
    opened = Opened("me/m", {"summary": {}, "adapter": adapter}, [])
    done = job(state="done", url="https://h.co/me/m/commit/main")
    done.asked["options"] = {"as": "adapter"}

    assert "35 modules, rank 16, holds 87.83%" in view_report.opened_html(opened)
    assert "PeftModel" in view.result_html(done)
    assert "PeftModel" not in view.result_html(job(state="done", url="https://h.co/me/m"))


def test_the_recommended_method_says_why():
    """The page's reason is what the evidence counts; no other method is recommended."""
    cases = evidence()["cases"]
    near = sum(case["points"][DEFAULT_METHOD][0] >= -1 for case in cases)
    methods = find_methods()

    assert f"in {near} of {len(cases)} groups" in view.method_html(methods[DEFAULT_METHOD])
    assert near == max(
        sum(case["points"][method][0] >= -1 for case in cases) for method in cases[0]["points"]
    )
    assert "Recommended" not in view.method_html(methods["resmerge"])


def test_the_short_list_says_what_the_evidence_does():
    """The counts and the distance beside the recommended methods are those of the evidence."""
    cases = [case["points"] for case in evidence()["cases"]]
    near = {name: sum(case[name][0] >= -1 for case in cases) for name in SHORT}
    behind = sum(case["tsv_m"][0] for case in cases) / len(cases)

    assert f"in {near['head_regression']} of {len(cases)}" in SHORT["head_regression"]
    assert f"in {near['swudi']} of {len(cases)}" in SHORT["swudi"]
    assert SHORT["tsv_m"].startswith(f"{-behind:.0f} points behind")


def test_a_block_of_code_can_be_copied():
    """Each has a button with a name of its own, and its text is text."""
    html = code("Try it", "<b>1 & 2</b>")

    assert 'aria-label="Copy: Try it"' in html
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in html


def test_a_wide_table_names_each_cell_for_a_narrow_window():
    """Of six columns each cell carries its heading, which the style shows in stacked rows."""
    rows = [("a", "b", "c", "d", "e", "f")]
    wide = table(("A", "B", "C", "D", "E", "F&lt;"), rows, "six")
    narrow = table(("A", "B"), [("a", "b")], "two")

    assert 'class="rm-wide"' in wide
    assert re.findall(r'data-label="([^"]*)"', wide) == ["B", "C", "D", "E", "F&lt;"]
    assert "rm-wide" not in narrow
