"""What ends a run from outside: SIGTERM, as Jobs, containers and schedulers send it."""

import signal
import time

import pytest

from loopback_hub import Answer, Hook
from resmerge_stream.cli.commands import _GRACE_S
from tests.support.hub_runs import Bench

pytestmark = pytest.mark.usefixtures("clean_hub", "default_signals")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_end_a_merge_in_order(bench: Bench, signum: signal.Signals) -> None:
    """One line, exit 143 or 129 in seconds; what is finished stays, the same command continues."""
    out = bench.folder / signum.name
    arguments = ["merge", *bench.sources(), "--out", str(out), "--json"]
    process = bench.start(arguments)
    ended: list[float] = []

    def end() -> None:
        ended.append(time.monotonic())
        process.send_signal(signum)

    # While the last files are read, and the Hub does not answer any more.
    bench.hub.faults.add(Answer(status=503), method="GET", path="/file/|/resolve/", skip=16)
    bench.hub.faults.add(Hook(call=end), method="GET", path="/file/|/resolve/", skip=17, times=1)
    _, err = process.communicate(timeout=300)
    passed = time.monotonic() - ended[0]
    bench.hub.faults.clear()
    done = bench.fresh(arguments)

    assert process.returncode == 128 + signum, err
    # Ten seconds at most of this machine alone; without it, the Hub's patience of 15 minutes.
    assert _GRACE_S < 10
    assert passed < 120
    assert [line for line in err.splitlines() if "waiting" not in line] == [
        f"ended by {signum.name}; finished shards are kept, the same command continues."
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


def test_a_merge_behind_nohup_goes_on_when_the_terminal_is_closed(bench: Bench) -> None:
    """A signal that is ignored where a command starts ends nothing."""
    out = bench.folder / "nohup"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = bench.start(["merge", *bench.sources(), "--out", str(out), "--json"])
    finally:
        signal.signal(signal.SIGHUP, before)
    call = Hook(call=lambda: process.send_signal(signal.SIGHUP))
    bench.hub.faults.add(call, method="GET", path="/file/|/resolve/", skip=17, times=1)

    _, err = process.communicate(timeout=300)

    assert process.returncode == 0, err
