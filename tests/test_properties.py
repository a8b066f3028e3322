"""What must hold for every method and variant, whatever the numbers."""

import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from resmerge_stream.maths.stored_bytes import bytes_of
from resmerge_stream.methods import build_method, find_methods, parameter_fields
from tests.support.checkpoints import (
    Group,
    as_many_as,
    edit_tensors,
    make_group,
    merge,
    plan_group,
    read_tensors,
)
from tests.support.matrices import orthonormal, relative, update_of, with_spectrum

pytestmark = pytest.mark.usefixtures("without_picture")

VARIANTS = ("paper", "release-2026-06", "release-2026-07")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# Passthrough has no base; its own tests have none.
every_method = pytest.mark.parametrize("method", sorted(set(find_methods()) - {"passthrough"}))
any_number = pytest.mark.parametrize(
    "method", sorted(name for name, kind in find_methods().items() if kind.models[1] is None)
)
sizes = st.tuples(st.integers(5, 40), st.integers(5, 40))
seeds = st.integers(0, 2**31)


def draw(m, n, count, seed, scale=1e-2):
    """Return a base of zeros and experts with a clear head and a shared direction."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(m, n, generator=random, dtype=torch.float64)
    top = with_spectrum(m, n, [4.0 * math.sqrt(max(m, n))], random)
    experts = []
    for _ in range(count):
        own = torch.randn(m, n, generator=random, dtype=torch.float64)
        experts.append((scale * (shared + own + top)).float())
    return torch.zeros(m, n), experts


@every_variant
@given(shape=sizes, count=st.integers(3, 5), seed=seeds)
def test_the_order_of_the_experts_does_not_matter(variant, shape, count, seed):
    """Listing the experts in another order changes an update by rounding only."""
    base, experts = draw(*shape, count, seed)
    one, _ = update_of(base, experts, variant=variant)

    other, _ = update_of(base, experts[::-1], variant=variant)

    assert relative(other, one) <= 1e-6


@given(shape=sizes, power=st.integers(-30, 30), seed=seeds)
def test_scaling_by_a_power_of_two_scales_the_update_exactly(shape, power, seed):
    """Task vectors times 2^p give the update times 2^p, bit for bit, in the paper's variant."""
    base, experts = draw(*shape, 3, seed)
    factor = 2.0**power
    one, _ = update_of(base, experts)

    scaled, _ = update_of(base, [expert * factor for expert in experts])

    assert torch.equal(scaled, one * factor)


@pytest.mark.parametrize("shape", [(120, 160), (150, 300)])
@pytest.mark.parametrize("power", [-40, -3, 17])
def test_the_iterative_solver_scales_by_powers_of_two_exactly(shape, power):
    """What holds for small matrices holds where Lanczos finds the head."""
    base, experts = draw(*shape, 3, seed=4)
    one, first = update_of(base, experts)

    scaled, second = update_of(base, [expert * 2.0**power for expert in experts])

    assert first.gates["solver"]["name"] == second.gates["solver"]["name"] == "lanczos"
    assert torch.equal(scaled, one * 2.0**power)


@given(shape=sizes, factor=st.floats(1e-6, 1e6), seed=seeds)
def test_scaling_by_any_factor_scales_the_update(shape, factor, seed):
    """Task vectors times c give the update times c, to rounding of the scaled inputs."""
    base, experts = draw(*shape, 3, seed)
    scaled = [expert * factor for expert in experts]
    one, _ = update_of(base, experts)

    other, _ = update_of(base, scaled)

    assert relative(other.double() / factor, one) <= 1e-6


