"""Recipes of merged models: from their folder, their repository, their card."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loopback_hub import LoopbackHub
from resmerge_stream.cli.main import main
from resmerge_stream.device import default_work_dir
from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.recipe_places import recipe_at, recipes_in_card
from resmerge_stream.recipe import ModelRef
from tests.support.checkpoints import ROOT, make_group, read_tensors

MODELS = Path(__file__).parents[1] / "data" / "mergekit_tokens"
RECIPE = (MODELS / "recipes" / "base.yml").read_text()
CODE = "Text with ```ticks```.\n\n```python\nmerge_method = 1\n```\n"
CARD = f"# A merge\n\n{CODE}\n```yaml\n{RECIPE}```\n"


def test_a_card_may_hold_a_recipe_among_other_blocks():
    """Fenced blocks with a merge_method are recipes, whatever the fence says; others are not."""
    assert recipes_in_card(CARD) == [RECIPE]
    assert recipes_in_card(CARD.replace("```yaml", "~~~").replace("```\n", "~~~\n")[:-4]) == []
    assert recipes_in_card(f"````\n{RECIPE}\n````\n") == [f"{RECIPE}\n"]


def test_a_merged_models_folder_is_a_recipe(tmp_path):
    """Its recipe file counts before its card; a folder without either is refused."""
    (tmp_path / "README.md").write_text(CARD)
    from_card = recipe_at(str(tmp_path))
    (tmp_path / "mergekit_config.yml").write_text(RECIPE.replace("0.5", "0.6"))
    from_file = recipe_at(str(tmp_path))
    (tmp_path / "empty").mkdir()

    assert from_card.experts[0].weight == 0.5
    assert from_file.experts[0].weight == 0.6
    with pytest.raises(RecipeError, match="holds no recipe"):
        recipe_at(str(tmp_path / "empty"))


def test_a_card_with_several_recipes_is_refused(tmp_path):
    """Nobody chooses one of several merges for the user."""
    (tmp_path / "README.md").write_text(CARD + CARD)

    with pytest.raises(RecipeError, match="holds 2 recipes"):
        recipe_at(str(tmp_path))


@pytest.mark.parametrize("name", ["missing.yml", "recipes/missing.yml", "no such place"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name):
    """What ends like a recipe file is one."""
    with pytest.raises(RecipeError, match="cannot read"):
        recipe_at(name)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with the models of a group whose tokens differ, and merges of them."""
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_user("alice")
        for name in ("base", "expert0", "expert1", "expert2"):
            files = {p.name: p.read_bytes() for p in (MODELS / name).iterdir()}
            hub.add_repo(f"alice/{name}")
            hub.push(f"alice/{name}", files)
        recipe = yaml.safe_load(RECIPE)
        recipe["base_model"] = "alice/base"
        recipe["tokenizer_source"] = "union"
        for model in recipe["models"]:
            model["model"] = f"alice/{model['model']}"
        text = yaml.safe_dump(recipe)
        for name, file, data in (
            ("file", "mergekit_config.yml", text),
            ("card", "README.md", f"```yaml\n{text}```\n"),
            ("none", "README.md", "nothing"),
        ):
            hub.add_repo(f"alice/{name}")
            hub.push(f"alice/{name}", {file: data.encode()})
        yield hub


