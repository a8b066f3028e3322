"""The Hub's machines for an evaluation: which hold the largest model, in what time."""

import pytest

from resmerge_stream.errors import RecipeError
from resmerge_stream.evaluation.machines import EvaluationCost, cpu_seconds
from resmerge_stream.evaluation.tasks import Harness, find_tasks
from resmerge_stream.hub.flavors import FLAVORS, Flavor
from resmerge_stream.planning.machines import assumed, ranked
from resmerge_stream.specs import TensorSpec

TASKS = (Harness("gsm8k", None),)


def cost(billions, dtype="BF16", count=3, limit=500, **more):
    """Return what it takes to ask models of so many parameters."""
    model = [TensorSpec("w", dtype, (int(billions * 1000), 1_000_000))]
    return EvaluationCost.of([model] * count, TASKS, limit, **more)


def chosen(it):
    """Return the name of the machine that comes first, None where none fits."""
    best = ranked(FLAVORS, it.seconds, it.shortage)[0]
    return best.flavor.name if best.fits else None


@pytest.mark.parametrize(
    ("billions", "dtype", "name"),
    [
        (0.5, "BF16", "l4x1"),
        (8, "BF16", "l4x1"),
        (8, "F32", "l40sx1"),
        (14, "BF16", "l40sx1"),
        (33, "BF16", "rtx-pro-6000"),
        (50, "BF16", "h200"),
        (70, "BF16", None),
    ],
)
def test_the_gpu_is_chosen_by_the_models_size(billions, dtype, name):
    """The cheapest single GPU that has a fifth of its memory left beside the weights."""
    assert chosen(cost(billions, dtype)) == name


@pytest.mark.parametrize(
    ("flavor", "more", "words"),
    [
        (Flavor("x", 8, 64, 500, 0, 1), {}, "it has no GPU"),
        (Flavor("x", 8, 64, 500, 16, 1), {}, "on a GPU"),
        (Flavor("x", 8, 64, 500, 96, 1, 4), {"billions": 14}, "of 24 GB may be weights"),
        (Flavor("x", 8, 15, 500, 24, 1), {}, "of memory"),
        (Flavor("x", 8, 64, 50, 24, 1), {}, "disk"),
        (Flavor("x", 8, 64, 80, 24, 1), {"taken_bytes": 30 * 10**9}, "disk"),
        (Flavor("t4-x", 8, 64, 500, 16, 1), {"billions": 1}, "bf16"),
        (Flavor("x", 8, 30, 500, 0, 1), {"device": "cpu"}, "of memory"),
        (Flavor("x", 8, 64, 500, 24, 1), {"device": "mps"}, "of the kind mps"),
    ],
    ids=["none", "small", "several", "memory", "disk", "merge", "t4", "cpu", "mps"],
)
def test_what_a_machine_lacks_for_an_evaluation_is_named(flavor, more, words):
    """A GPU, its memory, the machine's memory and its disk: each is said where it is short."""
    assert words in cost(more.pop("billions", 8), **more).shortage(flavor)


def test_a_small_model_may_be_asked_on_a_cpu():
    """With --device cpu no GPU is paid for."""
    assert chosen(cost(0.1, device="cpu")) == "cpu-upgrade"


def test_more_models_and_more_questions_take_longer():
    """The time grows with the models, their size and the questions, and is what is paid."""
    flavor = next(one for one in FLAVORS if one.name == "a100-large")
    speed = assumed(flavor)
    once = cost(8, count=1, limit=32).seconds(flavor, speed)

    assert cost(8, count=2, limit=32).seconds(flavor, speed) == pytest.approx(2 * once)
    assert cost(16, count=1, limit=32).seconds(flavor, speed) > once
    assert cost(8, count=1, limit=64).seconds(flavor, speed) > once


def test_tasks_of_one_name_are_refused(tmp_path):
    """Two files of the same name could not be told apart in the table."""
    paths = [tmp_path / "a" / "q.jsonl", tmp_path / "b" / "q.jsonl"]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"prompt": "a", "answer": "b"}\n')

    with pytest.raises(RecipeError, match="same name"):
        find_tasks([str(path) for path in paths], 5)


def test_a_cpu_takes_longer_for_more_of_anything():
    """Elements, questions beyond a batch, tokens and models cost time; cores save it."""
    least = cpu_seconds(10**9, 4, 20, 32, 2)

    assert least > 100
    for more in (
        cpu_seconds(2 * 10**9, 4, 20, 32, 2),
        cpu_seconds(10**9, 4, 33, 32, 2),
        cpu_seconds(10**9, 4, 20, 64, 2),
        cpu_seconds(10**9, 8, 20, 32, 2),
        cpu_seconds(10**9, 4, 20, 32, 1),
    ):
        assert more > least
