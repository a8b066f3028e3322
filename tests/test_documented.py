"""Every command of the documentation: run as it stands where that can be here, else parsed.

A page is run from top to bottom in a folder of its own, where the models that the pages name are:
the built-in experts as `models/…` and, on a Hub of this machine, as `org/…` and `me/…`. Only ports,
tokens and the documents' ellipses are replaced.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from loopback_hub import LoopbackHub
from resmerge_stream.cli.main import _parser
from resmerge_stream.experts.group import builtin_adapters, builtin_group
from tests.support.checkpoints import ROOT

PAGES = [
    "README.md", "CONTRIBUTING.md", "loopback_hub/README.md", "docs/skill/SKILL.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
HEREDOC = re.compile(r"<<'(\w+)'\n.*?^\1$", re.M | re.S)

# What a line has in it that cannot run here, and why. Its commands and options are parsed instead.
NOT_HERE = {
    r"^make |^\.venv/bin/|^E=": "the repository's own setup and tests; tests/test_docs.py looks up "
        "their targets and modules",
    r"^\. \.venv": "the environment that runs this test",
    r"gsm8k|ifeval": "tasks of lm-evaluation-harness download their questions from the Hub",
    r"resmerge-stream submit(?!.*--slurm)": "a Job's machine; tests/cli/test_submit.py runs Jobs",
    r"^sbatch|^srun": "a cluster; tests/run/test_slurm.py starts one of two nodes",
    r"^torchrun": "several machines or GPUs; tests/run/test_launchers.py starts three processes",
    r"^accelerate launch": "eight GPUs, or two machines; tests/run/test_launchers.py starts two "
        "processes",
    r"python -m loopback_hub|^python app\.py|HF_ENDPOINT=|^unset":
        "servers that do not end; this test starts its own",
    r"^hf upload|^git archive": "publishes a Space to an account",
    r"--group smollm2": "experts of a real language model, which take hours; tests/experts/ trains "
        "tiny ones",
    r"public-groups/": "public repositories; tests/planning/test_public_groups.py plans them",
    r"uv tool run": "what a Job runs, abridged; tests/cli/test_submit.py runs it",
    r"demo/": "the Hub of that page; loopback_hub has its own tests",
    r"^pip install|model_signing|openssl": "the extra `sign` is not among what tests need",
    r"^\$ ": "a session with its answer, not a block to paste",
    r"^curl|^EVENT=|^URL=|gradio_client|mcp": "needs a Space; tests/space/test_from_code.py runs "
        "all of docs/space.md",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A command of a page, with its continuation lines, and why it does not run here."""

    page: str
    block: int
    text: str
    reason: str = ""


def blocks(page):
    """Yield the number, language and text of each block that holds commands."""
    for number, (language, text) in enumerate(BLOCK.findall((ROOT / page).read_text())):
        is_shown = re.match(r"\$ |\.venv|export|make |sh -c|resmerge-stream", text)
        if language in ("sh", "python") or (not language and is_shown):
            yield number, language, text


def lines():
    """Return every command of every page, a Python block as one."""
    found = []
    for page in PAGES:
        for number, language, text in blocks(page):
            if language == "python":
                in_test = page == "CONTRIBUTING.md"
                reason = "tests/test_docs.py runs the files of this page" if in_test else ""
                found.append(Line(page, number, text, reason or _reason(text)))
                continue
            for command in commands(text):
                if command.startswith("$ ") or not text.startswith("$ "):
                    found.append(Line(page, number, command, _reason(command)))
    return found


def commands(text):
    """Yield the commands of a block: a line, and those that it goes on over."""
    whole, command = HEREDOC.sub(lambda m: m[0].replace("\n", "\0"), text), ""
    for line in whole.replace("\\\n", " ").splitlines():
        command = f"{command}\n{line}" if command else line
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quotation goes on
            continue
        if words:
            yield command.replace("\0", "\n")
        command = ""


def _reason(line):
    return next((why for pattern, why in NOT_HERE.items() if re.search(pattern, line)), "")


LINES = lines()
RUN = [line for line in LINES if not line.reason]


def ours(text):
    """Yield the words of each command of this tool in a line."""
    words = [word for word in shlex.split(text, comments=True) if word != "…"]
    for number, word in enumerate(words):
        is_module = words[number - 1 : number + 1] == ["-m", "resmerge_stream"]
        if (word == "resmerge-stream" and words[number - 1] != "--from") or is_module:
            yield words[number + 1 :]