def command(hub, folder, *words):
    """Run the command line against the Hub."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= hub.env(hub.add_token("alice", "read"), home=folder / "home")
    env |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "resmerge_stream", *words],
        env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_merge_on_the_hub_is_made_again_by_its_name(hub, tmp_path):
    """The recipe in a repository merges from the Hub, tokens matched, as it does from folders."""
    by_name = command(hub, tmp_path, "merge", "alice/file", "--out", "by_name")
    address = "https://huggingface.co/alice/card/blob/main/README.md"
    by_card = command(hub, tmp_path, "plan", address, "--json")
    none = command(hub, tmp_path, "plan", "alice/none")
    shutil.copytree(MODELS, tmp_path / "here")
    union = RECIPE.replace("tokenizer_source: base", "tokenizer_source: union")
    (tmp_path / "here" / "union.yml").write_text(union)
    local = command(hub, tmp_path / "here", "merge", "union.yml", "--out", "out")

    assert (by_name.returncode, local.returncode) == (0, 0), by_name.stderr + local.stderr
    ours, theirs = read_tensors(tmp_path / "by_name"), read_tensors(tmp_path / "here" / "out")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [s["id"] for s in json.loads(by_card.stdout)["sources"]][:2] == [
        "alice/base",
        "alice/expert0",
    ]
    assert none.returncode == 2
    assert "holds no recipe" in none.stderr


class TestRepeated:
    """A merge of local folders is repeated from its own folder."""

    @pytest.fixture
    def merged(self, tmp_path):
        """A weighted merge with a tokenizer of its own, and its group."""
        group = make_group(tmp_path / "group", layers=1)
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(group.base),
            "models": [
                {"model": str(expert), "parameters": {"weight": 0.1 * (number + 1)}}
                for number, expert in enumerate(group.experts)
            ],
        }
        (tmp_path / "mine.yml").write_text(json.dumps(recipe))
        assert main(["merge", str(tmp_path / "mine.yml"), "--out", str(tmp_path / "merged")]) == 0
        return group

    def test_where_it_was_made_nothing_has_to_be_said(self, merged, tmp_path, monkeypatch):
        """From another working directory, with the same bytes; no file of it holds a path."""
        (tmp_path / "far").mkdir()
        monkeypatch.chdir(tmp_path / "far")

        assert main(["merge", "../merged", "--out", "again"]) == 0

        assert weights_of(Path("again")) == weights_of(tmp_path / "merged")
        files = [p for p in (tmp_path / "merged").rglob("*") if p.is_file()]
        assert not [p for p in files if str(tmp_path).encode() in p.read_bytes()]

    def test_what_is_changed_in_its_recipe_counts(self, merged, tmp_path):
        """The recipe of the folder is what is merged; only the places come from elsewhere."""
        file = tmp_path / "merged" / "resmerge" / "recipe.yml"
        file.write_text(file.read_text().replace("0.1", "0.7"))

        recipe = recipe_at(str(tmp_path / "merged"))

        assert [ref.weight for ref in recipe.experts] == pytest.approx([0.7, 0.2, 0.3])
        assert [ref.id for ref in recipe.models] == [str(merged.base), *map(str, merged.experts)]

    def test_elsewhere_it_says_what_is_missing_and_how_to_give_it(
        self, merged, tmp_path, monkeypatch, capsys
    ):
        """All missing folders are named once, and the options that it asks for merge, weighted."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
        monkeypatch.chdir(tmp_path)

        assert main(["merge", "merged", "--out", "again"]) == 2
        said = capsys.readouterr().err
        assert said.count("no folder") == 1
        assert "'base', 'expert0', 'expert1', 'expert2'" in said
        assert "--base ID for the base, --expert ID for each of the experts" in said

        words = ["--base", str(merged.base)]
        words += [word for expert in merged.experts for word in ("--expert", str(expert))]
        assert main(["merge", "merged", "--out", "again", *words]) == 0
        assert weights_of(tmp_path / "again") == weights_of(tmp_path / "merged")

    @pytest.mark.parametrize("kept", ["", "[]", '{"base": 1}', '{"base": ["a"]}', "{"])
    def test_a_file_of_places_that_is_none_is_passed_over(self, kept, merged, tmp_path):
        """Whatever became of the file, the recipe is read as it is published."""
        for file in default_work_dir().glob("places/*.json"):
            file.write_text(kept)

        assert recipe_at(str(tmp_path / "merged")).base == ModelRef("base")

    def test_a_report_leads_to_no_other_file(self, merged, tmp_path):
        """A report is anybody's: what it calls its plan is a hash, or nothing."""
        (tmp_path / "places.json").write_text('{"base": ["elsewhere", null, null]}')
        report = tmp_path / "merged" / "resmerge" / "report.json"
        way = os.path.relpath(tmp_path / "places", default_work_dir() / "places")
        report.write_text(json.dumps({**json.loads(report.read_text()), "plan_hash": way}))

        assert recipe_at(str(tmp_path / "merged")).base == ModelRef("base")

    def test_a_cache_that_cannot_be_written_fails_no_merge(self, tmp_path, monkeypatch):
        """Then the merge is one of another machine: its names are all that is known."""
        group = make_group(tmp_path / "group", layers=1)
        (tmp_path / "cache").write_text("a file")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        words = ["--base", str(group.base), "--expert", str(group.experts[0])]
        work = ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "out")]

        assert main(["merge", *words, *work]) == 0

        assert recipe_at(str(tmp_path / "out")).base == ModelRef("base")


def weights_of(folder):
    """Return the bytes of a folder's weight files by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
