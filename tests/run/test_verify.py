"""A merged folder against its report: a sound one passes, every kind of damage is found."""

import hashlib
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resmerge_stream.cli.main import main
from resmerge_stream.errors import ResMergeError, VerificationError
from resmerge_stream.report.statement import STATEMENT, statement_of
from resmerge_stream.run.verify import verify_folder
from tests.support.checkpoints import Group, make_group, merge, plan_group, recipe_of, write_json

Q = "model.layers.0.self_attn.q_proj.weight"
ALL = 1000  # a sample of every tensor


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A group in two shards and its merge; copied by each test that damages it."""
    folder = tmp_path_factory.mktemp("verify")
    group = make_group(folder / "group", sharded=True)
    merge(group, folder / "out")
    return group, folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the merged folder, to be damaged."""
    return shutil.copytree(finished[1], tmp_path / "out")


def check(out, group=None, **options):
    """Return the problems of each check by its name."""
    recipe = recipe_of(group) if group is not None else None
    return {c.name: c.problems for c in verify_folder(out, recipe=recipe, **options)}


def failed(out, group=None, **options):
    """Return the names of the checks that found something, with what they found."""
    found = {name: problems for name, problems in check(out, group, **options).items() if problems}
    return found


def shard_of(out, name):
    """Return the weight file that holds a tensor."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    return out / index["weight_map"][name]


def edit(path, change):
    """Load a weight file, change its tensors in place, and save it again."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_report(out, change):
    """Change the report."""
    path = out / "resmerge" / "report.json"
    report = json.loads(path.read_text())
    change(report)
    write_json(path, report)


def entry_of(report, name):
    """Return a tensor's row of the report."""
    return next(row for row in report["tensors"] if row["name"] == name)


def forge_hash(out, path):
    """Let report and statement say the hash and size that a file has now."""

    def change(report):
        entry = next(file for file in report["files"] if file["name"] == path.name)
        entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        entry["size"] = path.stat().st_size
        write_json(out / STATEMENT, statement_of(report))

    edit_report(out, change)