@every_variant
@given(shape=sizes, seed=seeds)
def test_rotating_rows_and_columns_rotates_the_update(variant, shape, seed):
    """Orthogonal changes of basis on both sides commute with the merge."""
    m, n = shape
    base, experts = draw(m, n, 3, seed)
    random = torch.Generator().manual_seed(seed + 1)
    rows, columns = orthonormal(m, m, random), orthonormal(n, n, random)
    one, _ = update_of(base, experts, variant=variant)

    rotated, _ = update_of(
        base, [(rows @ e.double() @ columns).float() for e in experts], variant=variant
    )

    assert relative(rotated, rows @ one.double() @ columns) <= 1e-5


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("family", ["attention", "ffn", "other"])
def test_identical_experts_add_only_the_head_budget(count, family):
    """With all cosines 1 the residual comes back whole, and the head with ρ of its norm."""
    _, (expert,) = draw(30, 24, 1, seed=8)
    U, S, Vt = torch.linalg.svd(expert.double(), full_matrices=False)
    H = S[0] * U[:, :1] @ Vt[:1]
    R = expert.double() - H
    expected = R + 0.2 * torch.linalg.vector_norm(R) * H / torch.linalg.vector_norm(H)

    got, update = update_of(torch.zeros(30, 24), [expert] * count, family=family)

    assert relative(got, expected) <= 1e-6
    for key in ("s_R", "c_R", "alpha_R", "S_H"):
        assert update.gates[key] == pytest.approx(1, abs=1e-6)


def test_one_changed_expert_gets_no_head_back_in_the_paper():
    """Where one of three experts changed, no pair of heads agrees and c_R is 1/3."""
    base, (expert,) = draw(30, 24, 1, seed=9)
    U, S, Vt = torch.linalg.svd(expert.double(), full_matrices=False)
    R = expert.double() - S[0] * U[:, :1] @ Vt[:1]
    score = (0.5 + (1 / 3 + 1) / 2) / 2
    alpha = ((1 / 3 + 1) / 2) ** (1 - 0.3 * score)

    got, update = update_of(base, [expert, base, base])

    assert update.gates["S_H"] == 0
    assert update.gates["c_R"] == pytest.approx(1 / 3, abs=1e-6)
    assert update.gates["s_R"] == pytest.approx(0, abs=1e-6)
    assert relative(got, alpha / 3 * R) <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_one_changed_expert_gets_the_whole_head_budget_in_the_releases(variant):
    """The releases leave zero heads out, so one changed expert agrees with itself: S_H = 1."""
    base, (expert,) = draw(30, 24, 1, seed=9)

    _, update = update_of(base, [expert, base, base], variant=variant)

    assert update.gates["S_H"] == 1
    assert update.gates["norm_C"] == pytest.approx(0.2 * update.gates["norm_A"], rel=1e-6)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_equal_to_the_base_give_its_bytes(method, dtype, tmp_path):
    """Where no expert differs, a tensor is the base's bit for bit, negative zeros included."""
    group = make_group(tmp_path, dtype=dtype, experts=1)

    def with_negative_zeros(tensors):
        for tensor in tensors.values():
            tensor.view(-1)[:3] = -0.0

    edit_tensors(group.base, with_negative_zeros)
    copies = (tmp_path / "copy", tmp_path / "other copy")
    for copy in copies:
        shutil.copytree(group.base, copy)
    other = "model.norm.weight"  # without any difference there is nothing to merge
    edit_tensors(copies[0], lambda tensors: tensors[other].add_(1))
    same = as_many_as(method, Group(group.base, copies))

    merged = merge(same, tmp_path / "out", method=method)

    stored = read_tensors(group.base)
    del stored[other]
    for name, tensor in stored.items():
        assert bytes_of(merged.tensors[name]) == bytes_of(tensor)
        assert merged.row(name)["rule"] == "copy"


@every_method
def test_rows_that_no_expert_changed_keep_the_bases_zeros(method, tmp_path):
    """A negative zero that no expert changed stays negative where the update is zero there."""
    group = as_many_as(method, make_group(tmp_path, experts=2))
    name = "model.layers.0.input_layernorm.weight"
    for folder in group.folders:
        edit_tensors(folder, lambda tensors: tensors[name].__setitem__(slice(4), -0.0))

    merged = merge(group, tmp_path / "out", method=method)

    assert torch.equal(merged.tensors[name][:4], torch.zeros(4, dtype=torch.bfloat16))
    assert merged.row(name)["rule"] != "copy"


