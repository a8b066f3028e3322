"""Plans in processes of their own: whose turn it is, and when one is ended."""

import subprocess
import sys
import threading

import pytest

from resmerge_stream.errors import RecipeError
from space.asked import web_request
from space.examples import examples
from space.identity import Visitor
from space.jobs import planning
from space.jobs.planning import Planners, Turns
from space.settings import Settings
from tests.support.space_runs import wait_for


def test_whoever_has_used_less_comes_first():
    """What took long counts for more than how often: the next turn is the lightest visitor's."""
    now = [0.0]
    turns, served = Turns(1, clock=lambda: now[0]), []
    for who, seconds in (("heavy", 40.0), ("light", 1.0)):
        with turns.turn(who):
            now[0] += seconds
    end, holding = threading.Event(), threading.Event()

    def ask(who):
        with turns.turn(who):
            served.append(who)
            holding.set()
            end.wait(30)

    threads = [threading.Thread(target=ask, args=(who,)) for who in ("first", "heavy", "light")]
    threads[0].start()
    assert holding.wait(30)
    threads[1].start()
    wait_for(lambda: len(turns._waiting) == 1, "the heavy to wait")
    threads[2].start()
    wait_for(lambda: len(turns._waiting) == 2, "the light to wait")

    end.set()
    for thread in threads:
        thread.join(30)
    assert served == ["first", "light", "heavy"]


def test_those_who_take_long_never_hold_every_place():
    """The last place stays free for who has used next to nothing, and is theirs at once."""
    now = [0.0]
    turns, end = Turns(3, clock=lambda: now[0]), threading.Event()
    heavy = [f"192.0.{n}.1" for n in range(6)]
    for who in heavy:
        with turns.turn(who):
            now[0] += 15

    def hold(who):
        with turns.turn(who):
            end.wait(30)

    threads = [threading.Thread(target=hold, args=(who,)) for who in heavy]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(turns._running) == 2 and len(turns._waiting) == 4, "two to run")

    with turns.turn("198.51.100.1"):
        assert sorted(turns._running)[-1] == "198.51.100.1"
    end.set()
    for thread in threads:
        thread.join(30)


def test_the_example_does_not_wait_behind_strangers(tmp_path):
    """All places taken by others' plans, the example is planned at once."""
    planners, end = Planners(Settings(folder=tmp_path)), threading.Event()

    def hold(who):
        with planners._turns.turn(who):
            end.wait(60)

    threads = [threading.Thread(target=hold, args=(f"192.0.{n}.1",)) for n in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(planners._turns._running) == 3, "all places to be taken")
    asked = web_request({"recipe": examples()[0].recipe}, planners._settings)

    plan = planners.plan(asked, Visitor(), "192.0.2.1")

    end.set()
    for thread in threads:
        thread.join(60)
    planners.close()
    assert not plan["refused"]


def test_who_has_many_waiting_hears_that_it_is_busy():
    """A fifth request of one visitor is refused at once, and takes no place."""
    turns, end = Turns(1), threading.Event()
    started = threading.Barrier(2)

    def hold():
        with turns.turn("a"):
            started.wait(30)
            end.wait(30)

    def wait():
        with turns.turn("a"):
            pass

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    started.wait(30)
    threads += [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: len(turns._waiting) == 4, "four to wait")

    with pytest.raises(RecipeError, match="busy"), turns.turn("a"):
        pass
    end.set()
    for thread in threads:
        thread.join(30)


def test_a_plan_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    """Its process is killed, the visitor hears why, and the next plan is made by another."""
    planners = Planners(Settings(folder=tmp_path, anonymous_plan_seconds=3))
    stuck = subprocess.Popen(
        ["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    monkeypatch.setattr(planning, "start_worker", lambda settings, module: stuck)
    asked = web_request({"recipe": examples()[0].recipe}, planners._settings)

    with pytest.raises(RecipeError, match="took more than 3 s"):
        planners.plan(asked, Visitor(), "192.0.2.1")

    assert stuck.poll() is not None
    assert not any(planners._idle.values())
    planners.close()


def test_the_example_has_a_process_of_its_own(tmp_path, monkeypatch):
    """However many plans of strangers hold a process, the example waits for none to start."""
    planners, started = Planners(Settings(folder=tmp_path)), []
    answer = 'import sys\nfor line in sys.stdin: print(\'{"plan": {"hardware": []}}\', flush=True)'

    def start(settings, module):
        started.append(module)
        return subprocess.Popen(
            [sys.executable, "-S", "-c", answer],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    monkeypatch.setattr(planning, "start_worker", start)
    planners.warm()
    of_strangers = planners._take(planners._turns)
    began = len(started)

    planners.plan(
        web_request({"recipe": examples()[0].recipe}, planners._settings), Visitor(), "192.0.2.1"
    )

    assert len(started) == began == 2
    planners._put_back(planners._turns, of_strangers)
    planners.close()