def data_start(path):
    """Return the offset of the first byte after a file's header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


class TestSound:
    def test_a_sound_folder_passes_every_check(self, finished):
        """Layout, hashes, values and a second merge of every tensor find nothing."""
        group, out = finished

        checks = list(verify_folder(out, recipe=recipe_of(group), sample=ALL))

        assert [c.name for c in checks] == ["layout", "sha256", "finite", "recomputed", "statement"]
        assert not any(c.problems for c in checks)
        assert checks[0].detail.startswith("26 tensors")
        assert checks[1].detail == "2 weight files"
        assert checks[2].detail == "26 merged tensors"
        assert checks[3].detail.startswith("26 tensors")

    def test_verify_changes_nothing(self, finished):
        """A folder is only read."""
        group, out = finished
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")}

        check(out, group)

        assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")} == before

    @pytest.mark.parametrize(
        "recipe",
        [
            {"method": "mean"},
            {"method": "task_arithmetic", "parameters": {"scale": 0.5}},
            {"parameters": {"variant": "release-2026-07", "rank": 2}},
            {"dtype": "float32"},
            {"method": "mean", "weights": [1.0, 2.0, None]},
        ],
    )
    def test_every_recipe_is_merged_again_to_the_same_bytes(self, recipe, group, tmp_path):
        """The second merge uses the recipe's method, parameters, weights and dtype."""
        merged = merge(group, tmp_path / "out", **recipe)

        checks = list(verify_folder(merged.out, recipe=recipe_of(group, **recipe), sample=ALL))

        assert not any(c.problems for c in checks)
        assert checks[3].detail.startswith("26 tensors")

    def test_stochastic_rounding_is_repeated_with_its_seed(self, group, tmp_path):
        """Rounding and seed are taken from the report."""
        out = tmp_path / "out"
        args = ["--base", str(group.base), "--method", "resmerge"]
        args += [part for folder in group.experts for part in ("--expert", str(folder))]
        assert (
            main(["merge", *args, "--rounding", "stochastic", "--seed", "5", "--out", str(out)])
            == 0
        )

        checks = list(verify_folder(out, recipe=recipe_of(group), sample=ALL))

        assert checks[3].detail.startswith("26 tensors")
        assert not any(c.problems for c in checks)

    def test_carried_and_odd_tensors_are_checked_too(self, tmp_path):
        """Integers, scalars, stacks and empty tensors pass where they are sound."""
        extra = {
            "model.steps": torch.arange(5),
            "model.scale": torch.tensor(1.5, dtype=torch.bfloat16),
            "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 8, 4).to(torch.bfloat16),
            "model.layers.0.mlp.experts.empty": torch.empty(0, 4, dtype=torch.bfloat16),
        }
        group = make_group(tmp_path / "group", extra=extra)
        merged = merge(group, tmp_path / "out")

        checks = list(verify_folder(merged.out, recipe=recipe_of(group), sample=ALL))

        assert not any(c.problems for c in checks), checks
        assert checks[3].detail.startswith("30 tensors")

    def test_the_sample_is_as_large_as_asked(self, finished):
        """None, a few, or all tensors are merged again; the same seed takes the same ones."""
        group, out = finished

        details = [
            [c.detail for c in verify_folder(out, recipe=recipe_of(group), sample=n, seed=s)][3]
            for n, s in ((0, 0), (2, 0), (2, 0), (2, 1))
        ]

        assert details[0].startswith("0 tensors")
        assert details[1].startswith("2 tensors")
        assert details[1] == details[2] != details[3]

    def test_a_folder_is_verified_wherever_it_was_moved(self, out, finished, tmp_path):
        """Neither the folder's place nor its times matter."""
        moved = shutil.move(out, tmp_path / "élsewhere @2")
        for path in moved.rglob("*"):
            os.utime(path, (0, 0))

        assert not failed(moved, finished[0], sample=ALL)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another machine, as far as a merge's sources go: it knows of none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    monkeypatch.chdir(tmp_path)


