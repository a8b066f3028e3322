"""A merge as a batch job of SLURM: the file for sbatch, of one job or of an array of parts."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.costs import SHARE
from ..planning.machines import timeout_for
from ..planning.plan import Plan

# What Python and torch take beside what the plan counts.
_LIBRARY_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Batch:
    """How many nodes and processes a merge gets.

    Attributes:
        nodes: that share it over the network, by torchrun.
        processes: on each of them.
        cpus: for each process.
        array: parts that need no network between them, each a task of an array; 0: one job.
    """

    nodes: int = 1
    processes: int = 1
    cpus: int = 4
    array: int = 0


def batch_file(plan: Plan, batch: Batch, words: Sequence[str]) -> str:
    """Return the file that sbatch takes.

    Args:
        plan: of the merge; it says how much memory and time to ask for.
        batch: on how many nodes.
        words: of the command, from ``merge`` on; paths are those of all nodes.
    """
    machines = batch.array or batch.nodes
    memory = math.ceil(batch.processes * (plan.peak_memory_bytes / SHARE + _LIBRARY_BYTES) / 1e6)
    minutes = timeout_for(plan.seconds_estimate / machines) // 60
    asked = {
        "job-name": "resmerge",
        "nodes": str(1 if batch.array else batch.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(batch.cpus * batch.processes),
        "mem": f"{memory}M",
        "time": str(minutes),
        "open-mode": "append",
    }
    if plan.options.device.startswith("cuda"):
        asked["gpus-per-node"] = str(batch.processes)
    if batch.array:
        asked["array"] = f"0-{batch.array - 1}"
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in asked.items())]
    lines.append("#SBATCH --requeue")
    command = shlex.join(words)
    if batch.array:
        lines += [
            "# A task that ended early is run again by its number: sbatch --array=3 FILE",
            f"srun resmerge-stream {command} --part auto/{batch.array}",
        ]
    else:
        lines += [
            "# The main process waits on the first node, where this script runs.",
            "host=$(hostname) port=$((20000 + SLURM_JOB_ID % 20000))",
            "srun --kill-on-bad-exit=1 torchrun --nnodes=$SLURM_NNODES "
            f"--nproc-per-node={batch.processes} --rdzv-id=$SLURM_JOB_ID --rdzv-backend=c10d "
            f"--rdzv-endpoint=$host:$port -m resmerge_stream {command}",
        ]
    return "\n".join(lines) + "\n"