def test_a_rank_too_small_for_a_residual_takes_the_mean_and_warns():
    """In the paper's variant a 1 × n gate keeps the mean update, and the report says so."""
    base, experts = draw(1, 50, 3, seed=1)

    got, update = update_of(base, experts)

    assert update.rule == "mean"
    assert relative(got, sum(expert.double() for expert in experts) / 3) <= 1e-6
    assert "no residual" in update.warnings[0]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matrices_of_numerical_rank_k_take_the_mean_and_warn(rank):
    """Rank-k experts have no residual beyond float32's noise, which is not amplified."""
    random = torch.Generator().manual_seed(2)
    sigma = [1.0, 0.6, 0.3][:rank]
    experts = [with_spectrum(40, 30, sigma, random).float() for _ in range(3)]

    got, update = update_of(torch.zeros(40, 30), experts, rank=rank)

    assert update.rule == "mean"
    assert relative(got, sum(expert.double() for expert in experts) / 3) <= 1e-6
    assert update.warnings


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_the_releases_erase_such_an_update_and_the_report_warns(variant):
    """In the releases' variants a 1 × n gate loses its update, as there, with a warning."""
    base, experts = draw(1, 50, 3, seed=1)

    got, update = update_of(base, experts, variant=variant)

    assert not got.any()
    assert "erases" in update.warnings[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_expert_passes_through_with_a_warning(dtype, tmp_path):
    """With N = 1 the merged model is the expert, and the report says that nothing was measured."""
    group = make_group(tmp_path, experts=1, dtype=dtype)

    merged = merge(group, tmp_path / "out")

    expected = read_tensors(group.experts[0])
    for name, tensor in merged.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-8)
    assert any("one expert" in text for text in merged.report["summary"]["warnings"])


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_one_expert_in_a_release_gets_the_heads_budget(variant):
    """A release's N = 1 gives R + ρ‖R‖·H/‖H‖, which is not the expert."""
    base, experts = draw(30, 24, 1, seed=5)
    U, S, Vt = torch.linalg.svd(experts[0].double(), full_matrices=False)
    head = U[:, :1] @ Vt[:1]
    R = experts[0].double() - S[0] * head

    got, _ = update_of(base, experts, variant=variant)

    assert relative(got, R + 0.2 * torch.linalg.vector_norm(R) * head) <= 1e-5


@any_number
@pytest.mark.parametrize("count", [2, 5])
def test_any_number_of_experts_merges(method, count, tmp_path):
    """Two and five experts merge to finite weights with one report row a tensor."""
    group = make_group(tmp_path, experts=count, layers=1)

    merged = merge(group, tmp_path / "out", method=method)

    assert all(torch.isfinite(tensor).all() for tensor in merged.tensors.values())
    assert len(merged.report["tensors"]) == len(merged.tensors)
    row = merged.row("model.layers.0.self_attn.q_proj.weight")
    if method == "resmerge":
        assert row["c_R_floor"] == pytest.approx(count**-0.5)
        assert len(row["sigma"]) == count


def test_rank_two_heads_hold_two_directions(tmp_path):
    """With k = 2 every expert's head has two singular values and more of the energy."""
    group = make_group(tmp_path)

    one = merge(group, tmp_path / "one")
    two = merge(group, tmp_path / "two", parameters={"rank": 2})

    for row in two.report["tensors"]:
        if row["rule"] == "resmerge":
            assert all(len(sigma) == 2 and sigma[0] >= sigma[1] for sigma in row["sigma"])
            energies = zip(row["head_energy"], one.row(row["name"])["head_energy"], strict=True)
            assert all(large > small for large, small in energies)


@every_method
def test_inputs_are_not_modified(method, group, tmp_path):
    """A merge leaves every byte of its sources alone, and their modification times."""
    paths = [path for folder in group.folders for path in sorted(folder.iterdir())]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]

    merge(as_many_as(method, group), tmp_path / "out", method=method)

    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_a_merge_of_a_matrix_leaves_the_stored_tensors_alone():
    """TaskVectors and the update read the stored tensors and change none."""
    base, experts = draw(33, 47, 3, seed=6)
    copies = [tensor.clone() for tensor in (base, *experts)]

    update_of(base, experts)

    assert all(map(torch.equal, (base, *experts), copies))


