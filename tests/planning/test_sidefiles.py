"""Every file that a tokenizer, processor or model names goes along, or the plan says why not."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resmerge_stream.planning.options import Options
from resmerge_stream.planning.sidefiles import model_files, tokenizer_files
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from tests.support.checkpoints import edit_config, make_group, merge, plan_group, write_json

pytestmark = pytest.mark.usefixtures("without_picture")

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9085698\n"
TOKENIZER_CODE = """
from .words_x import WORDS
class XTokenizer:
    vocab_files_names = {"vocab_file": "own.words"}
"""


@pytest.fixture
def group(tmp_path):
    """Return a base and two experts with tokenizers."""
    return make_group(tmp_path / "group", experts=2)


def put(folder, **files):
    """Write files, named with __ for a folder and _ for the last dot."""
    for key, text in files.items():
        stem, _, suffix = key.replace("__", "/").rpartition("_")
        path = folder / f"{stem}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def names_in_transformers():
    """Return every file that a tokenizer of transformers says it is made from, and its settings."""
    import transformers
    from transformers import utils

    names = {value for key, value in vars(utils).items() if key.endswith("_NAME")
             if isinstance(value, str) and value.endswith("_config.json")}  # fmt: skip
    for path in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and "vocab_files_names" in ast.unparse(node).lower():
                texts = [one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)]
                names |= {text for text in texts if isinstance(text, str) and "." in text}
    return names - {"adapter_config.json"}


def test_every_file_that_transformers_names_goes_along(group):
    """What its tokenizers list as vocab_files_names, what its processors are called, templates."""
    names = names_in_transformers() | {"chat_template.jinja", "chat_template.json", "tekken.json",
                                       "special_tokens_map.json", "added_tokens.json",
                                       "tiktoken.model", "qwen.tiktoken"}  # fmt: skip
    assert {"spm.model", "source.spm", "vocab-src.json", "bpe.codes", "normalizer.json"} <= names
    for name in names:
        if not (group.base / name).exists():
            (group.base / name).write_text("{}")

    base = open_checkpoint(ModelRef(str(group.base)))
    assert not names - {*tokenizer_files(base), *model_files(base)}


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_goes_along_wherever_it_is_named(where, group, tmp_path):
    """With what it imports from beside it, and the files that it names; other code stays."""
    put(group.base, tokenization_x_py=TOKENIZER_CODE, words_x_py="WORDS = 1\n", train_py="x\n",
        own_words="a\n")  # fmt: skip
    path = group.base / where
    said = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, said | {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}})

    plan = plan_group(group, method="mean", out=tmp_path / "out")

    assert {"tokenization_x.py", "words_x.py", "own.words", where} <= set(plan.side_files())
    assert "train.py" not in plan.side_files()
    assert any("tokenization_x.py" in warning for warning in plan.warnings)


def test_code_that_is_named_and_not_there_is_said(group):
    """The output would not load, as the base does not; code of another repository is not missed."""
    edit_config(group.base, auto_map={"AutoModel": "modeling_x.X", "AutoConfig": "o/r--config_x.Y"})

    plan = plan_group(group, method="mean")

    assert any("modeling_x.py" in text and "does not have" in text for text in plan.warnings)
    assert not any("config_x" in text for text in plan.warnings)


def test_further_templates_and_inner_tokenizers_go_along(group, tmp_path):
    """Templates with names, and the tokenizer of a processor's part, lie in folders."""
    put(group.base, additional_chat_templates__tool_use_jinja="{{ messages }}",
        qformer_tokenizer__tokenizer_config_json="{}", qformer_tokenizer__vocab_txt="a\n",
        checkpoint__tokenizer_config_json="{}", checkpoint__config_json="{}",
        checkpoint__optimizer_pt="x")  # fmt: skip

    merge(group, tmp_path / "out", method="mean")

    assert (tmp_path / "out/additional_chat_templates/tool_use.jinja").read_text()
    assert (tmp_path / "out/qformer_tokenizer/vocab.txt").read_text() == "a\n"
    assert not (tmp_path / "out/checkpoint").exists()


def test_a_borrowed_tokenizer_brings_its_files_and_the_base_keeps_its_own(group, tmp_path):
    """A tokenizer that the base's code names is not put over the one that was asked for."""
    code = 'FILES = {"tokenizer_file": "tokenizer.json", "vocab": "tiktoken.model"}\n'
    put(group.base, tokenization_x_py=code, tiktoken_model="base")
    edit_config(group.base, auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    path = group.experts[0] / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"model_max_length": 99})

    plan = plan_group(group, method="mean", options=Options(tokenizer_from=str(group.experts[0])))

    files = plan.side_files()
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 99
    assert "tiktoken.model" not in files
    assert "tokenization_x.py" in files


