"""What is installed: every package in its locked version, with its hash."""

import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.audit import audited

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+?)(?: ; (.+?))? \\$")


def requirements(name: str) -> list[Requirement]:
    """The requirements in a file, without their reasons."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def locked() -> dict[str, str]:
    """Name → version in the lock file."""
    pins = map(PIN.match, (ROOT / "requirements.lock").read_text().splitlines())
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin is not None}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_the_lock_has_what_is_required(name: str) -> None:
    """Each requirement but torch is locked in a version that it allows: else `make lock`."""
    pins = locked()

    missing = [
        str(wanted)
        for wanted in requirements(name)
        if wanted.name != "torch"
        and Version(pins.get(canonicalize_name(wanted.name), "0")) not in wanted.specifier
    ]

    assert not missing


def test_every_locked_package_has_a_hash_and_no_place() -> None:
    """A line is a pin or one of its hashes; none says where to download from."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    hash_line = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")

    assert len(locked()) > 50
    assert [line for line in lines if not PIN.match(line) and not hash_line.match(line)] == []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert not line.endswith("\\") or hash_line.match(following), line


def test_one_torch_everywhere() -> None:
    """The one version that is not locked stands in Makefile and requirements alike."""
    (wanted,) = (one for one in requirements("requirements.txt") if one.name == "torch")

    assert f"torch{wanted.specifier}" in (ROOT / "Makefile").read_text()
    assert "torch" not in locked()


def test_an_audit_counts_what_was_looked_up() -> None:
    """Packages that the database does not know are not called sound."""
    sound = {"name": "a", "version": "1", "vulns": []}
    broken = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}

    assert audited(json.dumps({"dependencies": [sound, broken, unknown]})) == (
        2,
        ["b 2: CVE-1, mended in 3"],
    )
    assert audited(json.dumps({"dependencies": [unknown]})) == (0, [])
    assert audited("no answer") == (0, [])
