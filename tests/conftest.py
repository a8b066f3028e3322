"""Settings of every test run: no telemetry, no network, journals in a folder that is removed."""

import atexit
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import zlib

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
from hypothesis.internal.conjecture import providers  # noqa: E402
from hypothesis.internal.constants_ast import Constants  # noqa: E402

from tests.support.checkpoints import Group, make_group  # noqa: E402

# The same examples in every run, and no deadline: a shared machine is sometimes slow.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("tests")
# Hypothesis also draws words and numbers that stand in the modules that happen to be imported, so
# that a test's examples would depend on which tests ran before it. It has no setting for this.
providers._get_local_constants = Constants


def pytest_configure():
    """Let Ctrl-C reach what the tests start: a shell ignores it for all that runs behind it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed what a test draws without a seed of its own, by the test's name."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    for module, name in (("torch", "manual_seed"), ("numpy.random", "seed")):
        if module in sys.modules:  # what is imported later begins with a seed of its own
            getattr(sys.modules[module], name)(seed)


@pytest.fixture
def group(tmp_path) -> Group:
    """Three bfloat16 experts of one tied base, one weight file each."""
    return make_group(tmp_path / "group")


@pytest.fixture
def without_picture(monkeypatch):
    """Merges write no gates.png: drawing it takes twenty times as long as these merges.

    The merges that run as whole processes draw it, and it has tests of its own.
    """
    monkeypatch.setattr("resmerge_stream.report.card.gates_png", lambda report: b"")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A Hub with a group of models, shared by the tests of a file."""
    from tests.support.hub_runs import running_bench  # most tests need no server

    with running_bench(tmp_path_factory.mktemp("hub")) as made:
        yield made


@pytest.fixture(scope="module")
def xet_bench(tmp_path_factory):
    """The same for a client that uses Xet storage."""
    from tests.support.hub_runs import running_bench

    with running_bench(tmp_path_factory.mktemp("hub-xet"), xet=True) as made:
        yield made


@pytest.fixture
def clean_hub(bench):
    """The Hub behaves, has heard nothing yet, and has none of the shards to be sent."""
    bench.hub.log.clear()
    bench.forget_uploads()
    yield
    bench.hub.faults.clear()


@pytest.fixture
def service(tmp_path, monkeypatch):
    """What is behind a page, in an empty folder: it knows alice and bob, and asks nobody."""
    from space.identity import Visitor, Visitors
    from space.jobs.jobs import Jobs
    from space.jobs.planning import Planners
    from space.search import Search
    from space.service import Service
    from space.settings import Settings

    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    known = {f"t-{name}": Visitor(name, f"t-{name}", ("team",)) for name in ("alice", "bob")}
    settings = Settings(folder=tmp_path / "space", prompts=0)
    made = Service(
        settings, Jobs(settings), Visitors(known.__getitem__), Search(), Planners(settings)
    )
    yield made
    made.close()


@pytest.fixture(scope="session")
def town(tmp_path_factory):
    """A Hub with a group and two users, and a Space for them (`tests.support.space_runs.Town`)."""
    from tests.support.space_runs import running_town

    with running_town(tmp_path_factory.mktemp("town")) as running:
        yield running


@pytest.fixture
def lone_town(tmp_path):
    """A town of a test's own, whose Space may be killed and started with other variables."""
    from tests.support.space_runs import running_town

    with running_town(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    """One Chromium for a file's visitors; a test that needs it is skipped where there is none."""
    from tests.support.browser import running_browser

    with running_browser() as running:
        yield running


@pytest.fixture
def visit(town, browser):
    """Lets somebody into the Space, with cookies and storage of their own."""
    from tests.support.browser import visitor
    from tests.support.space_pages import Visit

    contexts = []

    def enter(user: str | None = None, query: str = "", **options: object) -> Visit:
        context = visitor(browser, **options)
        contexts.append(context)
        guest = Visit(context.new_page(), town).open(query)
        return guest.sign_in(user) if user else guest

    yield enter
    for context in contexts:
        context.close()


@pytest.fixture
def default_signals():
    """Have what ends from outside end: nohup ignores SIGHUP, and a process that is ending both."""
    before = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)