def as_sentence_models(*folders, weights=None):
    """Add what sentence-transformers writes beside a model."""
    kinds = ("Transformer", "Pooling", "Dense")
    modules = [{"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"st.{kind}"}
               for i, kind in enumerate(kinds)]  # fmt: skip
    for folder in folders:
        write_json(folder / "modules.json", modules)
        put(folder, sentence_bert_config_json='{"max_seq_length": 64}',
            config_sentence_transformers_json="{}",
            **{"1_Pooling__config_json": '{"pooling_mode_cls_token": true}',
               "2_Dense__config_json": "{}"})  # fmt: skip
        save_file(
            weights or {"linear.weight": torch.ones(4, 4)}, folder / "2_Dense/model.safetensors"
        )


def test_a_sentence_models_modules_go_along(group, tmp_path):
    """Their settings, and weights that no expert changed, as the base has them."""
    as_sentence_models(*group.folders)

    merge(group, tmp_path / "out", method="mean")

    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (group.base / name).read_bytes()


def test_settings_that_differ_are_named(group):
    """Of processors and modules, what an expert has otherwise or alone; not who wrote them."""
    as_sentence_models(*group.folders)
    put(group.base, preprocessor_config_json='{"size": 224, "transformers_version": "4"}')
    put(group.experts[0], preprocessor_config_json='{"transformers_version": "5", "size": 224}')
    put(group.experts[1], preprocessor_config_json='{"size": 336}', processor_config_json="{}",
        **{"1_Pooling__config_json": '{"pooling_mode_cls_token": false}'})  # fmt: skip

    (said,) = [one for one in plan_group(group, method="mean").warnings if "other settings" in one]

    assert str(group.experts[1]) in said
    for name in ("preprocessor_config.json", "processor_config.json", "1_Pooling/config.json"):
        assert name in said


def test_a_trained_module_is_refused(group, tmp_path):
    """It would be the base's beside merged weights; without modules.json the rest merges."""
    as_sentence_models(*group.folders)
    as_sentence_models(group.experts[1], weights={"linear.weight": torch.zeros(4, 4)})

    (problem,) = plan_group(group, method="mean").problems
    for folder in group.folders:
        (folder / "modules.json").unlink()
    merge(group, tmp_path / "out", method="mean")

    assert "2_Dense/model.safetensors" in problem
    assert "Remove modules.json" in problem
    assert not (tmp_path / "out/2_Dense").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_pointer_in_the_place_of_a_file_is_refused(name, group, tmp_path):
    """What git left without git-lfs is not copied; with the file in its place the merge goes on."""
    kept = (group.base / name).read_bytes()
    (group.base / name).write_text(POINTER)

    problems = plan_group(group, method="mean").problems
    (group.base / name).write_bytes(kept)
    merge(group, tmp_path / "out", method="mean")

    assert any(name in text and "git lfs pull" in text for text in problems)


def test_a_link_in_a_folder_below_may_not_lead_out(group, tmp_path):
    """It would carry a file of somebody else into the output."""
    as_sentence_models(*group.folders)
    (tmp_path / "secret.json").write_text("{}")
    (group.base / "1_Pooling/config.json").unlink()
    (group.base / "1_Pooling/config.json").symlink_to(tmp_path / "secret.json")

    problems = plan_group(group, method="mean").problems

    assert any("leads out" in text for text in problems)


def test_a_folder_in_the_hubs_cache_is_read_through_its_links(group, tmp_path):
    """There a file below leads to the repository's blobs, which belong to it."""
    as_sentence_models(*group.folders)
    snapshot = tmp_path / "models--o--r" / "snapshots" / "abc"
    shutil.copytree(group.base, snapshot)
    blob = tmp_path / "models--o--r" / "blobs" / "1"
    blob.parent.mkdir()
    (snapshot / "1_Pooling/config.json").rename(blob)
    (snapshot / "1_Pooling/config.json").symlink_to("../../../blobs/1")

    checkpoint = open_checkpoint(ModelRef(str(snapshot)))

    assert checkpoint.read_small("1_Pooling/config.json") == blob.read_bytes()
