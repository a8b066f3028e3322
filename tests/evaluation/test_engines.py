"""What loads the models that are asked: transformers, or vLLM.

vLLM needs a GPU and cannot be installed here, so a module of its name stands in: `LLM` and
`SamplingParams` with the arguments that vLLM 0.33 takes, answered by transformers. What it cannot
show is vLLM itself.
"""

import sys

import pytest

from resmerge_stream.errors import CheckpointFormatError, RecipeError
from resmerge_stream.evaluation import asking, engines
from resmerge_stream.evaluation.engines import Loading, choose_engine
from resmerge_stream.evaluation.run import Examination, evaluate_models
from resmerge_stream.evaluation.tasks import find_task
from resmerge_stream.experts.group import builtin_group

EXPERT = str(builtin_group()["rl-sort"])
STAND_IN = """
from types import SimpleNamespace

from transformers import AutoModelForCausalLM, AutoTokenizer

made = []


class SamplingParams:
    def __init__(self, *, temperature, max_tokens):
        assert temperature == 0.0
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, model, *, revision=None, tokenizer_revision=None):
        made.append((model, revision, tokenizer_revision))
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        found = []
        for prompt in prompts:
            asked = self._tokenizer(prompt, return_tensors="pt").input_ids
            tokens = self._model.generate(
                asked, max_new_tokens=sampling_params.max_tokens, do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id,
            )
            text = self._tokenizer.decode(tokens[0, asked.shape[1]:], skip_special_tokens=True)
            found.append(SimpleNamespace(outputs=[SimpleNamespace(text=text)]))
        return found
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """The module that stands in, as if it were installed."""
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("vllm", None)


def test_vllm_is_chosen_where_it_is_installed_and_there_is_a_gpu(vllm, monkeypatch):
    """Left to itself the evaluation takes vLLM on a GPU only; what is named is taken."""
    assert choose_engine("auto", "cpu") == "transformers"
    assert choose_engine("vllm", "cpu") == "vllm"

    import torch

    monkeypatch.setattr(engines, "choose_device", lambda name: torch.device("cuda"))
    assert choose_engine("auto", "auto") == "vllm"
    assert choose_engine("transformers", "auto") == "transformers"


def test_an_engine_that_is_not_there_is_one_message():
    """vLLM without vLLM, and a name that is none, are refused before any model is loaded."""
    with pytest.raises(RecipeError, match="vLLM is not installed here"):
        choose_engine("vllm", "cpu")
    with pytest.raises(RecipeError, match="Choose one of: auto, transformers, vllm"):
        choose_engine("llama.cpp", "cpu")


def test_vllm_answers_as_transformers_does(vllm):
    """The same questions to the same model have the same verdicts; it is loaded once for all."""
    tasks = [find_task("sort", 20), find_task("add", 20)]

    found = {}
    for engine in ("vllm", "transformers"):
        with engines.loaded(EXPERT, Loading("cpu", engine), harness=False) as model:
            found[engine] = {
                task.name: [one.right for one in answers]
                for task, answers in asking.ask(model, EXPERT, tasks, 20, print)
            }
    import vllm as stand_in

    assert found["vllm"] == found["transformers"]
    assert any(found["vllm"]["sort"])
    assert stand_in.made == [(EXPERT, None, None)]


def test_answers_of_two_engines_are_kept_apart(vllm, tmp_path):
    """A run that another engine began is not continued with answers of this one."""
    for engine in ("transformers", "vllm"):
        examination = Examination(["sort"], out=tmp_path, limit=5, device="cpu", engine=engine)
        evaluate_models([EXPERT], examination)

    assert len(list((tmp_path / "answers").glob("*/sort-*.jsonl"))) == 2


def test_what_vllm_cannot_load_is_one_message(vllm, tmp_path):
    """A folder without a model, and a folder inside a repository, which vLLM does not take."""
    with pytest.raises(CheckpointFormatError, match="vLLM cannot load"):
        engines.WithVllm(str(tmp_path), harness=False)

    with pytest.raises(CheckpointFormatError, match="not one of their folders"):
        engines.WithVllm("org/model:part", harness=False)


def test_the_harness_loads_vllm_itself(vllm, monkeypatch):
    """With a task of the harness among the questions, its own vLLM class holds the model."""
    import types

    import vllm as stand_in

    class VLLM:
        """Takes the harness's arguments, and holds an `LLM` as its class does."""

        def __init__(self, pretrained, *, revision=None, tokenizer_revision=None):
            self.model = stand_in.LLM(pretrained, revision=revision)

    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)

    model = engines.WithVllm(EXPERT, harness=True)

    assert isinstance(model.for_harness(), VLLM)
    assert len(model.answers(find_task("sort", 5))) == 5
    assert len(stand_in.made) == 1
