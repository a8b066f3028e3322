"""How one begins: a recipe with comments, one method's page, words that are completed or meant."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from resmerge_stream.cli.main import main
from resmerge_stream.experts.group import builtin_adapters, builtin_group
from resmerge_stream.methods import describe_methods, find_methods
from resmerge_stream.recipe import DEFAULT_METHOD
from tests.support.checkpoints import child_environment, make_group

COMPLETE = "import sys; from resmerge_stream.cli.main import main; main()"


def said(capsys, *args):
    """Return what a refused command says."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("method", [None, "ties:paper", "mean", "slerp"])
def test_init_writes_a_recipe_that_plans(method, tmp_path, capsys):
    """The file is ready: it plans, names every parameter, and a comment explains each."""
    out, options = tmp_path / "mine.yml", ["--method", method] if method else []
    if method == "slerp":  # of one model
        group = make_group(tmp_path / "group", experts=1)
        options += ["--base", str(group.base), "--expert", str(group.experts[0])]

    assert main(["init", str(out), *options]) == 0
    assert main(["plan", str(out), "--json"]) == 0

    plan = json.loads(capsys.readouterr().out)
    name = (method or DEFAULT_METHOD).partition(":")[0]
    assert plan["method"] == name
    (about,) = (one for one in describe_methods() if one["name"] == name)
    text = out.read_text()
    assert all(f"{one['name']}:" in text and one["label"] in text for one in about["parameters"])
    assert "preset" in yaml.safe_load(text).get("parameters", {}) or ":" not in str(method)


def test_init_keeps_what_is_there(tmp_path, capsys):
    """A file of that name is never written over."""
    out = tmp_path / "recipe.yml"
    out.write_text("mine")

    assert main(["init", str(out)]) == 2

    assert out.read_text() == "mine"
    assert "exists" in capsys.readouterr().err


def test_init_says_where_it_cannot_write(tmp_path, capsys):
    """A folder that is not there is no bug."""
    assert main(["init", str(tmp_path / "none" / "recipe.yml")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_methods_shows_one(capsys):
    """A name shows that method alone, with or without a preset; JSON too."""
    for words in (["ties"], ["ties:paper"], ["ties", "--json"]):
        assert main(["methods", *words]) == 0
        out = capsys.readouterr().out
        assert "density" in out
        assert "karcher" not in out


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["mrege"], "merge"), (["MERGE"], "merge"), (["merge", "--experts", "a"], "--expert"),
     (["plan", "--metod=ties"], "--method"), (["evaluate", "a", "--engine", "vlm"], "vllm")],
    ids=str,
)  # fmt: skip
def test_what_was_meant_is_said(words, meant, capsys):
    """A misspelt command, option or choice is answered with the one that is nearest."""
    assert f"Did you mean {meant!r}?" in said(capsys, *words)


@pytest.mark.parametrize("name", ["TIES", "tise", "Head_Regression"])
def test_a_method_that_was_meant_is_said(name, capsys):
    """So is a method, in whatever case."""
    assert main(["methods", name]) == 2

    meant = "head_regression" if name.startswith("H") else "ties"
    assert f"Did you mean {meant!r}?" in capsys.readouterr().err


def completed(line, folder):
    """Return what a shell is offered for a line, as argcomplete's scripts ask."""
    answer = folder / "answer"
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line, "COMP_POINT": str(len(line.encode())),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", COMPLETE], env=child_environment() | asked, cwd=folder, timeout=120,
        check=False,
    )  # fmt: skip
    return answer.read_text().split("\n")


def test_a_shell_completes_commands_options_and_methods(tmp_path):
    """What the parser knows is offered: commands, a command's options, the methods."""
    assert completed("resmerge-stream me", tmp_path) == ["merge", "methods"]
    assert "--expert" in completed("resmerge-stream plan --exp", tmp_path)
    assert set(completed("resmerge-stream plan --method ", tmp_path)) == set(find_methods())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_one(shell):
    """What the documentation has a shell read is there, and bash can read it."""
    script = Path(sys.executable).with_name("register-python-argcomplete")
    made = subprocess.run(
        [script, "--shell", shell, "resmerge-stream"], capture_output=True, text=True, check=True
    ).stdout

    assert "resmerge-stream" in made
    checked = shutil.which(shell)
    if checked:
        asked = [checked, "-n"] if shell != "fish" else [checked, "--no-execute"]
        subprocess.run(asked, input=made, text=True, check=True, env=dict(os.environ))


GROUP = builtin_group()
MODELS = ["--base", str(GROUP["base"]), "--expert", str(GROUP["rl-add"])]


@pytest.mark.parametrize(
    ("words", "parts"),
    [(["plan", *MODELS, "--device", "cuda"], ["there is no cuda", "--device cpu"]),
     (["plan", *MODELS, "--max-shard-size", "5"], ["5 bytes", "5GB"]),
     (["verify", "no-such"], ["there is no folder 'no-such'"]),
     (["extract", MODELS[1], "--base", MODELS[1], "--dry-run"], ["is the base itself"]),
     (["plan", *MODELS, str(GROUP["rl-sort"])], ["--expert", "rl-sort"])],
    ids=["no GPU", "no unit", "no folder", "no difference", "no option"],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_do(words, parts, capsys, monkeypatch):
    """A slip is named before anything runs, with the way out."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert main(words) == 2

    told = "".join(capsys.readouterr())
    assert all(part in told for part in parts), told


def test_a_plan_says_which_experts_are_adapters(capsys):
    """Their number and ranks stand with the sources; a whole expert is no adapter."""
    lora = builtin_adapters()["lora-sort"]
    rank = json.loads((lora / "adapter_config.json").read_text())["r"]

    assert main(["plan", *MODELS, "--expert", str(lora)]) == 0
    assert f"2 expert(s), 1 of them LoRA adapters (rank {rank})" in capsys.readouterr().out
    assert main(["plan", *MODELS, "--expert", str(lora), "--json"]) == 0

    sources = json.loads(capsys.readouterr().out)["sources"]
    assert [source["adapter_rank"] for source in sources] == [None, None, rank]