class TestAbsentSources:
    def test_without_sources_the_second_merge_is_skipped_and_said(self, out, elsewhere):
        """A folder of someone else is checked as far as it can be, and the rest is named."""
        checks = list(verify_folder(out))

        assert not any(c.problems for c in checks)
        assert checks[3].detail.startswith("skipped")
        assert "sources are not at hand" in checks[3].detail
        assert "'base', 'expert0', 'expert1', 'expert2'" in checks[3].detail
        assert "--base ID for the base, --expert ID for each" in checks[3].detail

    def test_without_sources_the_command_says_so_and_exits_3(self, out, elsewhere, capsys):
        """What was skipped is not called ok, in words, as data and by the exit code."""
        assert main(["verify", str(out)]) == 3
        said = capsys.readouterr().out
        assert main(["verify", str(out), "--json"]) == 3
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

        assert "skipped recomputed:" in said
        assert "ok      recomputed" not in said
        assert [row["status"] for row in rows] == ["ok", "ok", "ok", "skipped", "ok"]

    def test_sources_are_known_where_the_merge_was_made(self, out, tmp_path, monkeypatch, capsys):
        """From any working directory, also one with other folders of those names."""
        make_group(tmp_path, seed=1)
        monkeypatch.chdir(tmp_path)

        assert main(["verify", str(out)]) == 0

        assert "ok      recomputed" in capsys.readouterr().out

    def test_sources_that_are_gone_are_named_by_their_place(self, tmp_path, capsys, monkeypatch):
        """Another folder of the same name is not taken for one that was removed."""
        group = make_group(tmp_path / "group", layers=1)
        merge(group, tmp_path / "out")
        group.base.rename(tmp_path / "base")
        monkeypatch.chdir(tmp_path)

        assert main(["verify", "out"]) == 3
        assert f"there is no folder '{group.base}'" in capsys.readouterr().out

        assert main(["verify", "out", "--base", "base"]) == 0

    def test_sources_that_moved_are_found_where_they_are(self, out, finished, tmp_path, elsewhere):
        """With `--base` and `--expert` the sample is merged again, from copies of another time."""
        group = finished[0]
        words = ["--base", str(shutil.copytree(group.base, tmp_path / "b"))]
        for i, expert in enumerate(group.experts):
            words += ["--expert", str(shutil.copytree(expert, tmp_path / f"e{i}"))]

        assert main(["verify", str(out), *words]) == 0
        assert main(["verify", str(out), *words[:-2]]) == 2

    def test_a_result_of_sources_that_changed_is_stale(self, out, finished, tmp_path, capsys):
        """An expert that was saved anew is named, rather than tensors that come out different."""
        group = finished[0]
        words = ["--base", str(group.base)]
        for i, expert in enumerate(group.experts):
            words += ["--expert", str(shutil.copytree(expert, tmp_path / f"e{i}"))]
        for path in (tmp_path / "e0").glob("*.safetensors"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

        assert main(["verify", str(out), *words]) == 2

        said = capsys.readouterr().out
        assert "FAILED  sources: stale" in said
        assert "e0 is another one now" in said

    def test_a_recipe_that_names_what_is_gone_skips_too(self, out, tmp_path):
        """Sources that were removed since are as absent as others'."""
        group = Group(tmp_path / "gone", (tmp_path / "gone too",))

        checks = list(verify_folder(out, recipe=recipe_of(group)))

        assert "skipped" in checks[3].detail
        assert str(tmp_path / "gone") in checks[3].detail

    def test_without_a_recipe_the_second_merge_is_skipped(self, out):
        """A folder whose own recipe is gone is checked by its report."""
        (out / "resmerge" / "recipe.yml").unlink()

        checks = list(verify_folder(out))

        assert not any(c.problems for c in checks)
        assert "skipped" in checks[3].detail

    def test_other_sources_are_a_difference(self, out, finished, tmp_path):
        """Another group under the recipe's names does not make the folder's bytes."""
        other = make_group(tmp_path / "other", sharded=True, seed=1)

        assert "base is another one now" in failed(out, other, sample=ALL)["sources"][0]

    def test_another_recipe_is_a_difference(self, out, finished):
        """Other parameters on the right sources do not make the folder's bytes."""
        recipe = recipe_of(finished[0], method="mean")

        checks = {c.name: c.problems for c in verify_folder(out, recipe=recipe, sample=ALL)}

        assert checks["recomputed"]


class TestDamagedWeights:
    def test_a_flipped_bit_is_found(self, out):
        """One bit of one weight changes the hash of its file."""
        path = shard_of(out, Q)
        data = bytearray(path.read_bytes())
        data[data_start(path) + 101] ^= 1
        path.write_bytes(data)

        found = failed(out)

        assert list(found) == ["sha256"]
        assert path.name in found["sha256"][0]

    def test_a_flipped_bit_in_a_header_is_found(self, out):
        """A changed name in a header is missed by the index, the report, and the hash."""
        path = shard_of(out, Q)
        path.write_bytes(path.read_bytes().replace(b"q_proj.weight", b"q_prok.weight", 1))

        with pytest.raises(ResMergeError, match="q_proj"):
            list(verify_folder(out))

    def test_a_shard_that_is_cut_short_is_found(self, out):
        """A truncated file is no safetensors file any more."""
        path = shard_of(out, Q)
        path.write_bytes(path.read_bytes()[:-10])

        with pytest.raises(ResMergeError, match=path.name):
            list(verify_folder(out))

    def test_a_shard_with_bytes_behind_is_found(self, out):
        """Nothing may hide behind the last tensor."""
        path = shard_of(out, Q)
        path.write_bytes(path.read_bytes() + b"\0")

        with pytest.raises(ResMergeError, match=path.name):
            list(verify_folder(out))

    @pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
    def test_a_missing_file_is_found(self, name, out):
        """A shard or config that is gone is named."""
        (out / name).unlink()

        with pytest.raises(ResMergeError, match=name):
            list(verify_folder(out))

    def test_a_missing_index_is_found(self, out):
        """Shards without their index make no model."""
        (out / "model.safetensors.index.json").unlink()

        with pytest.raises(ResMergeError, match="index"):
            list(verify_folder(out))

    def test_a_renamed_tensor_is_found(self, out):
        """A tensor under another name, in index and file alike, is missing and extra."""
        path, other = shard_of(out, Q), Q.replace("q_proj", "x_proj")
        edit(path, lambda tensors: tensors.update({other: tensors.pop(Q)}))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        index["weight_map"][other] = index["weight_map"].pop(Q)
        write_json(out / "model.safetensors.index.json", index)
        forge_hash(out, path)

        found = failed(out)

        assert list(found) == ["layout"]
        assert any("missing" in text and Q in text for text in found["layout"])
        assert any(other in text for text in found["layout"])

    def test_a_tensor_that_the_index_forgot_is_found(self, out):
        """A merge's index names every tensor; one that lost a name is not what was written."""
        index = json.loads((out / "model.safetensors.index.json").read_text())
        del index["weight_map"][Q]
        write_json(out / "model.safetensors.index.json", index)

        assert Q in failed(out)["layout"][0]

    @pytest.mark.parametrize("change", [torch.Tensor.float, lambda t: t.reshape(-1)])
    def test_another_dtype_or_shape_is_found(self, change, out):
        """The same values in another form are a difference, whatever the hash says."""
        path = shard_of(out, Q)
        edit(path, lambda tensors: tensors.update({Q: change(tensors[Q])}))
        forge_hash(out, path)

        assert Q in failed(out)["layout"][0]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", [Q, "model.norm.weight"])
    def test_a_weight_that_is_no_number_is_found(self, name, value, out):
        """NaN or infinity is found in a folder whose hashes were made to agree."""
        path = shard_of(out, name)
        edit(path, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
        forge_hash(out, path)

        found = failed(out)

        assert list(found) == ["finite"]
        assert name in found["finite"][0]

    @pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight"])
    def test_other_finite_values_are_found_when_sampled(self, name, out, finished):
        """A tensor that was replaced, with a forged hash, comes out different when merged again."""
        path = shard_of(out, name)
        edit(path, lambda tensors: tensors[name].view(-1)[:1].mul_(1.5))
        forge_hash(out, path)

        found = failed(out, finished[0], sample=ALL)

        assert list(found) == ["recomputed"]
        assert len(found["recomputed"]) == 1
        assert name in found["recomputed"][0]

    def test_a_small_sample_may_miss_one_but_not_all(self, out, finished):
        """A sample of one finds a change of every tensor."""
        for path in out.glob("*.safetensors"):
            edit(path, lambda tensors: [tensor.mul_(1.25) for tensor in tensors.values()])
            forge_hash(out, path)

        assert "recomputed" in failed(out, finished[0], sample=1)

    def test_swapped_shards_are_found(self, out):
        """Two files that exchanged their names are not what the index says."""
        first, second = sorted(out.glob("*.safetensors"))
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)

        found = failed(out)

        assert sorted(found) == ["layout", "sha256"]
        assert "another file than the one that holds" in found["layout"][0]

    def test_a_tensor_under_another_shard_in_the_index_is_found(self, out):
        """The index alone is wrong: hashes and names agree, and what loads by the index fails."""
        file = out / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        own = shard_of(out, Q).name
        index["weight_map"][Q] = next(n for n in index["weight_map"].values() if n != own)
        write_json(file, index)

        found = failed(out)

        assert list(found) == ["layout"]
        assert Q in found["layout"][0]

    def test_a_weight_file_that_the_report_does_not_know_is_found(self, out):
        """A stray weight file would be loaded by some tools, so it is named."""
        shutil.copy(shard_of(out, Q), out / "model.safetensors")

        try:
            found = failed(out)
        except ResMergeError as exc:
            found = {"layout": (str(exc),)}

        assert found


class TestTamperedReports:
    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r["files"][0].update(sha256="0" * 64),
            lambda r: r["files"][0].update(sha256=None),
            lambda r: r["files"][0].update(size=1),
            lambda r: r["files"][0].update(name="model-00009-of-00009.safetensors"),
            lambda r: r["files"].pop(),
            lambda r: r.update(files=[]),
            lambda r: r["tensors"].pop(),
            lambda r: r.update(tensors=[]),
            lambda r: r["tensors"].append({**r["tensors"][0], "name": "more"}),
            lambda r: entry_of(r, Q).update(shape=[1]),
            lambda r: entry_of(r, Q).update(dtype="F32"),
        ],
        ids=[
            "sha256", "no sha256", "size", "name", "a file less", "no files", "a tensor less",
            "no tensors", "a tensor more", "shape", "dtype",
        ],
    )  # fmt: skip
    def test_a_report_of_something_else_is_found(self, change, out):
        """A report that was changed in what describes the weights no longer fits them."""
        edit_report(out, change)

        assert failed(out)

    def test_a_rule_does_not_excuse_a_tensor_that_is_no_number(self, out, finished):
        """A tensor that the report calls carried is compared with the base's bytes, NaN or not."""
        path = shard_of(out, Q)
        edit(path, lambda tensors: tensors[Q].view(-1)[-1:].fill_(float("nan")))
        forge_hash(out, path)
        edit_report(out, lambda report: entry_of(report, Q).update(rule="carried"))

        assert failed(out, finished[0], sample=ALL)

    @pytest.mark.parametrize(
        "text",
        [
            "", "{", "null", "[]", "{}", '{"files": [], "tensors": []}', "\ud800",
            '{"files": 1, "tensors": [], "summary": {}}',
            '{"files": [], "tensors": {}, "summary": {}}',
            '{"files": [1], "tensors": [], "summary": {}}',
            '{"files": [{}], "tensors": [], "summary": {}}',
            '{"files": [], "tensors": [null], "summary": {}}',
            '{"files": [], "tensors": [{"name": []}], "summary": {}}',
            '{"files": [], "tensors": [{"name": "a"}], "summary": {}, "options": []}',
            '{"files": [{"name": "..", "size": "1", "sha256": 1}], "tensors": [], "summary": {}}',
            "[" * 100_000,
        ],
    )  # fmt: skip
    def test_a_report_that_is_none_is_refused_in_one_message(self, text, out, capsys):
        """Whatever stands in report.json, verify exits 2 with a message that names it."""
        data = text.encode("utf-8", "surrogatepass")
        (out / "resmerge" / "report.json").write_bytes(data)

        assert main(["verify", str(out)]) == 2

        printed = capsys.readouterr()
        assert printed.out or "report.json" in printed.err
        assert len(printed.err) < 2000

    @pytest.mark.parametrize(
        "options",
        [
            {"rounding": "down"},
            {"seed": "x"},
            {"seed": None},
            {"rounding": 1},
            "x",
            None,
            {"seed": 1.5},
        ],
    )
    def test_options_that_make_no_sense_are_no_bug(self, options, out, finished, capsys):
        """Options that no merge could have had are refused or reported, never passed over."""
        edit_report(out, lambda report: report.update(options=options))
        recipe = out / "of-the-sources.yml"
        recipe.write_text(recipe_of(finished[0]).to_yaml())

        assert main(["verify", str(out), "--recipe", str(recipe)]) == 2

        assert "Traceback" not in capsys.readouterr().err

    def test_names_in_a_report_lead_nowhere(self, out, tmp_path):
        """Files are looked for in the folder alone, whatever path a report gives them."""
        outside = tmp_path / "outside.safetensors"
        shutil.copy(shard_of(out, Q), outside)
        entry = {
            "name": "../outside.safetensors",
            "size": outside.stat().st_size,
            "sha256": hashlib.sha256(outside.read_bytes()).hexdigest(),
        }
        edit_report(out, lambda report: report["files"].append(entry))

        assert "outside" in failed(out)["sha256"][0]

    def test_a_folder_without_a_report_is_refused(self, out):
        """Without a report there is nothing to verify against."""
        (out / "resmerge" / "report.json").unlink()

        with pytest.raises(VerificationError, match=r"report\.json"):
            list(verify_folder(out))

    def test_a_folder_that_is_not_there_is_refused(self, tmp_path):
        """So is a folder that does not exist."""
        with pytest.raises(VerificationError, match="nowhere"):
            list(verify_folder(tmp_path / "nowhere"))


