"""What the weights say of a group of experts, and the advice that the evidence supports."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality.fresh import with_others
from resmerge_stream.cli.main import main
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.roles import layer_of
from resmerge_stream.studies.advice import advise, evidence, read_regime
from resmerge_stream.studies.regime import KINDS, Regime, kind_of

GROUP = builtin_group()
BASE = load_file(GROUP["base"] / "model.safetensors")


def regime_of(base, experts, share=1.0):
    """Return bytes read and what is read of some folders."""
    recipe = Recipe(ModelRef(str(base)), tuple(ModelRef(str(folder)) for folder in experts))
    plan = plan_merge(recipe)
    *_, (_, nbytes, regime) = read_regime(plan, share)
    plan.close()
    return nbytes, regime


def made(folder, change):
    """Write the built-in base with other weights, and return the folder."""
    folder.mkdir()
    for path in GROUP["base"].iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = {name: change(name, tensor.float()) for name, tensor in BASE.items()}
    weights = {name: weights[name].to(BASE[name].dtype) for name in BASE}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_regime_is_what_the_whole_models_say():
    """Cosines, lengths, changed weights, overlap and rounding, in float64 over all weights."""
    names = ("rl-add", "rl-sort", "rl-close")
    _, regime = regime_of(GROUP["base"], [GROUP[name] for name in names])

    base = torch.cat([BASE[name].double().flatten() for name in BASE])
    deltas = []
    for name in names:
        weights = load_file(GROUP[name] / "model.safetensors")
        deltas.append(torch.cat([weights[n].double().flatten() for n in BASE]) - base)
    pairs = list(itertools.combinations(deltas, 2))
    mean = sum(deltas) / 3
    kept = (base + mean).float().bfloat16().double() - base
    overlaps = [
        float(((a != 0) & (b != 0)).sum() / min((a != 0).sum(), (b != 0).sum())) for a, b in pairs
    ]
    assert regime.lengths == pytest.approx([float(d.norm()) for d in deltas], rel=1e-5)
    assert regime.cosines == pytest.approx(
        [float(a @ b / (a.norm() * b.norm())) for a, b in pairs], abs=1e-5
    )
    assert regime.changed == pytest.approx([float((d != 0).double().mean()) for d in deltas])
    assert regime.overlap == pytest.approx(sum(overlaps) / 3)
    assert regime.kept_norm == pytest.approx(float(kept.norm() / mean.norm()), rel=1e-3)
    assert regime.kept_cosine == pytest.approx(
        float(kept @ mean / (kept.norm() * mean.norm())), rel=1e-3
    )
    assert (regime.kind, regime.share) == ("orthogonal", 1.0)


def test_a_sample_reads_a_share_of_the_layers_only(tmp_path):
    """Of five layers a sample of 40 % reads two, and what it says does not know the others."""
    layers = {layer for layer in map(layer_of, BASE) if layer is not None}

    def doubled(name, tensor):
        return tensor * 2 if layer_of(name) in (1, 3) else tensor

    expert = made(tmp_path / "expert", doubled)
    nbytes, regime = regime_of(GROUP["base"], [expert, GROUP["rl-add"]], share=0.4)

    read = sum(t.numel() for name, t in BASE.items() if layer_of(name) in (1, 3))
    assert len(layers) == 5
    assert nbytes == 3 * 2 * read
    assert regime.share == pytest.approx(read / sum(t.numel() for t in BASE.values()))
    assert regime.changed[0] > 0.99


@pytest.mark.parametrize(
    ("kind", "cosines", "lengths", "changed"),
    [
        ("single", [], [1.0], [0.3]),
        ("copies", [0.95, 0.92, 0.99], [1.0, 1.0, 1.0], [0.3] * 3),
        ("opposed", [-0.7, 0.0, 0.3], [1.0, 1.0, 1.0], [0.3] * 3),
        ("overlapping", [0.0, 0.3, 0.0], [1.0, 1.0, 1.0], [0.3] * 3),
        ("long", [0.0, 0.0, 0.0], [1.0, 10.0, 1.0], [0.3] * 3),
        ("long", [0.0], [1.0, 10.0], [0.3] * 2),
        ("short", [0.0, 0.0, 0.0], [1.0, 0.1, 1.0], [0.3] * 3),
        ("short", [0.0, 0.0, 0.0], [10.0, 1.0, 10.0], [0.3] * 3),
        ("sparse", [0.0, 0.0, 0.0], [1.0, 2.0, 1.0], [0.01, 0.05, 0.02]),
        ("orthogonal", [0.0, 0.0, 0.0], [1.0, 2.0, 1.0], [0.01, 0.5, 0.02]),
    ],
)
def test_a_group_is_of_the_first_kind_that_holds(kind, cosines, lengths, changed):
    """Each kind is told by one number, and every kind has words."""
    assert kind_of(cosines, lengths, changed) == kind
    assert KINDS[kind]


def test_equal_experts_are_copies_and_unchanged_ones_are_no_group():
    """Two copies of an expert are copies; the base beside an expert is a single one."""
    expert, base = GROUP["rl-add"], GROUP["base"]

    assert regime_of(base, [expert, expert])[1].kind == "copies"
    assert regime_of(base, [expert, base])[1].kind == "single"


def test_nothing_is_advised_that_was_not_measured():
    """A kind of group without evidence gets no method, and the reason says so."""
    _, regime = regime_of(GROUP["base"], [GROUP["rl-add"], GROUP["rl-add"]])

    found = advise(regime)

    assert found.candidates == ()
    assert "measured no such group" in found.reason


def test_plan_gives_the_advice_beside_the_plan(capsys):
    """`plan --advice --json` has the regime, the candidates and the bytes read."""
    models = ["--base", str(GROUP["base"])]
    for name, folder in GROUP.items():
        models += ["--expert", str(folder)] if name != "base" else []

    code = main(["plan", *models, "--advice", "--sample", "20%", "--json"])

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["advice"]["regime"]["kind"] == "orthogonal"
    assert 0 < found["advice"]["bytes_read"] < 0.21 * found["read_bytes"]
    assert 2 <= len(found["advice"]["advice"]["candidates"]) <= 3


@pytest.mark.parametrize("sample", ["0%", "120%", "some", "-1"])
def test_a_sample_is_a_share(sample, capsys):
    """Anything but a share above 0 and up to 100 % is refused in one message."""
    models = ["--base", str(GROUP["base"]), "--expert", str(GROUP["rl-add"])]

    assert main(["plan", *models, "--advice", f"--sample={sample}"]) == 2
    assert "share of the layers" in capsys.readouterr().err


# Where the advice from the others is more than a point off.
MISSED = {
    ("narrow-12", "sort+close"),
    ("narrow-12", "sparse"),
    ("narrow-long", "add+reverse"),
    ("smollm2", "sft"),
}


def cases_with_others():
    """Return the measured groups of which another one of the same kind was measured."""
    cases = evidence()["cases"]
    return [case for case in cases if sum(c["kind"] == case["kind"] for c in cases) > 1]


@pytest.mark.parametrize("case", cases_with_others(), ids=lambda case: case["case"])
def test_advice_from_the_other_groups_holds_for_one_left_out(case):
    """Of the methods that the other groups speak for, one is within a point of the best.

    `MISSED` are the exceptions that docs/quality.md and docs/quality-small.md name.
    """
    found = within_a_point(case, [other for other in evidence()["cases"] if other != case])

    assert found == ((case["group"], case["case"]) not in MISSED)


@pytest.mark.parametrize("case", evidence()["cases"], ids=lambda case: case["case"])
def test_advice_from_the_other_bases_holds_for_one_left_out(case):
    """What other bases' experts speak for holds for experts of a base that they never saw."""
    others = [other for other in evidence()["cases"] if other["group"] != case["group"]]

    found = within_a_point(case, others)

    assert found == ((case["group"], case["case"]) not in MISSED)


def advised(case, others):
    """Return the advice for experts like those of a case, by the evidence of others."""
    lengths = (1.0,) * case["experts"]
    return advise(Regime(case["kind"], (), lengths, (), None, None, None), {"cases": others})


def within_a_point(case, others):
    """Whether one of the advised methods is within a point of the best one of a case."""
    found = advised(case, others).candidates
    return max(case["points"][candidate.method][0] for candidate in found) >= -1


def test_evidence_of_one_group_keeps_that_of_the_others():
    """Measuring a group again replaces its rows only."""
    published = evidence()
    group = published["cases"][0]["group"]
    found = {"cases": [{"group": group, "case": "new"}], "parts": []}

    cases = with_others(found, published)["cases"]

    assert [case for case in cases if case["group"] == group] == found["cases"]
    assert {case["group"] for case in cases} == {case["group"] for case in published["cases"]}
