"""The command line as its users meet it: whole processes, exit codes, messages, JSON, stops."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from resmerge_stream.cli.main import main
from resmerge_stream.experts.group import BESIDE, builtin_group
from resmerge_stream.experts.tasks import TASKS
from resmerge_stream.recipe import DEFAULT_METHOD
from space.view.plan import plan_html
from tests.support.checkpoints import (
    ROOT,
    child_environment,
    edit_config,
    edit_tensors,
    file_bytes,
    make_group,
    read_tensors,
    run_python,
)

Q = "model.layers.0.self_attn.q_proj.weight"
COMMANDS = ("plan", "merge", "verify", "compare", "analyse", "extract", "submit", "methods", "demo")
PLAN_KEYS = {
    "refused", "problems", "warnings", "tensors", "by_rule", "shards", "read_bytes", "write_bytes",
    "peak_memory_bytes", "peak_disk_bytes", "seconds_estimate", "sources", "plan_hash",
}  # fmt: skip
LONG = "x" * 300  # the system looks for no name as long as that
TOKEN = "hf_" + "PlantedTokenThatMustNotLeak"


def command(*args, cwd=ROOT, **environment):
    """Run the command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "resmerge_stream", *map(str, args)],
        env=child_environment() | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def models(group):
    """Return the options that name a group."""
    experts = [part for folder in group.experts for part in ("--expert", str(folder))]
    return ["--base", str(group.base), *experts]


def write_recipe(path, group, **changes):
    """Write the recipe of a group, with keys added or replaced."""
    document = {
        "merge_method": "resmerge",
        "base_model": str(group.base),
        "models": [{"model": str(folder)} for folder in group.experts],
    }
    path.write_text(yaml.safe_dump(document | changes))
    return path


def refusal(capsys, *args):
    """Run a command in this process that must be refused, and return its one message."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as exc:
        code = exc.code
    printed = capsys.readouterr()
    assert code == 2, printed
    message = (printed.err if "resmerge-stream" in printed.err else printed.out).strip()
    assert message
    assert len(message) < 2000
    assert "Traceback" not in printed.err + printed.out
    return message


def merged(out, *args):
    """Merge in this process, and return the bytes of weights, index and config."""
    assert main(["merge", *map(str, args), "--out", str(out)]) == 0
    return file_bytes(Path(out))


def everything(folder):
    """Return every file below a folder, with its bytes and time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def weight_files(folder):
    """Return the names of weight files below a folder, under whatever name."""
    return [path.name for path in folder.rglob("*safetensors*")] if folder.exists() else []


class TestHelp:
    @pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)])
    def test_help_imports_no_heavy_package(self, args):
        """--help of every command prints its usage without torch, gradio or the Hub's client."""
        code = (
            "import sys\n"
            "from resmerge_stream.cli.main import main\n"
            "try:\n    main([*sys.argv[1:], '--help'])\n"
            "except SystemExit as exc:\n    print('exit', exc.code)\n"
            "print(sorted({name.split('.')[0] for name in sys.modules}))"
        )

        done = run_python(code, *args)

        assert done.returncode == 0, done.stderr
        assert "usage: resmerge-stream" in done.stdout
        assert "exit 0" in done.stdout
        modules = done.stdout.splitlines()[-1]
        for heavy in ("torch", "gradio", "huggingface_hub", "numpy", "transformers"):
            assert f"'{heavy}'" not in modules

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_shows_an_example_and_the_exit_codes(self, name, capsys):
        """Each command's help ends in a command to copy and in what its exit codes mean."""
        with pytest.raises(SystemExit):
            main([name, "--help"])

        text = capsys.readouterr().out
        assert f"example: resmerge-stream {name}" in text
        assert "exit codes: 0 done; 2 refused" in text

    def test_the_version_is_told(self):
        """--version prints the program's name and version."""
        done = command("--version")

        assert done.returncode == 0
        assert done.stdout.startswith("resmerge-stream ")

    def test_a_plan_of_folders_imports_neither_torch_nor_gradio(self, group):
        """Planning on local folders stays light."""
        code = (
            "import sys\n"
            "from resmerge_stream.cli.main import main\n"
            "code = main(['plan', *sys.argv[1:]])\n"
            "heavy = {'torch', 'gradio', 'safetensors', 'transformers'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else code)"
        )

        done = run_python(code, *models(group))

        assert done.returncode == 0, done.stderr


