"""Tasks of lm-evaluation-harness: local ones, asked by the harness itself."""

import json
import os
import subprocess
import sys

import pytest

from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import answer, draw_prompts
from tests.support.checkpoints import ROOT

GROUP = builtin_group()
TASK = """
task: sorting
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: as-it-is, filter: [{{function: take_first}}]}}
  - name: first-letter
    filter: [{{function: regex, regex_pattern: "(.)"}}, {{function: take_first}}]
"""


@pytest.mark.slow
def test_the_harness_finds_what_our_own_evaluation_finds(tmp_path):
    """The same questions, as its YAML task and as a built-in one: the same accuracies.

    Its task takes answers in two ways, as gsm8k does; each question counts once, in the first way.
    """
    prompts = draw_prompts("sort", 40, seed=7, split="held-out")
    rows = [{"question": prompt, "answer": answer(prompt)} for prompt in prompts]
    (tmp_path / "sorting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sorting.yaml").write_text(TASK.format(file=tmp_path / "sorting.jsonl"))
    models = [str(GROUP[name]) for name in ("base", "rl-sort")]

    # In a process of its own: the harness reads where its caches are when it is imported.
    done = subprocess.run(
        [sys.executable, "-m", "resmerge_stream", "evaluate", *models, "--limit", "40", "--json",
         "--tasks", f"{tmp_path / 'sorting.yaml'},sort", "--out", str(tmp_path / "out")],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1",
                          "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["models"]
    shares = [[found[model][task]["accuracy"] for task in ("sorting", "sort")] for model in models]
    assert {found[model][task]["n"] for model in models for task in ("sorting", "sort")} == {40}
    assert shares[0][0] == shares[0][1]
    assert shares[1][0] == shares[1][1] > shares[0][0]


@pytest.mark.slow
def test_a_task_that_the_harness_lacks_is_one_message(tmp_path):
    """A YAML task is known by the harness only from its own folder; a name from nowhere is not."""
    from resmerge_stream.errors import RecipeError
    from resmerge_stream.evaluation.tasks import check_harness, find_task

    with pytest.raises(RecipeError, match="there is no task 'no_such_task'"):
        check_harness([find_task("no_such_task", 5)])
