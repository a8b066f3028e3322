"""What makes a model talk is part of a merge: template, special tokens, generation config."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from resmerge_stream.errors import RecipeError
from resmerge_stream.planning.chat_templates import TEMPLATES
from resmerge_stream.planning.options import Options
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.planning.recipe_file import parse_recipe
from resmerge_stream.recipe import ModelRef, Tokenizer, override
from resmerge_stream.run.engine import run_merge
from tests.support.checkpoints import edit_config, make_group, recipe_of, write_json

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
RENDERED = json.loads((Path(__file__).parents[1] / "data/mergekit_templates.json").read_text())
GENERATION = "generation_config.json"

pytestmark = pytest.mark.usefixtures("without_picture")


def edited(path, **changes):
    """Change keys of a JSON file."""
    write_json(path, json.loads(path.read_text()) | changes)


def talks(folder, template=TEMPLATE, eos="w9", **settings):
    """Have a checkpoint talk: a template, another eos token, settings for generating."""
    edited(folder / "tokenizer_config.json", eos_token=eos)
    (folder / "chat_template.jinja").write_text(template)
    write_json(folder / GENERATION, {"eos_token_id": [9, 2], "temperature": 0.6, **settings})


def group_of(tmp_path, experts=2, **settings):
    """Return a base that does not talk, and experts that do."""
    group = make_group(tmp_path / "group", experts=experts)
    for folder in group.experts:
        talks(folder, **settings)
    return group


def merged(group, out, options=None, **changes):
    """Merge a group; return the plan's warnings, and the small files by name."""
    recipe = replace(recipe_of(group, method="mean"), **changes)
    plan = plan_merge(recipe, options, out=out)
    list(run_merge(plan, out=out))
    files = {path.name: path for path in out.iterdir() if path.is_file()}
    return [str(text) for text in plan.warnings], files


def said(files, name, key):
    """Return what one of the written files says."""
    return json.loads(files[name].read_text()).get(key)


def check_agreement(files):
    """Assert that config, generation config and tokenizer name one eos token."""
    number = {"</s>": 2, "w9": 9}[said(files, "tokenizer_config.json", "eos_token")]
    stops = said(files, GENERATION, "eos_token_id")
    assert said(files, "config.json", "eos_token_id") == number
    assert number in (stops if isinstance(stops, list) else [stops])


def test_a_base_that_does_not_talk_talks_as_all_its_experts(tmp_path):
    """RL experts of a base model: their template, special tokens and settings, said in the plan."""
    group = group_of(tmp_path)

    warnings, files = merged(group, tmp_path / "out")

    assert files["chat_template.jinja"].read_text() == TEMPLATE
    assert files[GENERATION].read_bytes() == (group.experts[0] / GENERATION).read_bytes()
    assert said(files, "tokenizer_config.json", "eos_token") == "w9"
    check_agreement(files)
    assert any("2 of 2 experts have a chat template, the base has none" in w for w in warnings)
    assert "2 of 2 experts have a chat template" in files["README.md"].read_text()


def test_the_base_stays_silent_where_it_is_asked_to(tmp_path):
    """The named way out, the base's own tokenizer, keeps all that the base says."""
    group = group_of(tmp_path)
    first, _ = merged(group, tmp_path / "first")

    _, files = merged(group, tmp_path / "out", Options(tokenizer_from=str(group.base)))

    assert any(f"--tokenizer-from {group.base}" in text for text in first)
    assert "chat_template.jinja" not in files
    for name in (GENERATION, "tokenizer_config.json"):
        assert files[name].read_bytes() == (group.base / name).read_bytes()


def test_settings_that_experts_do_not_share_stay_the_bases(tmp_path):
    """The template is theirs; of the base's settings only the end of a turn is added."""
    group = group_of(tmp_path)
    talks(group.experts[1], top_p=0.5)

    warnings, files = merged(group, tmp_path / "out")
    recipe = {"generation_config": ModelRef(str(group.experts[1]))}
    _, chosen = merged(group, tmp_path / "chosen", **recipe)

    assert said(files, GENERATION, "eos_token_id") == [9, 2]
    assert said(files, GENERATION, "temperature") is None
    check_agreement(files)
    assert any("temperature, top_p" in text and "--generation-config" in text for text in warnings)
    assert chosen[GENERATION].read_bytes() == (group.experts[1] / GENERATION).read_bytes()


def test_experts_that_talk_otherwise_leave_the_base_as_it_is(tmp_path):
    """The plan counts them and names ways out, of which each does what it says."""
    group = group_of(tmp_path)
    (group.experts[1] / "chat_template.jinja").write_text("{{ messages }}")

    warnings, files = merged(group, tmp_path / "out")
    _, auto = merged(group, tmp_path / "auto", chat_template="auto")
    options = Options(tokenizer_from=str(group.experts[1]))
    _, taken = merged(group, tmp_path / "taken", options)

    assert "chat_template.jinja" not in files
    assert files[GENERATION].read_bytes() == (group.base / GENERATION).read_bytes()
    (template,) = [text for text in warnings if "a chat template, none is in" in text]
    (eos,) = [text for text in warnings if "'w9' as their eos token" in text]
    assert template.startswith("2 of 2 experts")
    assert "--chat-template auto" in template
    assert "--tokenizer-from" in eos
    assert auto["chat_template.jinja"].read_text() == TEMPLATE
    assert taken["chat_template.jinja"].read_text() == "{{ messages }}"
    check_agreement(taken)


