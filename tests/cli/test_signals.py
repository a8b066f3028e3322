"""What ends a run from outside: SIGTERM, as Jobs, containers and schedulers send it."""

import signal
import time

import pytest

from resmerge_stream.cli.commands import _GRACE_S
from tests.loopback_hub import Answer, Hook
from tests.support.hub_runs import Bench

pytestmark = pytest.mark.usefixtures("clean_hub")


@pytest.mark.slow
def test_sigterm_ends_a_merge_in_order(bench: Bench) -> None:
    """One line, exit 143 in seconds; what is finished stays, the same command continues."""
    out = bench.folder / "ended"
    arguments = ["merge", *bench.sources(), "--out", str(out), "--json"]
    process = bench.start(arguments)
    ended: list[float] = []

    def end() -> None:
        ended.append(time.monotonic())
        process.send_signal(signal.SIGTERM)

    # While the last files are read, and the Hub does not answer any more.
    bench.hub.faults.add(Answer(status=503), method="GET", path="/file/|/resolve/", skip=16)
    bench.hub.faults.add(Hook(call=end), method="GET", path="/file/|/resolve/", skip=17, times=1)
    _, err = process.communicate(timeout=300)
    passed = time.monotonic() - ended[0]
    bench.hub.faults.clear()
    done = bench.fresh(arguments)

    assert process.returncode == 143, err
    # Ten seconds at most of this machine alone; without it, the Hub's patience of 15 minutes.
    assert _GRACE_S < 10
    assert passed < 120
    assert [line for line in err.splitlines() if "waiting" not in line] == [
        "ended by SIGTERM; finished shards are kept, the same command continues."
    ]
    assert done.code == 0, done.err


@pytest.mark.slow
def test_an_outage_is_counted_down_aloud_and_given_up_in_time(bench: Bench) -> None:
    """`--patience` says how long; a log says what is waited for; exit 3 then."""
    bench.hub.faults.add(Answer(status=503), method="GET", path="/file/", port="cdn", skip=14)
    arguments = ["merge", *bench.sources(), "--out", str(bench.folder / "out"), "--patience", "8"]

    done = bench.fresh(arguments)

    assert done.code == 3, done.err
    assert "waiting: cannot read" in done.err
    assert "giving up in" in done.err