class TestTypos:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ((), ["COMMAND", "--help"]),
            (("mrege",), ["mrege", "merge", "--help"]),
            (("plan", "--bsae", "x"), ["--bsae", "--help"]),
            (("merge", "--out"), ["--out", "--help"]),
            (("plan", "--seed", "one"), ["--seed", "'one'", "--help"]),
            (("plan", "a.yml", "b.yml"), ["b.yml", "--help"]),
            (("verify",), ["ID", "--help"]),
            (("plan",), ["--base", "--expert"]),
            (("merge", "--base", "x", "--expert", "y"), ["--out"]),
            (("plan", "nowhere.yml"), ["nowhere.yml", "--base"]),
            (("plan", "--base", "x"), ["--expert"]),
            (("verify", "nowhere"), ["no folder", "nowhere"]),
            (("plan", "--expert", "x", "built-in/rl-add"), ["--expert built-in/rl-add"]),
        ],
    )
    def test_a_wrong_command_line_is_refused_with_a_hint(self, args, words, capsys):
        """Every typo of a command or option ends in one message that says where to read on."""
        message = refusal(capsys, *args)

        for word in words:
            assert word in message

    @pytest.mark.parametrize(
        "args",
        [
            ["plan", LONG], ["merge", LONG, "--out", "o"], ["verify", LONG],
            ["evaluate", LONG, "--tasks", LONG],
            ["compare", LONG, "--methods", "mean,ties", "--out", "o"],
            ["analyse", LONG, "--out", "o"], ["submit", LONG, "--push-to", "a/b"],
            ["extract", LONG, "--base", "base", "--out", "o"],
        ],
        ids=lambda args: args[0],
    )  # fmt: skip
    def test_a_path_that_the_system_refuses_is_named(self, args, capsys):
        """What the system says of a path is the message of every command, exit 2, no traceback."""
        assert "xxxxxx" in refusal(capsys, *args)

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--method", "resmrege"], ["'resmrege'", "Did you mean 'resmerge'?"]),
            (["--method", "zzz"], ["'zzz'", "task_arithmetic"]),
            (["--set", "rnak=2"], ["'rnak'", "Did you mean 'rank'?"]),
            (["--set", "rank"], ["'rank'", "KEY=VALUE"]),
            (["--set", "=2"], ["'=2'", "KEY=VALUE"]),
            (["--set", "rank=two"], ["rank", "whole number", "'two'"]),
            (["--set", "rank=1.5"], ["rank", "whole number"]),
            (["--set", "rank=0"], ["rank", "1 to"]),
            (["--method", "resmerge", "--set", "rho=nan"], ["rho", "a number"]),
            (["--method", "resmerge", "--set", "rho=-1"], ["rho", "from 0"]),
            (["--method", "resmerge", "--set", "variant=papr"], ["variant", "'paper'"]),
            (["--dtype", "bfloat17"], ["'bfloat17'", "'bfloat16'"]),
            (["--rounding", "down"], ["rounding", "stochastic", "'down'"]),
            (["--max-shard-size", "5XB"], ["max-shard-size", "'5XB'", "5GB"]),
            (["--max-shard-size", "0"], ["max_shard_size", "1 or more"]),
            (["--memory-budget", "much"], ["memory-budget", "'much'", "5GB"]),
            (["--tokenizer-from", "nowhere"], ["'nowhere'", "folder"]),
            (["--device", "cdua"], ["device", "cdua", "cpu"]),
        ],
    )
    @pytest.mark.parametrize("name", ["plan", "merge"])
    def test_a_wrong_option_is_refused_and_writes_nothing(
        self, name, args, words, group, tmp_path, capsys
    ):
        """What is wrong in an option is named by the plan, with what may stand there."""
        out = tmp_path / "out"

        message = refusal(capsys, name, *models(group), *args, "--out", out)

        for word in words:
            assert word in message
        assert not out.exists()

    @pytest.mark.parametrize("device", ["cuda:99", "cuda:7"])
    def test_a_device_that_is_not_there_is_refused_and_nothing_is_written(
        self, device, group, tmp_path, capsys
    ):
        """What only torch can tell is still told before the output folder is made."""
        message = refusal(
            capsys, "merge", *models(group), "--device", device, "--out", tmp_path / "out"
        )

        assert "--device" in message
        assert device in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"merge_metod": "mean"}, ["'merge_metod'", "Did you mean 'merge_method'?"]),
            ({"slices": [{}]}, ["'slices'", "models"]),
            ({"modules": {"default": {}}}, ["'modules'", "models"]),
            ({"tokenizer": {"sources": "union"}}, ["'sources'", "tokens"]),
            ({"chat_template": "chat_ml"}, ["'chat_ml'", "auto"]),
            ({"dtype": "int8"}, ["int8", "bfloat16"]),
            ({"parameters": {"normalize": True}}, ["'normalize'", "rank"]),
            ({"merge_method": "resmrge"}, ["'resmrge'", "Did you mean 'resmerge'?"]),
            ({"base_model": None}, ["base_model"]),
            ({"models": []}, ["models"]),
        ],
    )
    def test_a_wrong_recipe_is_refused_by_name(self, changes, words, group, tmp_path, capsys):
        """A misspelt key, or one that only mergekit knows, is named with what to write instead."""
        recipe = write_recipe(tmp_path / "recipe.yml", group, **changes)

        message = refusal(capsys, "merge", recipe, "--out", tmp_path / "out")

        for word in words:
            assert word in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "name", ["~nobody-of-that-name/x", "x" * 5000, "a\nb", "", " ", "@main"]
    )
    @pytest.mark.parametrize("option", ["--base", "--expert", "--tokenizer-from"])
    def test_an_odd_model_name_is_refused(self, option, name, group, capsys):
        """A home of nobody, a name too long, or nothing at all is no model, and not a bug."""
        message = refusal(capsys, "plan", *models(group), option, name)

        assert "folder" in message or "malformed" in message

    @pytest.mark.parametrize("out", ["~nobody-of-that-name/x", "x" * 300, "a\0b"])
    def test_an_odd_output_name_is_no_bug(self, out, group, tmp_path, monkeypatch, capsys):
        """An output folder that cannot be is refused; one that only looks odd may be used."""
        monkeypatch.chdir(tmp_path)

        code = main(["merge", *models(group), "--out", out])

        assert code in (0, 2, 3)
        assert (code == 0) == os.path.isdir(out)
        assert code == 0 or "resmerge-stream: " in capsys.readouterr().err

    @pytest.mark.parametrize("sample", ["-1", "x", "1e3"])
    def test_a_wrong_sample_is_refused(self, sample, group, tmp_path, capsys):
        """How many tensors to merge again is a count."""
        merged(tmp_path / "out", *models(group))
        capsys.readouterr()

        assert "--sample" in refusal(capsys, "verify", tmp_path / "out", "--sample", sample)

    def test_no_message_has_a_traceback_in_a_process(self, group, tmp_path):
        """A refusal in a whole process prints its message alone, on standard error."""
        done = command("merge", *models(group), "--method", "resmrege", "--out", tmp_path / "out")

        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("resmerge-stream: ")
        assert len(done.stderr.splitlines()) == 1