@pytest.mark.slow
@every_method
def test_a_merge_is_deterministic(method, group, tmp_path):
    """The same plan into two folders writes the same weight bytes and the same gates."""
    group = as_many_as(method, group)
    one = merge(group, tmp_path / "one", method=method)
    two = merge(group, tmp_path / "two", method=method)

    file = "model.safetensors"
    assert (one.out / file).read_bytes() == (two.out / file).read_bytes()
    assert one.report["tensors"] == two.report["tensors"]


@every_variant
@pytest.mark.parametrize("shape", [(30, 20), (1500, 700), (130, 9000)])
def test_keeping_the_task_vectors_or_not_gives_the_same_bits(variant, shape):
    """Resident and re-read task vectors lead to bit-identical updates and gates."""
    base, experts = draw(*shape, 2, seed=3)

    kept, one = update_of(base, experts, variant=variant, resident=True)
    reread, two = update_of(base, experts, variant=variant, resident=False)

    assert torch.equal(kept, reread)
    assert one.gates == two.gates


def test_a_stack_of_matrices_is_merged_slice_by_slice(tmp_path):
    """A fused [E, m, n] tensor has the bits of E separate merges of its slices."""
    random = torch.Generator().manual_seed(12)
    stack, parts = "model.layers.0.mlp.experts.up_proj", "model.layers.0.mlp.experts.{}.up_proj"
    fused = make_group(tmp_path / "fused", layers=1, experts=2, seed=1)
    split = make_group(tmp_path / "split", layers=1, experts=2, seed=1)
    for one, other in zip(fused.folders, split.folders, strict=True):
        values = torch.randn(3, 24, 20, generator=random).bfloat16()
        edit_tensors(one, lambda tensors, values=values: tensors.update({stack: values}))
        slices = {parts.format(e): values[e] for e in range(3)}
        edit_tensors(other, lambda tensors, slices=slices: tensors.update(slices))

    whole = merge(fused, tmp_path / "whole")
    single = merge(split, tmp_path / "single")

    for e in range(3):
        assert torch.equal(whole.tensors[stack][e], single.tensors[parts.format(e)])
        row = single.row(parts.format(e))
        assert whole.row(stack)["slices"][e]["c_R"] == row["c_R"]
    assert whole.row(stack)["rule"] == "resmerge"


def test_an_unchanged_slice_of_a_stack_is_the_bases(tmp_path):
    """A slice that no expert changed keeps its bits, and the others are merged."""
    group = make_group(tmp_path / "group", layers=1, experts=2)
    name = "model.layers.0.mlp.experts.up_proj"
    random = torch.Generator().manual_seed(4)
    base = torch.randn(2, 24, 20, generator=random).bfloat16()
    base[0, 0, 0] = -0.0
    for folder in group.folders:
        values = base.clone()
        if folder != group.base:
            values[1] += torch.randn(24, 20, generator=random).bfloat16()
        edit_tensors(folder, lambda tensors, values=values: tensors.update({name: values}))

    merged = merge(group, tmp_path / "out")

    got = merged.tensors[name]
    assert torch.equal(got[0].view(torch.int16), base[0].view(torch.int16))
    assert not torch.equal(got[1], base[1])


@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (0, 8), (8, 0), (2, 0, 4)])
def test_other_shapes_take_the_elementwise_rule(shape, tmp_path):
    """Four axes or none of the elements go through the mean, and keep their shape."""
    name = "model.layers.0.conv.weight"
    extra = {name: torch.ones(shape, dtype=torch.bfloat16)}
    group = make_group(tmp_path / "group", layers=1, experts=2, extra=extra)
    edit_tensors(group.experts[0], lambda tensors: tensors[name].mul_(3))

    merged = merge(group, tmp_path / "out")

    assert torch.equal(merged.tensors[name], torch.full(shape, 2.0, dtype=torch.bfloat16))
    assert merged.row(name)["rule"] == ("mean" if math.prod(shape) else "copy")