def test_every_command_is_counted():
    """Each command runs or has a reason why not; a page that gains one is looked at."""
    unused = set(NOT_HERE.values()) - {line.reason for line in LINES}

    assert not unused
    assert {"README.md", "docs/adapters.md", "docs/recipes.md"} <= {line.page for line in RUN}
    assert len(RUN) > len(LINES) / 3
    print(f"{len(LINES)} commands: {len(RUN)} run, {len(LINES) - len(RUN)} parsed")


@pytest.mark.parametrize("page", PAGES)
def test_what_cannot_run_here_is_parsed(page):
    """Every command of this tool that a page shows is one, and each of its options too."""
    parser = _parser()
    for line in LINES:
        if line.page == page and not line.text.startswith(("from ", "import ", '"""')):
            for words in ours(line.text.removeprefix("$ ")):
                parser.parse_args(words)  # ends the test where it is wrong


@pytest.fixture
def town(tmp_path):
    """A Hub with the models that pages name, and the environment of who reads them."""
    folder = tmp_path / "town"
    group, adapters = builtin_group(), builtin_adapters()
    (folder / "bin").mkdir(parents=True)
    for name, words in (("resmerge-stream", "-m resmerge_stream"), ("python", "")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    with LoopbackHub(folder / "hub") as hub:
        token = hub.add_user("me")
        hub.add_org("org", {"me": "write"})
        for repo_id, model in {
            "org/base": group["base"], "org/math": group["rl-add"], "org/code": group["rl-sort"],
            "org/expert": group["rl-add"], "org/full-expert": group["rl-sort"],
            "me/math-lora": adapters["lora-add"], "me/code-lora": adapters["lora-sort"],
        }.items():  # fmt: skip
            hub.add_repo(repo_id, model)
        mine = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env = mine | hub.env(token, home=folder / "home") | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(folder / "cache"), "TOKEN": token,
        }  # fmt: skip
        yield folder, env


def _ran(script, folder, env):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip


def furnished(folder):
    """Make a folder in which the models and files that pages name are."""
    group = builtin_group()
    models = {"base": "base", "math": "rl-add", "code": "rl-sort"}
    for name, source in models.items():
        shutil.copytree(group[source], folder / "models" / name)
    for number, source in enumerate(("rl-add", "rl-sort", "rl-reverse"), 1):
        shutil.copytree(group[source], folder / "runs" / f"checkpoint-{number}00")
    (recipe,) = re.findall(r"```yaml\n(merge_method: resmerge.*?)```",
                           (ROOT / "README.md").read_text(), re.S)  # fmt: skip
    (folder / "recipe.yml").write_text(recipe)
    (folder / "resmerge_stream").symlink_to(ROOT / "resmerge_stream")
    asked = [f'{{"prompt": "add:{n}+1=", "answer": "{n + 1}"}}\n' for n in range(1, 5)]
    (folder / "questions.jsonl").write_text("".join(asked))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({line.page for line in RUN}))
def test_a_page_runs_as_it_stands(page, town, tmp_path):
    """Every command of a page that can run here does, one after another, with exit code 0."""
    _, env = town
    folder = furnished(tmp_path / "here")
    text, given = (ROOT / page).read_text(), (folder / "recipe.yml").read_text()
    if "org/merged-model" in text:  # somebody's merge
        words = "--base org/base --expert org/math --expert org/code --method ties"
        _ran(f"resmerge-stream merge {words} --push-to org/merged-model --public", folder, env)
    if "--out merged" not in text:  # the merge of another page
        shutil.copytree(builtin_group()["rl-close"], folder / "merged")
    for line in RUN:
        if line.page != page:
            continue
        if line.text.startswith("resmerge-stream init"):
            (folder / "recipe.yml").unlink()  # the page's own stands there
        script = line.text.replace("HF_TOKEN=…", "HF_TOKEN=$TOKEN")
        if line.text.startswith(("from ", "import ")):
            script = f"python - <<'END'\n{line.text}\nEND"
        done = _ran(script, folder, env)
        assert done.returncode == 0, (script, done.stdout[-2000:], done.stderr[-3000:])
        if line.text.startswith("resmerge-stream init") and page == "README.md":
            (folder / "recipe.yml").write_text(given)