class TestJson:
    def test_a_plan_is_one_object(self, group, tmp_path):
        """plan --json prints one line with the fixed keys."""
        done = command("plan", *models(group), "--json", "--out", tmp_path / "out")

        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        plan = json.loads(line)
        assert set(plan) >= PLAN_KEYS
        assert plan["refused"] is False
        assert plan["problems"] == []
        assert set(plan["shards"][0]) >= {"name", "bytes", "tensors"}
        assert set(plan["sources"][0]) >= {"id", "revision", "bytes", "license", "gated"}
        assert [source["id"] for source in plan["sources"]] == [str(f) for f in group.folders]

    def test_a_refused_plan_is_the_same_object(self, group, capsys):
        """plan --json of something that cannot be merged says so in its own keys, and exits 2."""
        edit_config(group.experts[0], hidden_size=32)

        assert main(["plan", *models(group), "--json"]) == 2

        (line,) = capsys.readouterr().out.splitlines()
        plan = json.loads(line)
        assert set(plan) >= PLAN_KEYS
        assert plan["refused"] is True
        assert "hidden_size" in plan["problems"][0]

    @pytest.mark.slow
    def test_a_merge_is_one_event_a_line(self, tmp_path):
        """merge --json prints planned, then tensors and shards, then published, then finished."""
        group = make_group(tmp_path / "group", sharded=True)
        done = command("merge", *models(group), "--json", "--out", tmp_path / "out")

        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        names = [event["event"] for event in events]
        assert names[0] == "planned"
        assert names[-2:] == ["published", "finished"]
        # Where nothing is ready for a while, what is told instead is how far it is.
        assert set(names[1:-2]) - {"progress"} == {"tensor", "shard"}
        assert names.count("tensor") == events[0]["plan"]["tensors"]
        assert names.count("shard") == 2
        assert names[-3] == "shard"
        report = json.loads((tmp_path / "out/resmerge/report.json").read_text())
        assert events[-1]["report"]["summary"] == report["summary"]
        assert "Traceback" not in done.stderr

    def test_a_refused_merge_is_one_event(self, group, tmp_path, capsys):
        """merge --json of something that cannot be merged ends in a refused event."""
        edit_config(group.experts[0], hidden_size=32)

        assert main(["merge", *models(group), "--json", "--out", str(tmp_path / "out")]) == 2

        (line,) = capsys.readouterr().out.splitlines()
        event = json.loads(line)
        assert event["event"] == "refused"
        assert "hidden_size" in event["message"]

    def test_a_stopped_merge_is_one_event(self, group, tmp_path, capsys, monkeypatch):
        """merge --json that the disk stops ends in a stopped event."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("resmerge_stream.sinks.safetensors_file.os.fsync", full)
        args = ["--out", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work")]

        assert main(["merge", *models(group), "--json", *args]) == 3

        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        times = [datetime.fromisoformat(event["time"]) for event in events]
        assert times == sorted(times)
        assert all(time.tzinfo for time in times)
        assert events[-1]["event"] == "stopped"
        assert "No space left" in events[-1]["message"]

    def test_methods_are_one_object(self):
        """methods --json lists every method with its parameters."""
        done = command("methods", "--json")

        assert done.returncode == 0, done.stderr
        described = {method["name"]: method for method in json.loads(done.stdout)}
        assert {"resmerge", "mean", "task_arithmetic"} <= set(described)
        parameters = {entry["name"]: entry for entry in described["resmerge"]["parameters"]}
        assert parameters["rank"]["default"] == 1
        assert parameters["rank"]["type"] == "int"
        assert "paper" in parameters["variant"]["choices"]

    def test_methods_are_listed_for_people(self, capsys):
        """Methods names every method and parameter."""
        assert main(["methods"]) == 0

        text = capsys.readouterr().out
        for word in ("resmerge", "task_arithmetic", "rank = 1", "2606.02252"):
            assert word in text

    def test_checks_are_one_object_a_line(self, group, tmp_path, capsys):
        """verify --json prints each check with its name, whether it passed, and its problems."""
        merged(tmp_path / "out", *models(group))
        capsys.readouterr()

        assert main(["verify", str(tmp_path / "out"), "--json"]) == 0

        checks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert all(set(check) >= {"event", "name", "passed", "problems"} for check in checks)
        assert all(check["passed"] for check in checks)


class TestRecipesAndOptions:
    def test_a_recipe_and_options_give_the_same_bytes(self, group, tmp_path):
        """A recipe file, and the options that say the same, make one model."""
        recipe = write_recipe(tmp_path / "recipe.yml", group, parameters={"rho": 0.5, "rank": 2})

        first = merged(tmp_path / "a", recipe)
        options = ["--method", "resmerge", "--set", "rho=0.5", "--set", "rank=2"]
        second = merged(tmp_path / "b", *models(group), *options)

        assert first == second

    def test_options_win_over_the_recipe(self, group, tmp_path, capsys):
        """Experts, method, parameters and dtype given as options replace the recipe's."""
        recipe = write_recipe(
            tmp_path / "recipe.yml", group, parameters={"rank": 2}, dtype="float16"
        )
        options = ["--expert", str(group.experts[1]), "--method", "task_arithmetic"]
        options += ["--set", "lambda=0.5", "--dtype", "float32"]

        assert main(["plan", str(recipe), *options, "--json"]) == 0

        plan = json.loads(capsys.readouterr().out)
        assert [source["id"] for source in plan["sources"]] == [
            str(group.base), str(group.experts[1]),
        ]  # fmt: skip
        assert "resmerge" not in plan["by_rule"]
        out = tmp_path / "out"
        merged(out, recipe, *options)
        assert {tensor.dtype for tensor in read_tensors(out).values()} == {torch.float32}
        report = json.loads((out / "resmerge/report.json").read_text())
        assert report["method"]["parameters"]["lambda"] == 0.5

    def test_set_reads_numbers_and_words(self, group, tmp_path):
        """--set converts to the parameter's own type, and the last one of a key counts."""
        sets = ["rank=3", "rank=2", "rho=1e-1", "beta_min=0", "variant=release-2026-07"]
        options = [part for text in sets for part in ("--set", text)]
        merged(tmp_path / "out", *models(group), "--method", "resmerge", *options)

        report = json.loads((tmp_path / "out/resmerge/report.json").read_text())
        parameters = report["method"]["parameters"]
        assert parameters["rank"] == 2
        assert isinstance(parameters["rank"], int)
        assert parameters["rho"] == 0.1
        assert parameters["beta_min"] == 0.0
        assert parameters["variant"] == "release-2026-07"

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_the_output_dtype_is_that_of_weights_and_config(self, dtype, group, tmp_path):
        """--dtype decides the dtype of every merged tensor and of the config."""
        merged(tmp_path / "out", *models(group), "--dtype", dtype)

        dtypes = {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()}
        assert dtypes == {getattr(torch, dtype)}
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == dtype

    @pytest.mark.slow
    def test_stochastic_rounding_depends_on_the_seed_alone(self, group, tmp_path):
        """One seed gives one result, another seed another, and nearest rounding a third."""
        stochastic = [*models(group), "--rounding", "stochastic", "--seed"]

        first = merged(tmp_path / "a", *stochastic, "7")
        again = merged(tmp_path / "b", *stochastic, "7")
        other = merged(tmp_path / "c", *stochastic, "8")
        nearest = merged(tmp_path / "d", *models(group), "--seed", "7")

        assert first == again
        assert len({files["model.safetensors"] for files in (first, other, nearest)}) == 3

    @pytest.mark.parametrize("seed", ["-1", str(2**64), str(10**30)])
    def test_any_whole_number_is_a_seed(self, seed, group, tmp_path):
        """A seed may be negative or larger than 64 bits."""
        merged(tmp_path / "out", *models(group), "--rounding", "stochastic", "--seed", seed)

    def test_a_limit_cuts_the_output_and_changes_no_tensor(self, group, tmp_path):
        """--max-shard-size makes several files with an index, holding the same values."""
        whole = merged(tmp_path / "whole", *models(group))
        cut = merged(tmp_path / "cut", *models(group), "--max-shard-size", "4KB")

        shards = sorted(name for name in cut if name.endswith(".safetensors"))
        index = json.loads(cut["model.safetensors.index.json"])
        assert len(shards) > 2
        assert sorted(set(index["weight_map"].values())) == shards
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "cut" / file, "pt") as shard:
                assert name in shard.keys()  # noqa: SIM118
        left, right = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "cut")
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert "model.safetensors" in whole

    def test_a_budget_that_is_too_small_is_refused_with_what_is_needed(
        self, group, tmp_path, capsys
    ):
        """The refusal names the tensor, what it needs, and the option; that budget then works."""
        args = [*models(group), "--out", tmp_path / "out"]
        message = refusal(capsys, "merge", *args, "--memory-budget", "10MB")

        needed = message.split("Give --memory-budget ")[1].split()[0]
        assert "10 MB" in message
        assert "model." in message
        assert not (tmp_path / "out").exists()
        merged(tmp_path / "out", *models(group), "--memory-budget", needed)

    def test_a_budget_changes_no_byte(self, group, tmp_path):
        """A small budget gives the same files as the default."""
        first = merged(tmp_path / "a", *models(group))
        second = merged(tmp_path / "b", *models(group), "--memory-budget", "400MB")

        assert first == second

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["with space", "an@sign", "ünï-模型", "-dash", "a#b'c\"d"])
    def test_odd_folder_names_are_folders(self, name, tmp_path):
        """Spaces, @, quotes and letters of any script work in sources, recipes and targets."""
        group = make_group(tmp_path / name / "group", experts=1)
        recipe = write_recipe(tmp_path / name / "recipe.yml", group)
        out = tmp_path / name / "out"
        merged(out, recipe)

        assert main(["verify", str(out), "--recipe", str(recipe), "--sample", "99"]) == 0

    @pytest.mark.slow
    def test_names_in_any_script_are_read_and_printed(self, tmp_path):
        """A whole command takes and shows paths with spaces, @ and letters of any script."""
        group = make_group(tmp_path / "ünï 模型@1" / "group", experts=1)
        out = tmp_path / "ünï 模型@1" / "öut"

        done = command("merge", *models(group), "--out", out)

        assert done.returncode == 0, done.stderr
        assert str(out) in done.stdout

    def test_a_path_that_is_no_unicode_is_no_bug(self, group, tmp_path):
        """A folder whose name is not UTF-8 is planned, or refused in words."""
        odd = os.fsencode(tmp_path) + b"/\xff\xfe"
        os.rename(os.fsencode(group.experts[0]), odd)

        for extra in ([], ["--json"]):
            options = ["plan", "--base", group.base, "--expert", odd, *extra]
            done = subprocess.run(
                [sys.executable, "-m", "resmerge_stream", *options],
                env=child_environment(),
                capture_output=True,
                timeout=120,
                check=False,
            )
            assert done.returncode in (0, 2), done.stderr
            assert b"Traceback" not in done.stderr
            assert done.stdout

    def test_paths_may_be_relative(self, group, tmp_path, monkeypatch, capsys):
        """Sources and target are found from the working directory, wherever that is."""
        monkeypatch.chdir(tmp_path)
        merged("out", "--base", "group/base", "--expert", "group/expert0")
        capsys.readouterr()

        monkeypatch.chdir(tmp_path / "group")
        merged(tmp_path / "out", "--base", "base", "--expert", "expert0")

        assert "already" in capsys.readouterr().out