@pytest.mark.parametrize("other", ["mean", "sum", "base"])
def test_tensors_without_svd_take_the_rule_of_other(other, group, tmp_path):
    """Norms, biases and embeddings get the mean, the sum or nothing of their task vectors."""
    base, experts = read_tensors(group.base), [read_tensors(path) for path in group.experts]
    factor = {"mean": 1 / 3, "sum": 1.0, "base": 0.0}[other]

    merged = merge(group, tmp_path / "out", parameters={"other": other}, dtype="float32")

    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        start = base[name].double()
        update = factor * sum(expert[name].double() - start for expert in experts)
        torch.testing.assert_close(
            merged.tensors[name].double(), start + update, rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("method", ["mean", "task_arithmetic"])
def test_weights_scale_each_expert(method, group, tmp_path):
    """A weighted method multiplies each task vector by its expert's factor."""
    base, experts = read_tensors(group.base), [read_tensors(path) for path in group.experts]
    weights = [2.0, 0.5, -1.0]
    total = sum(weights) if method == "mean" else 1.0

    merged = merge(group, tmp_path / "out", method=method, weights=weights, dtype="float32")

    for name, tensor in merged.tensors.items():
        start = base[name].double()
        pairs = zip(weights, experts, strict=True)
        update = sum(weight * (expert[name].double() - start) for weight, expert in pairs) / total
        torch.testing.assert_close(tensor.double(), start + update, rtol=1e-7, atol=1e-8)


def test_weights_that_sum_to_zero_are_refused_by_the_mean(group):
    """A mean with weights that sum to zero is refused when it is planned, not divided by."""
    plan = plan_group(group, method="mean", weights=[1.0, -1.0, 0.0])

    assert plan.refused


@pytest.mark.parametrize(
    ("ablation", "expected"),
    [
        ("head_only", lambda heads, rest: sum(heads) / 3),
        ("residual_only", lambda heads, rest: sum(rest) / 3),
    ],
)
def test_structural_ablations_keep_one_part(ablation, expected):
    """Head only and residual only are the plain means of their parts (paper, Table 2)."""
    base, experts = draw(30, 24, 3, seed=2)
    heads, rest = [], []
    for expert in experts:
        U, S, Vt = torch.linalg.svd(expert.double(), full_matrices=False)
        heads.append(S[0] * U[:, :1] @ Vt[:1])
        rest.append(expert.double() - heads[-1])

    got, _ = update_of(base, experts, ablation=ablation)

    assert relative(got, expected(heads, rest)) <= 1e-6


def test_ungated_heads_come_back_with_their_whole_budget():
    """Without the gate the head adds ρ of the backbone's norm, without the head nothing."""
    base, experts = draw(30, 24, 3, seed=2)

    _, ungated = update_of(base, experts, ablation="ungated")
    _, without = update_of(base, experts, ablation="no_head")

    assert ungated.gates["norm_C"] == pytest.approx(0.2 * ungated.gates["norm_A"])
    assert without.gates["norm_C"] == 0


@every_method
def test_every_parameter_of_a_method_is_described(method):
    """A parameter has a label, a default inside its bounds, and is understood as text."""
    built = build_method(method, {})

    for key, field in parameter_fields(type(built)).items():
        assert field.metadata["label"]
        assert build_method(method, {key: str(field.default)}) == built


def test_report_gates_obey_the_identity_of_coherence(group, tmp_path):
    """c_R² = (1 + (N − 1) s_R) / N for every matrix (docs: the two carry the same information)."""
    merged = merge(group, tmp_path / "out")

    rows = [row for row in merged.report["tensors"] if row["rule"] == "resmerge"]
    assert rows
    for row in rows:
        assert row["c_R"] ** 2 == pytest.approx((1 + 2 * row["s_R"]) / 3, abs=1e-9)
        assert 0 <= row["S_H"] <= 1
        assert row["norm_C"] <= 0.2 * row["norm_A"] * (1 + 1e-9)


def test_weights_on_disk_are_what_the_update_says(group, tmp_path):
    """The file holds base plus update, rounded once to nearest."""
    name = "model.layers.1.mlp.down_proj.weight"
    base = load_file(group.base / "model.safetensors")[name]
    experts = [load_file(path / "model.safetensors")[name] for path in group.experts]
    delta, _ = update_of(base, experts, name=name)

    merged = merge(group, tmp_path / "out")

    assert torch.equal(merged.tensors[name], (base.float() + delta).bfloat16())
