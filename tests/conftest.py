"""Settings of every test run: no telemetry, no network, journals in a folder that is removed."""

import atexit
import os
import shutil
import tempfile

# Set before huggingface_hub, transformers or the library are imported: they read these once.
_CACHE = tempfile.mkdtemp(prefix="resmerge-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE
os.environ["HF_HOME"] = os.path.join(_CACHE, "huggingface")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The matrices are small: a second thread would wait longer than it works.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.pop("HF_TOKEN", None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.checkpoints import Group, make_group  # noqa: E402

# The same examples in every run, and no deadline: a shared machine is sometimes slow.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("tests")


@pytest.fixture
def group(tmp_path) -> Group:
    """Three bfloat16 experts of one tied base, one weight file each."""
    return make_group(tmp_path / "group")


@pytest.fixture
def without_picture(monkeypatch):
    """Merges write no gates.png: drawing it takes twenty times as long as these merges.

    The merges that run as whole processes draw it, and it has tests of its own.
    """
    monkeypatch.setattr("resmerge_stream.card.gates_png", lambda report: b"")