class TestTargets:
    def test_a_folder_that_is_not_ours_is_refused_and_untouched(self, group, tmp_path, capsys):
        """Whatever stands at --out stays as it is, to the byte and the time."""
        out = tmp_path / "out"
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"mine")
        (out / "notes.txt").write_text("mine too")
        before = everything(out)

        message = refusal(capsys, "merge", *models(group), "--out", out)

        assert str(out) in message
        assert everything(out) == before

    def test_another_merge_is_refused_where_one_is_finished(self, group, tmp_path, capsys):
        """A finished merge is not replaced by one with other parameters."""
        out = tmp_path / "out"
        merged(out, *models(group))
        before = everything(out)

        message = refusal(capsys, "merge", *models(group), "--set", "rank=2", "--out", out)

        assert str(out) in message
        assert everything(out) == before

    def test_the_same_merge_twice_does_nothing_the_second_time(self, group, tmp_path, capsys):
        """A finished merge is found, said, and left alone with exit 0."""
        out = tmp_path / "out"
        merged(out, *models(group))
        before = everything(out)
        capsys.readouterr()

        assert main(["merge", *models(group), "--out", str(out)]) == 0

        assert "already" in capsys.readouterr().out
        assert everything(out) == before
        assert main(["merge", *models(group), "--out", str(out), "--json"]) == 0
        (event,) = map(json.loads, capsys.readouterr().out.splitlines())
        assert event["event"] == "finished"
        assert event["already_there"] is True

    def test_an_empty_folder_is_a_target(self, group, tmp_path):
        """A folder that exists and holds nothing is filled."""
        (tmp_path / "out").mkdir()

        merged(tmp_path / "out", *models(group))

    @pytest.mark.parametrize("place", ["file", "under a file", "/proc/out", "/dev/null/out"])
    def test_a_place_that_cannot_be_written_is_said(self, place, group, tmp_path, capsys):
        """A target that cannot be made is refused or stopped with a message that names it."""
        (tmp_path / "file").write_text("mine")
        out = {"file": tmp_path / "file", "under a file": tmp_path / "file" / "out"}.get(
            place, place
        )

        code = main(["merge", *models(group), "--out", str(out)])

        printed = capsys.readouterr()
        assert code in (2, 3)
        assert str(out) in printed.err
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_parent_stops_the_merge(self, group, tmp_path, capsys):
        """A folder without permission stops the merge so that it can be continued."""
        parent = tmp_path / "closed"
        parent.mkdir(mode=0o555)

        assert main(["merge", *models(group), "--out", str(parent / "out")]) in (2, 3)
        assert "closed" in capsys.readouterr().err

    def test_nothing_to_discard_is_said(self, group, tmp_path, capsys):
        """--discard-staging removes nothing where no merge was left unfinished."""
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine.safetensors.part").write_text("mine")

        message = refusal(capsys, "merge", *models(group), "--out", out, "--discard-staging")

        assert "nothing was removed" in message
        assert (out / "mine.safetensors.part").read_text() == "mine"


