"""This very package as a wheel file: the code that runs here, to run elsewhere.

Made from the files themselves, so that a checkout, an editable install and an installed release
all give the code that planned; the same files give the same bytes.
"""

import base64
import hashlib
import io
import re
import zipfile
from importlib import metadata
from pathlib import Path

from ..errors import CheckpointNotFoundError
from ..version import __version__

_NAME = "resmerge-stream"
_PACKAGE = Path(__file__).parent.parent
_INFO = f"resmerge_stream-{__version__}.dist-info"
# Of the dependency list, what a merge never imports.
_PAGES = "gradio"
_EXTRA = re.compile(r"""extra == ["'](\w+)["']""")
WHEEL_NAME = f"resmerge_stream-{__version__}-py3-none-any.whl"


def build_wheel() -> bytes:
    """Return the wheel's content.

    Raises:
        CheckpointNotFoundError: nothing says what the package needs.
    """
    files = {
        f"resmerge_stream/{path.relative_to(_PACKAGE).as_posix()}": path.read_bytes()
        for path in sorted(_PACKAGE.rglob("*"))
        # Models of the built-in experts stay here; tables that the code reads go along.
        if path.suffix in (".py", ".json") and (path.parent / "__init__.py").exists()
    }
    needs = "".join(f"Requires-Dist: {need}\n" for need in requirements())
    files[f"{_INFO}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n"
        f"Requires-Python: >=3.11\n{needs}"
    ).encode()
    files[f"{_INFO}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: resmerge-stream\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n"
    )
    files[f"{_INFO}/entry_points.txt"] = (
        f"[console_scripts]\n{_NAME} = resmerge_stream.cli.main:main\n".encode()
    )
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    files[f"{_INFO}/RECORD"] = ("".join(lines) + f"{_INFO}/RECORD,,\n").encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return buffer.getvalue()


def requirements(extra: str = "") -> list[str]:
    """Return what a merge needs installed, as requirements: the one list without the pages.

    Args:
        extra: what this extra needs instead.

    Raises:
        CheckpointNotFoundError: there is neither a checkout nor an installed package.
    """
    listed = _PACKAGE.parent / (f"requirements-{extra}.txt" if extra else "requirements.txt")
    if (_PACKAGE.parent / "pyproject.toml").is_file() and listed.is_file():
        lines = [line.split("#")[0].strip() for line in listed.read_text("utf-8").splitlines()]
    else:
        try:
            known = metadata.requires(_NAME) or []
        except metadata.PackageNotFoundError as exc:
            raise CheckpointNotFoundError(
                "the installed package does not say what it needs. Install it with pip, or run it "
                "from its repository."
            ) from exc
        extras = [*map(_EXTRA.search, known)]
        lines = [
            line
            for line, found in zip(known, extras, strict=True)
            if (found[1] if found else "") == extra
        ]
        if extra:
            lines = [line.partition(";")[0].strip() for line in lines]
    return [line for line in lines if line and _PAGES not in line]
