"""The wheel of this very package: complete, reproducible, installable by its own records."""

import base64
import hashlib
import io
import tomllib
import zipfile

from resmerge_stream.jobs.wheel import WHEEL_NAME, build_wheel, requirements
from resmerge_stream.version import __version__
from tests.support.checkpoints import ROOT


def archive() -> zipfile.ZipFile:
    """Return the wheel, opened."""
    return zipfile.ZipFile(io.BytesIO(build_wheel()))


def test_the_same_files_give_the_same_wheel():
    """A wheel is named by its content, so that content must not depend on when it was made."""
    assert build_wheel() == build_wheel()
    assert f"resmerge_stream-{__version__}-py3-none-any.whl" == WHEEL_NAME


def test_every_file_of_the_library_is_in_it():
    """What runs in a Job is what runs here, byte for byte, with the tables that the code reads."""
    files = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in (ROOT / "resmerge_stream").rglob("*.py")
    }

    with archive() as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".py")}
        names = wheel.namelist()

    assert found == files
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tables = [(room, name) for room, every in data["package-data"].items() for name in every]
    assert all(
        f"{room.replace('.', '/')}/{name}" in names for room, name in tables if "*" not in name
    )


def test_its_records_are_right():
    """RECORD names every file with its hash and size, as installers check them."""
    with archive() as wheel:
        (record,) = (name for name in wheel.namelist() if name.endswith("/RECORD"))
        for line in wheel.read(record).decode().splitlines():
            name, digest, size = line.split(",")
            if name == record:
                continue
            data = wheel.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
            assert (digest, size) == (f"sha256={expected.decode()}", str(len(data)))


def test_it_needs_what_a_merge_needs():
    """Its requirements are the one list, with torch's exact version, without the pages."""
    needs = requirements()

    assert [need for need in needs if need.startswith("torch==")]
    assert any(need.startswith("huggingface_hub") for need in needs)
    assert requirements("eval") == ["lm_eval>=0.4.13"]
    assert not [need for need in needs if "gradio" in need or "pytest" in need or "#" in need]