class TestRefusedValues:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight"])
    def test_a_weight_that_is_no_number_is_refused_by_name(
        self, name, value, group, tmp_path, capsys
    ):
        """NaN or infinity in an expert is refused, naming tensor and checkpoint; no file stays."""
        edit_tensors(group.experts[1], lambda tensors: tensors[name].view(-1)[3:4].fill_(value))

        message = refusal(capsys, "merge", *models(group), "--out", tmp_path / "out")

        assert name in message
        assert str(group.experts[1]) in message
        assert weight_files(tmp_path / "out") == []

    def test_a_base_that_is_no_number_is_refused_by_name(self, group, tmp_path, capsys):
        """NaN in the base is the base's fault, not an expert's."""
        edit_tensors(group.base, lambda tensors: tensors[Q].view(-1)[3:4].fill_(float("nan")))

        message = refusal(capsys, "merge", *models(group), "--out", tmp_path / "out")

        assert Q in message
        assert str(group.base) in message
        assert weight_files(tmp_path / "out") == []

    def test_an_overflow_of_the_output_dtype_is_refused(self, tmp_path, capsys):
        """A value too large for float16 is refused with a dtype that holds it."""
        group = make_group(tmp_path / "group", dtype=torch.float32)
        for folder in group.folders:
            edit_tensors(folder, lambda tensors: tensors[Q].view(-1)[0:1].fill_(1e6))

        args = ["--dtype", "float16", "--out", tmp_path / "out"]
        message = refusal(capsys, "merge", *models(group), *args)

        assert Q in message
        assert "float16" in message
        assert weight_files(tmp_path / "out") == []

    def test_after_a_repair_the_same_command_merges(self, group, tmp_path, capsys):
        """A refusal in the middle leaves nothing that stands in the way of a repaired merge."""
        path = group.experts[1] / "model.safetensors"
        sound = path.read_bytes()
        edit_tensors(group.experts[1], lambda tensors: tensors[Q].fill_(float("nan")))
        refusal(capsys, "merge", *models(group), "--out", tmp_path / "out")
        path.write_bytes(sound)

        repaired = merged(tmp_path / "out", *models(group))

        assert repaired == merged(tmp_path / "clean", *models(group))


