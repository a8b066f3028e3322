"""Asks whether a locked package has a known vulnerability: `make audit`.

Exit code 1 where one has. Where nobody can be asked, that is said, and nothing is wrong.
"""

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"


def audited(answer: str) -> tuple[int, list[str]]:
    """Return how many packages were looked up, and a line for each vulnerability.

    Args:
        answer: pip-audit's, as JSON; anything else stands for no answer.
    """
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 0, []
    known = [package for package in packages if "skip_reason" not in package]
    return len(known), [
        f"{package['name']} {package['version']}: {found['id']}, "
        f"mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for package in known
        for found in package["vulns"]
    ]


def main() -> int:
    """Audit the lock file; return the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes",
         "--requirement", str(LOCK), "--format", "json", "--progress-spinner", "off"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    count, problems = audited(done.stdout)
    if not count:
        print("audit skipped: no database of vulnerabilities can be asked from here.")
        return 0
    print("\n".join([*problems, f"{count} packages audited, {len(problems)} vulnerabilities"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
