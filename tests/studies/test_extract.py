"""A model as an adapter of its base: what PEFT makes of it, and what each rank holds."""

import json

import pytest
import torch

pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from resmerge_stream.cli.main import main
from tests.support import adapters

MATRICES = tuple(f"{leaf}.weight" for leaf in adapters.LINEAR)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a base and a model trained from it: every tensor differs, the norms too."""
    folder = tmp_path_factory.mktemp("pair")
    base = adapters.make_base(folder / "base", adapters.KINDS["plain"])
    model = adapters.make_base(folder / "model", adapters.KINDS["plain"], seed=1)
    generator = torch.Generator().manual_seed(2)
    moved = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in adapters.weights(base).items()
    }
    save_file(moved, model / "model.safetensors", {"format": "pt"})
    return base, model


def differences(base, model):
    """Return ΔW of every tensor, float64."""
    before = adapters.weights(base)
    return {n: w.double() - before[n].double() for n, w in adapters.weights(model).items()}


def extract(*words):
    """Run the command; return its exit code."""
    return main(["extract", *map(str, words)])


def test_peft_puts_the_best_of_the_rank_on_the_base(tmp_path, pair):
    """Loaded by PEFT, each matrix has the truncated SVD of its difference, the rest the base's."""
    base, model = pair

    code = extract(model, "--base", base, "--rank", 3, "--out", tmp_path / "out")

    assert code == 0
    found = differences(base, adapters.whole(base, tmp_path / "out", tmp_path / "whole"))
    for name, delta in differences(base, model).items():
        if not name.endswith(MATRICES):
            assert not found[name].any(), name
            continue
        U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
        best = U[:, :3] * sigma[:3] @ Vh[:3]
        assert (found[name] - best).norm() <= 1e-5 * delta.norm(), name


def test_a_dry_run_prints_what_each_rank_holds_and_writes_nothing(tmp_path, pair, capsys):
    """The curve is that of the singular values; what an adapter cannot hold is named and told."""
    base, model = pair
    spectra, outside = [], 0.0
    for name, delta in differences(base, model).items():
        if name.endswith(MATRICES):
            spectra.append(torch.linalg.svdvals(delta).square())
        else:
            outside += float(delta.square().sum())
    energy = sum(float(spectrum.sum()) for spectrum in spectra)

    code = extract(model, "--base", base, "--rank", 6, "--dry-run", "--json")

    report = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]
    assert code == 0
    assert list(report["adapter"]["by_rank"]) == ["1", "2", "4", "6"]
    for rank, share in report["adapter"]["by_rank"].items():
        held = sum(float(spectrum[: int(rank)].sum()) for spectrum in spectra)
        assert share == pytest.approx(held / energy, abs=1e-5)
    assert report["outside"]["share"] == pytest.approx(outside / (outside + energy), abs=1e-5)
    assert "model.embed_tokens.weight" in report["outside"]["tensors"]
    assert "model.norm.weight" in report["outside"]["tensors"]
    assert list(tmp_path.iterdir()) == []


def test_the_curve_is_text_for_people(pair, capsys):
    """A line for each rank, and one for what lies outside."""
    base, model = pair

    extract(model, "--base", base, "--rank", 2, "--dry-run")

    lines = capsys.readouterr().out.splitlines()
    assert "in 14 matrices" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert "that the adapter does not hold" in lines[3]


def test_it_is_the_merge_of_one_expert(tmp_path, pair):
    """The same bytes as the mean of one expert, as an adapter of that rank; the card says what."""
    base, model = pair
    one = ("--base", base, "--expert", model, "--method", "mean")
    as_adapter = ("--as", "adapter", "--adapter-rank", 4)
    main([str(word) for word in ("merge", *one, *as_adapter, "--out", tmp_path / "merged")])

    extract(model, "--base", base, "--rank", 4, "--out", tmp_path / "out")

    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# model as a LoRA adapter of base" in card
    assert "| 4 | " in card


def test_a_finished_merge_of_adapters_comes_back_whole(tmp_path):
    """A merge whose update has rank 8 loses nothing but rounding at rank 8."""
    kind = adapters.KINDS["plain"]
    base = adapters.make_base(tmp_path / "base", kind)
    made = [adapters.make_adapter(tmp_path / f"a{i}", base, kind, seed=i) for i in range(2)]
    experts = [word for adapter in made for word in ("--expert", str(adapter))]
    merged = str(tmp_path / "merged")
    main(["merge", "--base", str(base), *experts, "--out", merged])

    extract(merged, "--base", base, "--rank", 8, "--out", tmp_path / "out")

    found = differences(base, adapters.whole(base, tmp_path / "out", tmp_path / "whole"))
    weights = adapters.weights(base)
    for name, delta in differences(base, tmp_path / "merged").items():
        # The merge itself was rounded to float32, which is noise of full rank.
        rounding = 4 * 2.0**-24 * weights[name].double().norm()
        assert (found[name] - delta).norm() <= 1e-6 * delta.norm() + rounding, name


def test_an_adapter_is_cut_to_a_smaller_rank(tmp_path):
    """An extract of an adapter is its best approximation, and reads nothing of the base."""
    kind = adapters.KINDS["plain"]
    base = adapters.make_base(tmp_path / "base", kind)
    adapter = adapters.make_adapter(tmp_path / "adapter", base, kind)

    extract(adapter, "--base", base, "--rank", 1, "--out", tmp_path / "out")

    report = json.loads((tmp_path / "out" / "resmerge" / "report.json").read_text())
    own = load_file(adapter / "adapter_model.safetensors").values()
    assert report["summary"]["bytes_read"] == sum(t.numel() * t.element_size() for t in own)
    assert 0 < report["adapter"]["kept"] < 1
    assert report["adapter"]["rank"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL", "--base", "BASE", "--rank", "0", "--dry-run"), "rank must be 1 or more"),
        (("MODEL", "--base", "BASE", "--rank", "many", "--dry-run"), "must be a whole number"),
        (("MODEL", "--base", "nowhere", "--dry-run"), "there is no folder 'nowhere'"),
        (("nowhere", "--base", "BASE", "--dry-run"), "there is no folder 'nowhere'"),
        (("BASE", "--base", "BASE", "--dry-run"), "is the base itself"),
        (("MODEL", "--base", "BASE"), "nowhere to write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_extracted_is_refused_in_one_message(pair, capsys, words, message):
    """No such model, no such base, no rank, no target: one line on standard error, exit 2."""
    base, model = pair
    known = {"BASE": base, "MODEL": model}

    code = extract(*(known.get(word, word) for word in words))

    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert err.count("resmerge-stream:") == 1


def test_a_copy_of_the_base_has_nothing_to_extract(tmp_path, pair, capsys):
    """Where no weight differs, the dry run says so instead of a curve."""
    base, _ = pair
    copy = adapters.make_base(tmp_path / "copy", adapters.KINDS["plain"])

    code = extract(copy, "--base", base, "--dry-run")

    assert code == 0
    assert "does not differ from the base" in capsys.readouterr().out