def test_a_dead_network_is_told_of_as_such(tmp_path):
    """A repository that cannot be asked for: the network failed, or a folder was meant."""
    done = command(
        "plan",
        "--base",
        "models/maht",
        "--expert",
        "models/code",
        cwd=tmp_path,
        HF_ENDPOINT="http://127.0.0.1:9",
        PYTHONPATH=str(ROOT),
    )

    assert done.returncode == 3
    assert "cannot read models/maht on the Hub" in done.stderr
    assert "check the path if you meant a folder" in done.stderr


def start(*args, limit_bytes=None):
    """Start the command line so that an interrupt reaches it, whatever started the tests."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"limit = {limit_bytes!r}\n"
        "if limit is not None:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "from resmerge_stream.cli.main import main\n"
        "sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A group whose merge takes long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    return make_group(folder / "group", layers=12, hidden=192, experts=2)


class TestInterrupts:
    options = ("--max-shard-size", "500KB")

    def interrupt(self, group, out, after):
        """Start a merge, interrupt it after some shards, and return its code and errors."""
        process = start("merge", *models(group), *self.options, "--json", "--out", out)
        shards = 0
        for line in process.stdout:
            shards += json.loads(line)["event"] == "shard"
            if shards == after:
                break
        process.send_signal(signal.SIGINT)
        drained = threading.Thread(target=process.stdout.read, daemon=True)
        drained.start()
        errors = process.stderr.read()
        code = process.wait(timeout=120)
        drained.join()
        process.stdout.close()
        process.stderr.close()
        return code, errors

    @pytest.mark.slow
    def test_an_interrupted_merge_continues_to_the_same_bytes(self, large, tmp_path, capsys):
        """SIGINT ends in 130 without a final file name; rerun, the command gives the same bytes."""
        out = tmp_path / "out"

        code, errors = self.interrupt(large, out, 2)

        assert code == 130, errors
        assert "same command" in errors
        assert "Traceback" not in errors
        assert not list(out.glob("*.safetensors"))
        assert not (out / "config.json").exists()
        kept = sorted(out.glob("*.safetensors.part"))
        assert len(kept) >= 2
        assert main(["merge", *models(large), *self.options, "--json", "--out", str(out)]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        resumed = [event for event in events if event["event"] == "shard" and event["resumed"]]
        assert len(resumed) >= 2
        assert not list(out.glob("**/*.part"))
        assert file_bytes(out) == merged(tmp_path / "clean", *models(large), *self.options)

    @pytest.mark.slow
    def test_an_unfinished_merge_can_be_discarded(self, large, tmp_path, capsys):
        """--discard-staging names what it removes, keeps what is not its own, and starts afresh."""
        out = tmp_path / "out"
        code, errors = self.interrupt(large, out, 1)
        assert code == 130, errors
        other = [*models(large), "--method", "mean"]
        message = refusal(capsys, "merge", *other, "--out", out)
        assert "--discard-staging" in message

        assert main(["merge", *other, "--out", str(out), "--discard-staging"]) == 0

        assert "removed model-00001" in capsys.readouterr().err
        assert not list(out.glob("**/*.part"))
        assert file_bytes(out) == merged(tmp_path / "clean", *other)

    @pytest.mark.slow
    def test_a_full_disk_stops_the_merge_so_that_it_continues(self, large, tmp_path):
        """A write that fails ends in exit 3 with what to do; with room again it finishes."""
        out = tmp_path / "out"
        process = start("merge", *models(large), "--out", out, limit_bytes=1_000_000)
        _, errors = process.communicate(timeout=120)

        assert process.returncode == 3, errors
        assert "same command" in errors
        assert "Traceback" not in errors
        assert not list(out.glob("*.safetensors"))
        assert merged(out, *models(large)) == merged(tmp_path / "clean", *models(large))


class TestStreams:
    def test_a_name_is_text_and_nothing_more(self, tmp_path, capsys):
        """No control character of a stranger's name reaches a terminal, a card or the page."""
        evil = "\x1b[31m\x9b2J\u202e"
        group = make_group(tmp_path / f"group{evil}", experts=2)
        for folder in group.folders:
            edit_tensors(folder, lambda held: held.update({f"a{evil}.bias": torch.ones(3)}))
        edit_tensors(group.experts[0], lambda held: held.update({f"b{evil}": torch.ones(2)}))
        out, compared = str(tmp_path / "out"), str(tmp_path / "compared")
        commands = [
            ["plan", *models(group)], ["merge", *models(group), "--out", out],
            ["merge", *models(group), "--out", out], ["verify", out, "--sample", "30"],
            ["compare", *models(group), "--methods", "mean,ties", "--out", compared],
            ["merge", *models(group), "--out", str(tmp_path / f"x{evil}" / "y")],
            ["plan", str(tmp_path / f"none{evil}")], ["verify", str(tmp_path / f"none{evil}")],
        ]  # fmt: skip

        said = ""
        for args in commands:
            main(args)
            printed = capsys.readouterr()
            said += printed.out + printed.err
        main(["plan", *models(group), "--json"])
        said += plan_html(json.loads(capsys.readouterr().out), push_to="")
        cards = [*tmp_path.glob("out/*.md"), *tmp_path.glob("compared/**/*.md")]
        said += "".join(card.read_text() for card in cards)

        assert len(cards) >= 4
        assert "[31m" in said
        assert not {c for c in said if not c.isprintable()} - {"\n", "\r", "\t"}

    @pytest.mark.parametrize("args", [("methods",), ("methods", "--json"), ("--help",), ("plan",)])
    def test_a_reader_that_goes_away_is_no_error(self, args, group):
        """Output into a closed pipe ends silently."""
        extra = models(group) if args == ("plan",) else []
        read, write = os.pipe()
        os.close(read)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "resmerge_stream", *args, *extra],
                env=child_environment(),
                stdout=write,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
                check=False,
            )
        finally:
            os.close(write)

        assert done.stderr == ""
        assert done.returncode in (0, 141)

    def test_a_merge_whose_reader_goes_away_does_not_claim_to_be_done(self, group, tmp_path):
        """Without a reader of its events a merge finishes, or exits otherwise than 0."""
        process = start("merge", *models(group), "--json", "--out", tmp_path / "out")
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        process.stderr.close()
        code = process.wait(timeout=120)

        assert "Traceback" not in errors
        assert "Exception ignored" not in errors
        assert (code == 0) == (tmp_path / "out" / "model.safetensors").exists()

    @pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
    def test_a_terminal_without_greek_letters_is_no_error(self, encoding, group, tmp_path):
        """Characters that the terminal lacks are replaced, in merges, lists and messages."""
        out = tmp_path / "out"
        for args in (["merge", *models(group), "--out", out], ["methods"], ["verify", out]):
            done = subprocess.run(
                [sys.executable, "-m", "resmerge_stream", *map(str, args)],
                env=child_environment() | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
                capture_output=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-1000:]

    def test_progress_goes_to_standard_error(self, group, tmp_path):
        """Standard output holds the summary alone: where, how many tensors, and the gates."""
        done = command("merge", *models(group), "--out", tmp_path / "out")

        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"merged into {tmp_path / 'out'}: 26 tensors")
        assert "attention" in done.stdout
        assert "rounding kept" in done.stdout
        assert "\r" not in done.stdout
        assert "merging" in done.stderr
        assert "\r" not in done.stderr  # lines, as nobody's terminal is there
        assert 2 <= done.stderr.count("merging: ") <= 11

    def test_a_plan_shows_problems_first(self, group, capsys):
        """What refuses a merge is the first thing after its method, and the last line says so."""
        edit_config(group.experts[0], hidden_size=32)

        assert main(["plan", *models(group)]) == 2

        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("method: ")
        assert lines[1].startswith("problem: ")
        assert lines[-1] == "refused"


