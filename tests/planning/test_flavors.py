"""The Hub's machines: which fit a plan, in what time, for how much."""

from dataclasses import replace

import pytest
from huggingface_hub import JobHardware

from resmerge_stream.hub.flavors import FLAVORS, Flavor, flavor_from_text
from resmerge_stream.planning.machines import (
    Estimate,
    Fleet,
    Speed,
    assumed,
    estimates,
    fleet,
    largest,
    shortage,
    timeout_for,
    worthwhile,
)
from resmerge_stream.planning.plan import Options, Plan, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from tests.support.checkpoints import plan_group


def plan_of(group, **options) -> Plan:
    """Plan the merge of a group, for the largest machine there is."""
    experts = tuple(ModelRef(str(folder)) for folder in group.experts)
    recipe = Recipe(ModelRef(str(group.base)), experts)
    return plan_merge(recipe, Options(**options), machine=largest())


def test_the_table_has_the_machines_that_the_client_knows():
    """A flavour that huggingface_hub gains or loses is noticed when it is updated."""
    assert {flavor.name for flavor in FLAVORS} == {str(item.value) for item in JobHardware}


def test_the_cheapest_that_fits_comes_first(group):
    """Estimates are ordered by whether the plan fits, then by price."""
    small = Flavor("small", 2, 0.1, 50, 0, 0.001)
    slow = Flavor("slow", 2, 16, 50, 0, 0.02)
    cheap = Flavor("cheap", 2, 16, 50, 0, 0.01)

    found = estimates(plan_of(group), [small, slow, cheap])

    assert [item.flavor.name for item in found] == ["cheap", "slow", "small"]
    assert [item.fits for item in found] == [True, True, False]
    assert isinstance(found[0], Estimate)


def test_more_directions_take_longer(group):
    """One direction, four, all: what a method has to find decides about its time."""
    exact = {"rank": 4, "steps": "exact"}
    methods = [("mean", {}), ("resmerge", {}), ("head_regression", exact), ("tsv_m", {})]

    seconds = [plan_group(group, method=m, parameters=p).compute_seconds for m, p in methods]

    assert seconds == sorted(set(seconds))


def test_more_cores_shorten_only_the_arithmetic(group):
    """A merge that the network holds up is as slow on a larger machine: the small one wins."""
    plan = plan_of(group)
    two, eight = FLAVORS[:2]
    busy = replace(plan, compute_seconds=36_000.0, read_bytes=0)
    waiting = replace(plan, compute_seconds=0.0, read_bytes=10**12)
    assert estimates(busy, [two, eight])[0].flavor is eight

    found = estimates(waiting, [two, eight])

    assert found[0].flavor is two
    assert found[0].seconds == found[1].seconds


@pytest.mark.parametrize(
    ("flavor", "options", "words"),
    [
        (Flavor("x", 2, 0.2, 50, 0, 1), {}, "memory"),
        (Flavor("x", 2, 16, 3, 0, 1), {}, "disk"),
        (Flavor("x", 2, 16, 50, 0, 1), {"device": "cuda:0"}, "no device of the kind"),
        (Flavor("x", 2, 16, 50, 16, 1), {"device": "mps"}, "no device of the kind"),
        (Flavor("x", 2, 1, 50, 0, 1), {"memory_budget": 2 * 10**9}, "memory"),
    ],
    ids=["memory", "disk", "gpu", "mps", "budget"],
)
def test_what_a_machine_lacks_is_named(group, flavor, options, words):
    """A machine that does not do is refused with the reason."""
    assert words in shortage(plan_of(group, **options), flavor)


def test_a_started_minute_is_paid(group):
    """Prices are by the minute, as the Hub bills."""
    flavor = Flavor("x", 2, 16, 50, 0, 6.0)

    assert [flavor.price(seconds) for seconds in (1, 60, 61)] == pytest.approx([0.1, 0.1, 0.2])


@pytest.mark.parametrize("seconds", [1.0, 600.0, 601.0, 40_000.0])
def test_the_timeout_leaves_a_margin(seconds):
    """A Job has three times its estimate, and never less than the Hub's own 30 minutes."""
    timeout = timeout_for(seconds)

    assert timeout >= max(3 * seconds, 1800)
    assert timeout % 600 == 0


def test_the_hubs_own_words_are_understood():
    """The live list gives sizes and prices as text; what is not understood is left out."""
    words = {"cpu": "2 vCPU", "ram": "16 GB", "disk": "1.5 TB", "gpu": "", "usd": 0.5}

    known = flavor_from_text("x", **words, unit="minute")

    assert known == Flavor("x", 2, 16, 1500, 0, 30.0)
    assert flavor_from_text("x", **words, unit="month") is None
    assert flavor_from_text("x", **{**words, "ram": "N/A"}, unit="minute") is None


# Several machines

SPEED = Speed(start_s=100.0, line=50e6)


def large(group, shards: int = 64, *, read: float = 0.0, compute: float = 0.0) -> Plan:
    """Return a plan of so many shards that reads so much and computes so long on two cores."""
    plan = plan_of(group)
    many = tuple(plan.shards[:1]) * shards
    return replace(plan, shards=many, read_bytes=int(read), compute_seconds=compute)


def test_one_machine_takes_what_was_estimated(group):
    """The first row of the table is the estimate of a single Job."""
    plan, flavor = large(group, read=1e12, compute=3000.0), FLAVORS[1]
    (estimate,) = estimates(plan, [flavor])

    alone = fleet(plan, flavor, assumed(flavor), 1)

    assert (alone.seconds, alone.price) == (estimate.seconds, estimate.price)


def test_twice_as_many_machines_take_half_of_all_but_the_start(group):
    """Each has a line and cores of its own, and all of them are paid."""
    plan, flavor = large(group, read=1e12), FLAVORS[0]

    found = [fleet(plan, flavor, SPEED, count) for count in (1, 2, 4, 8, 16)]

    assert [row.seconds - 100 for row in found] == [20_000 / row.machines for row in found]
    assert found[2].price == 4 * flavor.price(5100)


@pytest.mark.parametrize(
    ("work", "machines", "limit"),
    [
        ({"read": 1e12, "compute": 10.0}, 4, "line"),
        ({"read": 1e9, "compute": 40_000.0}, 4, "arithmetic"),
        ({"read": 1e12, "shards": 5}, 4, "whole shards"),
        ({"read": 1e12, "shards": 5000}, 16, "commits"),
        ({"read": 1e10}, 4, "start"),
    ],
    ids=["line", "arithmetic", "shards", "commits", "start"],
)
def test_what_several_machines_wait_for_is_named(group, work, machines, limit):
    """The part that takes longest decides, and the table says which it is."""
    assert fleet(large(group, **work), FLAVORS[0], SPEED, machines).limit == limit


def test_doubling_goes_on_as_long_as_it_pays():
    """Each doubling must make the merge one and a half times as fast; later ones do not count."""
    times = {1: 1000.0, 2: 520.0, 4: 340.0, 8: 330.0, 16: 100.0}

    chosen = worthwhile(Fleet(n, seconds, 1.0, "line") for n, seconds in times.items())

    assert chosen.machines == 4
