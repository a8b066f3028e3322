"""Thousands of damaged headers, indexes, configs and recipes through the real commands."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from safetensors import safe_open

from benchmarks.fuzz import (
    KINDS,
    Specimen,
    library_accepts,
    message_of,
    plan_all,
    run_in_process,
    write_specimen,
)
from tests.support.checkpoints import ROOT, child_environment

# The long search has other cases than the short one.
SEARCHES = [
    pytest.param(range(100), id="short"),
    pytest.param(range(100, 1300), id="long", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def specimen(tmp_path_factory):
    """The group whose files are changed one at a time."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_specimen(folder)
    return Specimen(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No name is looked up: a changed one may look like a repository of the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def shown(failures):
    """Return the first failures as text, so that one run tells about several."""
    return f"{len(failures)} wrong\n" + "\n".join(failures[:20])


@pytest.mark.slow
@pytest.mark.parametrize("cases", SEARCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_inputs_are_refused_in_one_message_or_rightly_accepted(
    kind, cases, specimen, monkeypatch
):
    """A plan exits 0 or 2, refuses in one short message, and changes no file.

    A header is accepted exactly where safetensors accepts it, but for the stricter rules.
    """
    monkeypatch.chdir(specimen.home)
    before = specimen.listing()

    tally = plan_all(specimen, kind, cases)

    assert not tally.failures, shown(tally.failures)
    assert tally.accepted
    assert len(tally.refused) > len(cases) // 2
    assert specimen.listing() == before


@pytest.mark.parametrize(
    "merges", [pytest.param(2, id="two"), pytest.param(6, id="six", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_inputs_that_were_accepted_are_merged(kind, merges, specimen, monkeypatch):
    """What a plan accepts is merged to files that safetensors opens, or refused for its values.

    Nothing outside the output folder changes.
    """
    monkeypatch.chdir(specimen.home)
    before = specimen.listing()
    merged = []

    def merge(case):
        if len(merged) >= merges:
            return None
        out = specimen.home / "out" / str(merges) / str(case.number)
        outcome = run_in_process("merge", "recipe.yml", "--out", str(out))
        merged.append(case.number)
        if outcome.crash or outcome.code not in (0, 2):
            return f"exit code {outcome.code}, {outcome.crash[:700]} {outcome.text[-500:]}"
        if outcome.code == 2:
            return None if "NaN" in outcome.text or "overflows" in outcome.text else outcome.text
        files = sorted(out.glob("*.safetensors"))
        sound = files and all(map(library_accepts, files))
        return None if sound and list(out.glob("**/*.part")) == [] else "a broken output"

    # From the end: other cases than those that are only planned.
    tally = plan_all(specimen, kind, range(10_000, 10_000 + 25 * merges), merge)

    assert not tally.failures, shown(tally.failures)
    assert merged
    assert specimen.listing() == before


def test_accepted_indexes_point_at_files_beside_them(specimen, monkeypatch):
    """No index that leads out of its folder, or to a tensor that is elsewhere, is accepted."""
    monkeypatch.chdir(specimen.home)

    def check(case):
        index = json.loads(case.data)
        folder = (specimen.home / case.path).parent
        for name, file in index["weight_map"].items():
            if "/" in file or not (folder / file).is_file():
                return f"accepted {file!r}"
            with safe_open(folder / file, "pt") as shard:
                if name not in shard.keys():  # noqa: SIM118
                    return f"accepted {name!r} in {file!r}"
        return None

    tally = plan_all(specimen, "index", range(20_000, 20_300), check)

    assert not tally.failures, shown(tally.failures)
    assert tally.accepted


def test_accepted_recipes_are_plain_yaml(specimen, monkeypatch):
    """Whatever is accepted as a recipe, a safe YAML loader reads as a mapping."""
    monkeypatch.chdir(specimen.home)

    def check(case):
        return None if isinstance(yaml.safe_load(case.data), dict) else "not a mapping"

    tally = plan_all(specimen, "recipe", range(20_000, 20_300), check)

    assert not tally.failures, shown(tally.failures)
    assert tally.accepted


@pytest.mark.slow
def test_memory_and_whole_commands_stay_within_the_targets():
    """In a process of its own, peak memory stays under the limit and commands exit 2."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", "--cases", "400", "--commands", "6"],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "exit codes {2: 6}" in done.stdout


@pytest.mark.parametrize("size", [8, 1 << 20, 1 << 33, (1 << 63) - 1])
def test_a_header_that_announces_more_than_there_is_costs_no_memory(size, specimen, monkeypatch):
    """The announced length is checked against the file before anything is read."""
    monkeypatch.chdir(specimen.home)
    case = specimen.case("header", 0)
    path = specimen.home / case.path
    original = path.read_bytes()
    path.write_bytes(size.to_bytes(8, "little"))

    outcome = run_in_process("plan", "recipe.yml")

    path.write_bytes(original)
    assert outcome.code == 2
    assert not outcome.crash
    assert str(case.path) in message_of(outcome.text)


def test_a_sparse_file_of_many_gigabytes_costs_no_memory(tmp_path):
    """A file whose header could be huge, and is mostly a hole, is refused under a memory limit."""
    write_specimen(tmp_path)
    specimen = Specimen(tmp_path)
    path = specimen.files["header"][0]
    with path.open("wb") as file:
        file.write((99_999_999).to_bytes(8, "little"))
        file.truncate(1 << 36)
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from resmerge_stream.cli.main import main\n"
        "sys.exit(main(['plan', 'recipe.yml']))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=specimen.home,
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 2, done.stderr[-2000:]
    assert path.name in done.stdout
    assert os.path.getsize(path) == 1 << 36