def test_a_base_that_talks_keeps_its_own_and_says_what_experts_have(tmp_path):
    """An instruction model's template is not replaced; other templates of experts are counted."""
    group = group_of(tmp_path)
    talks(group.base, template="{{ messages }}")

    warnings, files = merged(group, tmp_path / "out")

    assert files["chat_template.jinja"].read_text() == "{{ messages }}"
    assert any("2 of 2 experts have another chat template" in text for text in warnings)


def test_nothing_is_said_where_all_talk_alike(tmp_path):
    """Base and experts with the same files need no word."""
    group = group_of(tmp_path)
    talks(group.base)

    warnings, _ = merged(group, tmp_path / "out")

    assert not [text for text in warnings if "experts" in text or "token" in text]


def test_a_borrowed_tokenizer_is_named_by_the_configs(tmp_path):
    """Its eos token ends generation, beside the base's; the plan says what was changed."""
    group = group_of(tmp_path, experts=1)
    (group.experts[0] / GENERATION).unlink()
    options = Options(tokenizer_from=str(group.experts[0]))

    warnings, files = merged(group, tmp_path / "out", options)

    check_agreement(files)
    assert any("eos_token_id 2 → 9 (w9)" in text for text in warnings)


@pytest.mark.parametrize("source", ["expert", "union"])
def test_with_tokens_matched_the_ways_out_are_open(source, tmp_path):
    """With a model's tokens the configs name its eos token; with the union a model is named."""
    group = group_of(tmp_path, experts=1)
    ref = ModelRef(str(group.experts[0]))
    asked = Tokenizer(ref if source == "expert" else source)

    warnings, files = merged(group, tmp_path / "out", tokenizer=asked, generation_config=ref)

    if source == "expert":
        check_agreement(files)
    else:
        (eos,) = [text for text in warnings if "as their eos token" in text]
        assert f"--tokenizer-source {ref.id}" in eos
    assert said(files, GENERATION, "temperature") == 0.6


def test_a_generation_config_of_another_model_is_taken(tmp_path):
    """A model that is not merged gives its generation config, by recipe, option and card."""
    group = make_group(tmp_path / "group", experts=1)
    other = make_group(tmp_path / "other", experts=0).base
    write_json(other / GENERATION, {"eos_token_id": 2, "top_k": 7})
    recipe = recipe_of(group, method="mean").to_dict() | {"generation_config": str(other)}
    read = parse_recipe(yaml.safe_dump(recipe))

    _, files = merged(group, tmp_path / "out", generation_config=read.generation_config)

    assert override(read, generation_config=str(other)) == read
    assert parse_recipe(read.to_yaml()) == read
    assert said(files, GENERATION, "top_k") == 7
    written = yaml.safe_load((tmp_path / "out/resmerge/recipe.yml").read_text())
    assert written["generation_config"] == "base-2"


def test_a_generation_config_that_is_not_there_is_refused(tmp_path):
    """A model that has none cannot give it."""
    group = make_group(tmp_path, experts=1)
    (group.experts[0] / GENERATION).unlink()
    recipe = replace(
        recipe_of(group, method="mean"), generation_config=ModelRef(str(group.experts[0]))
    )

    (problem,) = plan_merge(recipe).problems

    assert "has no generation_config.json" in problem


def test_settings_that_contradict_the_tokenizer_are_said(tmp_path):
    """A generation config that is asked for stays as it is, and the plan names the other eos."""
    group = group_of(tmp_path, experts=1)
    options = Options(tokenizer_from=str(group.experts[0]))
    base = ModelRef(str(group.base))

    warnings, _ = merged(group, tmp_path / "out", options, generation_config=base)
    ref = ModelRef(str(group.experts[0]))
    _, files = merged(group, tmp_path / "followed", options, generation_config=ref)

    assert any(f"--generation-config {ref.id}" in text for text in warnings)
    check_agreement(files)


def test_configs_of_experts_are_counted(tmp_path):
    """Another eos in an expert's config is said once for all experts."""
    group = make_group(tmp_path / "group", experts=2)
    for folder in group.experts:
        edit_config(folder, eos_token_id=9)

    warnings, _ = merged(group, tmp_path / "out")

    assert len([text for text in warnings if "eos_token_id is 9 in 2 of 2 experts" in text]) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_writes_what_mergekits_writes(name, tmp_path):
    """Text for text, as rendered by mergekit 0.1.5's templates; None: both refuse the messages."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(text):
        raise ValueError(text)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string(TEMPLATES[name])
    for case in RENDERED[name]:
        wanted = case.pop("text")
        try:
            found = template.render(bos_token="<s>", eos_token="</s>", **case)
        except ValueError:
            found = None
        assert found == wanted


def test_a_named_template_is_written_and_stays_a_name(tmp_path):
    """transformers reads the template of that name; the recipe is repeated as it was."""
    from transformers import PreTrainedTokenizerFast

    group = make_group(tmp_path / "group", experts=1)
    recipe = parse_recipe(
        yaml.safe_dump(recipe_of(group, method="mean").to_dict() | {"chat_template": "chatml"})
    )

    merged(group, tmp_path / "out", chat_template=recipe.chat_template)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n"
    assert recipe.to_dict()["chat_template"] == "chatml"


def test_a_template_that_is_none_is_refused():
    """A misspelt name is answered with the names that there are."""
    with pytest.raises(RecipeError, match=r"'chatml'.*'llama3'.*'auto'"):
        parse_recipe("base_model: a\nmodels: [b]\nchat_template: chat_ml")
