"""The package as it is given out: one version, and a wheel that has everything it runs with."""

import re
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest

from resmerge_stream.version import __version__
from tests.support.checkpoints import ROOT, child_environment


def test_there_is_one_version():
    """Program and changelog say the same one, and no document speaks of another of ours."""
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert first is not None
    assert first[1] == __version__
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        assert "0.2 (not yet" not in path.read_text(), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds of this tree, opened; no network, the build tools that are here."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    # A copy of what git knows, so that what an earlier build left here gets into none.
    for name in listed.stdout.splitlines():
        is_ours = name.startswith("resmerge_stream/") or "/" not in name
        if is_ours and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "--no-index", "-w", folder, tree],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_what_it_runs_with(wheel):
    """Every file of the library is in it, models and tables too; tests and the page are not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "resmerge_stream"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ours = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}

    names = zipfile.ZipFile(wheel).namelist()

    assert wheel.name == f"resmerge_stream-{__version__}-py3-none-any.whl"
    assert ours <= set(names), sorted(ours - set(names))[:5]
    assert {name.split("/")[0] for name in names} == {
        "resmerge_stream", f"resmerge_stream-{__version__}.dist-info",
    }  # fmt: skip


def test_the_wheels_command_starts(wheel, tmp_path):
    """Installed where nothing else of this tree is, its command plans the built-in experts."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target",
         tmp_path / "site", wheel],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (found,) = metadata.distributions(path=[str(tmp_path / "site")])
    (script,) = found.entry_points
    module, _, function = script.value.partition(":")
    code = f"import sys; from {module} import {function} as f; sys.exit(f(sys.argv[1:]))"
    here = child_environment() | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=here, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip

    assert script.name == "resmerge-stream"
    assert run("--version").stdout.split() == ["resmerge-stream", __version__]
    assert run("init").returncode == 0
    planned = run("plan", "recipe.yml")
    assert planned.returncode == 0, planned.stderr
    assert str(tmp_path / "site") in (tmp_path / "recipe.yml").read_text()
