"""What trainers leave, written by real processes: two ranks that speak gloo."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.checkpoints import run_python

# How ranks cut a matrix: rows; columns; rows, with copies as in HSDP; both ways at once. And how
# many ranks.
CUTS = {"rows": 2, "columns": 2, "copies": 4, "both": 4}


def save_by_ranks(weights: Path, out: Path) -> None:
    """Have processes save the tensors of a file as trainers do, cut in every way of `CUTS`.

    Args:
        weights: a safetensors file.
        out: gets ``dcp-CUT``, as accelerate's FSDP saves it, and ``verl-CUT`` for each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.support.trainers import main; main(sys.argv[1:])"
    done = run_python(code, str(weights), str(out), str(port))
    assert done.returncode == 0, done.stderr[-3000:]


def main(arguments: list[str]) -> None:
    """Start the ranks: two, then four."""
    import torch.distributed.checkpoint  # noqa: F401  # once, before they fork
    import torch.multiprocessing as processes

    for world in (2, 4):
        processes.start_processes(_rank, (world, *arguments), world, start_method="fork")


def _rank(rank: int, world: int, weights: str, out: str, port: str) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(int(port) + world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    meshes = {"copies": ((2, 2), ("ddp", "fsdp")), "both": ((2, 2), ("fsdp", "tp"))}

    def placements(cut: str, tensor: Tensor) -> list[object]:
        last = tensor.ndim - 1
        return {
            "rows": [Shard(0)],
            "columns": [Shard(last)],
            "copies": [Replicate(), Shard(0)],
            "both": [Shard(0), Shard(last) if last else Replicate()],
        }[cut]

    for cut in (cut for cut, ranks in CUTS.items() if ranks == world):
        shape, names = meshes.get(cut, ((world,), ("fsdp",)))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        state = {
            name: distribute_tensor(tensor, mesh, placements(cut, tensor))
            for name, tensor in load_file(weights).items()
        }
        verl = Path(out) / f"verl-{cut}"
        verl.mkdir(parents=True, exist_ok=True)
        torch.save(state, verl / f"model_world_size_{world}_rank_{rank}.pt")
        optimizer = {"state": {name: {"exp_avg": tensor} for name, tensor in state.items()}}
        dcp.save({"model": state, "optim": optimizer}, checkpoint_id=f"{out}/dcp-{cut}")
    dist.destroy_process_group()


def merged_as_verl_does(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in verl's files by its merger's arithmetic, before it rounds them.

    Source: ``verl/model_merger/fsdp_model_merger.py``: placements of the data-parallel dimension
    are dropped, local tensors of the first replica joined by the placement that is left.
    """
    files = sorted(folder.glob("model_world_size_*.pt"))
    states = [torch.load(file, weights_only=False) for file in files]
    made = {}
    for name, first in states[0].items():
        mesh, placed = first.device_mesh, first.placements
        shards = mesh.mesh.shape[-1]
        if mesh.mesh_dim_names[0] in ("dp", "ddp"):
            placed = placed[1:]
        (one,) = placed
        local = [state[name]._local_tensor for state in states[:shards]]
        made[name] = torch.cat(local, dim=one.dim) if one.is_shard() else local[0]
    return made


def saved_by_deepspeed(tensors: Mapping[str, Tensor], folder: Path, kind: str) -> None:
    """Write what DeepSpeed does, by its own layout of files and keys.

    Source: ``deepspeed/checkpoint/ds_to_universal.py`` and ``runtime/engine.py``.

    Args:
        tensors: by name.
        folder: gets the files.
        kind: ``universal``, ``states`` (of ZeRO 1 and 2) or ``bin`` (`save_16bit_model`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "universal":
        for name, tensor in tensors.items():
            (folder / "zero" / name).mkdir(parents=True)
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                value = {"param": tensor.float(), "cat_dim": 0}
                torch.save(value, folder / "zero" / name / f"{state}.pt")
        return
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('never run')\n")
    (folder / "latest").write_text("global_step7")
    if kind == "states":
        (folder / "global_step7").mkdir()
        held = {"module": dict(tensors), "ds_version": "0.18.2", "mp_world_size": 1,
                "shared_params": {}, "random": torch.random.get_rng_state()}  # fmt: skip
        torch.save(held, folder / "global_step7" / "mp_rank_00_model_states.pt")
    else:
        torch.save(dict(tensors), folder / "pytorch_model.bin")