class TestWholeRuns:
    @pytest.mark.slow
    def test_the_demo_merges_and_verifies(self, tmp_path):
        """The built-in group is merged, checked and asked, without a network or an account."""
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = command("demo", "--out", tmp_path / "out", "--prompts", 40, cwd=tmp_path, **cache)

        assert done.returncode == 0, done.stderr
        assert "merged into" in done.stdout
        assert "FAILED" not in done.stdout
        assert "ok      recomputed: 3 tensors" in done.stdout
        table = done.stdout[done.stdout.index("right answers") :].splitlines()
        assert "40 held-out prompts a task" in table[0]
        assert table[1].split() == ["model", *TASKS, "mean"]
        named = [line.split()[0] for line in table[2:]]
        assert named == [*builtin_group(), DEFAULT_METHOD, *BESIDE]
        assert (tmp_path / "out" / "model.safetensors").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"out", "cache"}

    @pytest.mark.slow
    def test_the_demo_twice_is_done_already(self, tmp_path):
        """A second demo finds the first one's result and checks it again."""
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        first = command("demo", "--prompts", 0, cwd=tmp_path, **cache)
        second = command("demo", "--json", "--prompts", 10, cwd=tmp_path, **cache)

        assert first.returncode == second.returncode == 0, second.stderr
        lines = [json.loads(line) for line in second.stdout.splitlines()]
        assert lines[0]["already_there"] is True
        assert all(line["passed"] for line in lines[1:-1])
        assert list(lines[-1]["accuracy"]) == [*builtin_group(), DEFAULT_METHOD, *BESIDE]

    def test_a_merge_is_verified_by_its_recipe(self, group, tmp_path, capsys):
        """Verify merges a sample again where a recipe names the sources, and exits 0."""
        recipe = write_recipe(tmp_path / "recipe.yml", group)
        merged(tmp_path / "out", recipe)
        capsys.readouterr()

        assert main(["verify", str(tmp_path / "out"), "--recipe", str(recipe)]) == 0

        assert "ok      recomputed: 3 tensors" in capsys.readouterr().out

    @pytest.mark.slow
    def test_a_token_is_written_nowhere(self, group, tmp_path):
        """A token in the environment is in no output, file, report, card or journal."""
        environment = {"HF_TOKEN": TOKEN, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        args = [*models(group), "--out", tmp_path / "out"]
        runs = [
            command("plan", *args, "--json", **environment),
            command("merge", *args, "--json", **environment),
            command("verify", tmp_path / "out", **environment),
            command("merge", *args, "--set", "rank=2", **environment),
        ]

        assert [run.returncode for run in runs] == [0, 0, 0, 2]
        assert TOKEN not in "".join(run.stdout + run.stderr for run in runs)
        assert not [
            path for path, (data, _) in everything(tmp_path).items() if TOKEN.encode() in data
        ]