class TestCommand:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda out: shard_of(out, Q).write_bytes(b"x"),
            lambda out: shard_of(out, Q).unlink(),
            lambda out: edit(shard_of(out, Q), lambda tensors: tensors[Q].zero_()),
            lambda out: edit_report(out, lambda report: report["files"].pop()),
        ],
        ids=["garbage", "missing", "zeroed", "report"],
    )
    def test_every_damage_exits_2(self, damage, out, capsys):
        """Whether a check fails or the weights cannot be read, the command exits 2 and says why."""
        damage(out)

        assert main(["verify", str(out)]) == 2

        printed = capsys.readouterr()
        assert "FAILED" in printed.out or "resmerge-stream: " in printed.err

    def test_json_says_which_check_failed(self, out, capsys):
        """Each check is one object; the one that failed carries its problems."""
        edit(shard_of(out, Q), lambda tensors: tensors[Q].zero_())

        assert main(["verify", str(out), "--json"]) == 2

        checks = {c["name"]: c for c in map(json.loads, capsys.readouterr().out.splitlines())}
        assert checks["sha256"]["passed"] is False
        assert checks["sha256"]["problems"]
        assert checks["layout"]["passed"] is True

    def test_an_unfinished_merge_is_not_verified(self, group, tmp_path, capsys):
        """A folder with temporary names has no report yet."""
        out = tmp_path / "out"
        plan = plan_group(group, out=out)
        from resmerge_stream.run.engine import run_merge

        events = run_merge(plan, out=out)
        while next(events).name != "shard":
            pass
        events.close()
        plan.close()

        assert main(["verify", str(out)]) == 2
        assert "report.json" in capsys.readouterr().err

    def test_an_unreadable_shard_is_refused(self, out, capsys):
        """A weight file that is a folder, or a link to nowhere, is refused in one message."""
        path = shard_of(out, Q)
        path.unlink()
        path.symlink_to(out / "nowhere")
        assert stat.S_ISLNK(path.lstat().st_mode)

        assert main(["verify", str(out)]) == 2

        assert path.name in capsys.readouterr().err

    def test_the_verified_folder_opens_in_safetensors(self, finished):
        """What passes is what the safetensors library opens."""
        group, out = finished
        assert not failed(out, group)

        for path in out.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert len(list(file.keys())) == 13


@pytest.mark.parametrize(
    ("method", "today", "earlier"),
    [
        ("ties", {"preset": "paper"},
         {"density": 0.2, "trim": "model", "reduce": "mean", "scale": 1.0}),
        ("dare_ties", {"preset": "paper"},
         {"density": 0.2, "rescale": "inverse", "trim": "none", "reduce": "mean", "scale": 1.0}),
        ("karcher", {"preset": "task_vectors"}, {"scale": 1.0}),
    ],
)  # fmt: skip
def test_a_report_of_an_earlier_release_is_read_with_its_defaults(tmp_path, method, today, earlier):
    """What 0.1 wrote: parameters under old names, and a recipe that says nothing of them."""
    group = make_group(tmp_path / "group", layers=1)
    merge(group, tmp_path / "out", method=method, parameters=today)
    file = tmp_path / "out" / "resmerge" / "report.json"
    report = json.loads(file.read_text())
    report["method"]["parameters"] = earlier
    file.write_text(json.dumps(report))

    recipe = recipe_of(group, method=method)
    checks = {c.name: c for c in verify_folder(tmp_path / "out", recipe=recipe, sample=ALL)}

    assert checks["recomputed"].problems == ()
    assert "q_proj" in checks["recomputed"].detail
