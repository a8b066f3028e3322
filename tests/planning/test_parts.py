"""Which part of a merge a run is, and which shards are whose."""

import json

import pytest

from resmerge_stream.cli.main import main
from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.options import Options
from resmerge_stream.planning.parts import Part, shares
from resmerge_stream.planning.plan import plan_merge
from tests.support.checkpoints import make_group, plan_group, recipe_of


def told_by(monkeypatch, env):
    """Have a scheduler's variables around, and no other's."""
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def array(number, low, high, step, count):
    """Return what SLURM 22.05 sets in a task of an array, as seen there."""
    values = {"ID": number, "MIN": low, "MAX": high, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items()}


@pytest.mark.parametrize(
    ("text", "env", "part"),
    [
        ("1/4", {}, Part(1, 4)),
        ("auto", array(0, 0, 3, 1, 4), Part(0, 4)),
        ("auto", array(5, 2, 8, 3, 3), Part(1, 3)),
        ("auto/8", array(5, 5, 5, 1, 1), Part(5, 8)),
        ("auto/4", {"JOB_COMPLETION_INDEX": "3"}, Part(3, 4)),
        ("auto", {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Part(1, 2)),
        ("auto", {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", **array(1, 0, 2, 1, 3)},
         Part(1, 3)),
        ("finish", {}, Part(None, 0)),
    ],
)  # fmt: skip
def test_a_part_is_what_was_said_or_what_the_scheduler_says(text, env, part, monkeypatch):
    """A number written out is that; an array counts before the step that runs it."""
    told_by(monkeypatch, env)

    assert Options.parsed({"part": text}).part == part


@pytest.mark.parametrize(
    ("text", "env", "words"),
    [
        ("4/4", {}, "no part 4 of 4"),
        ("1", {}, "such as 0/4"),
        (True, {}, "such as 0/4"),
        ("auto", {}, "no scheduler says"),
        # The script of a batch job is no step, whatever number it has.
        ("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "no scheduler says"),
        ("auto", array(3, 1, 7, 1, 3), "not evenly spaced"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "write auto/N"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "no part 2 of 2"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "x"}, "whole number"),
    ],
)
def test_what_is_no_part_is_refused(text, env, words, monkeypatch):
    """With what to write instead."""
    told_by(monkeypatch, env)

    with pytest.raises(RecipeError, match=words):
        Options.parsed({"part": text})


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_shares_are_even_and_everybody_s_shards_are_everything(count):
    """No part has more than the least-laden one by more than its smallest shard."""
    seconds = [7.0, 1.0, 1.0, 2.5, 4.0, 4.0, 0.5, 3.0, 1.5, 2.0]

    found = shares(seconds, count)

    parts = [[s for s, part in zip(seconds, found, strict=True) if part == n] for n in range(count)]
    assert sorted(s for part in parts for s in part) == sorted(seconds)
    least = min(sum(part) for part in parts)
    for part in parts:
        assert not part or sum(part) - min(part) <= least + 1e-9


def test_a_plan_shows_its_part(tmp_path, capsys):
    """Its shards and the time that they take; the whole is what all parts make."""
    group = make_group(tmp_path / "group", experts=2)
    whole = plan_group(group, options=Options(max_shard_bytes=3000))
    own, seconds = [], []
    for number in range(3):
        options = Options(max_shard_bytes=3000, part=Part(number, 3))
        plan = plan_merge(recipe_of(group), options)
        assert plan.plan_hash == whole.plan_hash
        own += plan.own
        seconds.append(plan.compute_seconds)
    assert sorted(own) == [shard.name for shard in whole.shards]
    assert max(seconds) < whole.compute_seconds

    recipe = tmp_path / "recipe.yml"
    recipe.write_text(recipe_of(group).to_yaml())
    words = ["plan", str(recipe), "--max-shard-size", "3KB", "--part", "2/3"]
    assert main(words) == 0
    assert f"part:     2/3, {len(plan.own)} file(s): '{plan.own[0]}'" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["part"], told["own"]) == ("2/3", list(plan.own))


def test_a_part_without_a_shard_is_told(tmp_path):
    """More parts than files: those that have nothing to do end well, and the plan says so."""
    group = make_group(tmp_path / "group", experts=2)

    plan = plan_group(group, options=Options(part=Part(3, 4)))

    assert plan.own == ()
    assert any("has nothing to do: the output has 1 files" in text for text in plan.warnings)


def test_what_has_no_parts_says_so(tmp_path, capsys):
    """Only a merge has them."""
    group = make_group(tmp_path / "group", experts=2)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(recipe_of(group).to_yaml())

    words = [str(recipe), "--out", str(tmp_path / "out"), "--part", "0/2"]
    assert main(["analyse", *words]) == 2
    assert "only 'merge' runs in parts" in capsys.readouterr().err
    assert main(["merge", *words, "--discard-staging"]) == 2
    assert "what other parts made" in capsys.readouterr().err
    assert main(["merge", *words, "--push-to", "me/merged"]) == 2
    assert "give --out or --push-to" in capsys.readouterr().err
