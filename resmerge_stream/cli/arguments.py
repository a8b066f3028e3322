"""What the command line takes: the options of every command. Light: `--help` needs no more."""

import argparse
from typing import Any

from ..planning.options import Declared, declared
from ..recipe import DEFAULT_METHOD
from ..sinks.publication import FLAGS
from ..specs import OUTPUT_DTYPES, RECIPE_DTYPES


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON, one event a line with its time"
    )


def add_publication(parser: argparse.ArgumentParser) -> None:
    """Add what says where on the Hub to publish, and how."""
    hub = parser.add_argument_group("publish on the Hub, with HF_TOKEN or the Hub's login")
    seen = hub.add_mutually_exclusive_group()
    for flag in FLAGS:
        group = seen if flag.field == "public" else hub
        if flag.metavar:
            group.add_argument(flag.word, metavar=flag.metavar, help=flag.help)
        else:
            group.add_argument(flag.word, action="store_true", help=flag.help)
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="keep what a restart needs in this folder (default: your cache folder)",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add what says what to merge, and how."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE",
        help="a recipe file in mergekit's vocabulary, or a merged model's folder, ID or address",
    )  # fmt: skip
    what = parser.add_argument_group("instead of a recipe, or to override it")
    _add_models(what)
    what.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a parameter of the method; repeat for each",
    )
    what.add_argument(
        "--tokenizer-source", metavar="WHICH",
        help="match the models' rows by token, with the tokens of: base, union or an ID",
    )  # fmt: skip
    what.add_argument(
        "--chat-template", metavar="WHICH",
        help="auto (the one that most models have), a name such as chatml, or Jinja",
    )  # fmt: skip
    what.add_argument(
        "--generation-config", metavar="ID",
        help="take generation_config.json from this model (default: the base)",
    )  # fmt: skip
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add what says how it is written, and on which machine."""
    how = parser.add_argument_group("output")
    how.add_argument(
        "--dtype", metavar="TYPE", help=f"one of {', '.join(RECIPE_DTYPES)} (default: the base's)"
    )
    for known in declared():
        if known.changes != "nothing":
            _add(how, known)
    add_machine(parser)
    add_json(parser)


def _add_models(group: argparse._ActionsContainer) -> None:
    """Add ``--base``, ``--expert`` and ``--method``."""
    group.add_argument(
        "--base",
        metavar="ID",
        help="the base model: a folder, namespace/name[@revision][:folder] or hf://buckets/…",
    )
    group.add_argument(
        "--expert", metavar="ID", action="append", default=[], help="an expert; repeat for each"
    )
    method = group.add_argument(
        "--method",
        metavar="NAME",
        help=f"how to merge, also with a preset such as ties:paper (default: {DEFAULT_METHOD}); "
        "'methods' lists all",
    )
    method.completer = _method_names  # type: ignore[attr-defined]  # argcomplete's way


def _method_names(**_: Any) -> list[str]:
    """Return the methods, for a shell that completes a word."""
    from ..methods import find_methods

    return list(find_methods())


def add_init(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``init``."""
    parser.add_argument(
        "out", nargs="?", metavar="FILE", default="recipe.yml",
        help="where to write it; must not exist yet (default: recipe.yml)",
    )  # fmt: skip
    what = parser.add_argument_group("what it merges (default: the built-in experts)")
    _add_models(what)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add what changes nothing that is written."""
    machine = parser.add_argument_group("machine")
    for known in declared():
        if known.changes == "nothing":
            _add(machine, known)
    machine.add_argument(
        "--no-check-sources",
        dest="check_sources",
        action="store_const",
        const="none",
        help="the same as --check-sources none",
    )


def _add(group: Any, known: Declared) -> None:
    kind = int if type(known.default) is int else str
    group.add_argument(known.flag, metavar=known.metavar, type=kind, help=known.help)


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Add where a merge is written to, and what becomes of an unfinished one."""
    parser.add_argument("--out", metavar="DIR", help="the output folder; must not exist yet")
    add_publication(parser)
    parser.add_argument(
        "--finish", dest="part", action="store_const", const="finish",
        help="merge nothing; publish what the parts (--part) made, if nothing is missing",
    )  # fmt: skip
    parser.add_argument(
        "--discard-staging",
        action="store_true",
        help="list and remove what an unfinished merge left at the target, then start afresh",
    )


def add_average(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``average``: a merge of checkpoints without a recipe."""
    parser.add_argument(
        "expert",
        nargs="+",
        metavar="RUN",
        help="checkpoints, or a pattern of them in quotes: 'org/run@step_*' (branches and tags), "
        "'org/run:checkpoint-*' (folders of a repository), 'hf://buckets/org/run/checkpoint-*' "
        "(of a bucket), 'runs/checkpoint-*'",
    )
    parser.add_argument("--last", metavar="K", help="only the last K checkpoints (default: all)")
    parser.add_argument(
        "--window", metavar="FIRST:LAST", help="only checkpoints of these steps; either may be left"
    )
    parser.add_argument(
        "--weights",
        metavar="DECAY",
        help="as if the learning rate had decayed so over them: uniform (default), linear, cosine, "
        "1-sqrt, or the moving average ema:0.9",
    )
    parser.set_defaults(
        recipe=None, base=None, method="average", set=[], tokenizer_source=None,
        chat_template=None, generation_config=None,
    )  # fmt: skip
    add_output(parser)
    add_merge(parser)


def add_submit(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``submit``."""
    add_recipe(parser)
    add_publication(parser)
    job = parser.add_argument_group("the Job")
    add_job(job)
    job.add_argument(
        "--machines",
        metavar="N",
        default="1",
        help="merge on so many machines, each with a Job of its own; auto: as many as halve the "
        "time well, with a table of 1, 2, 4, 8 and 16 (default: 1)",
    )
    job.add_argument(
        "--attempts",
        metavar="N",
        help="let the Hub start a Job that failed again, N times in all; it continues (default: 1, "
        "with several machines 3)",
    )
    job.add_argument(
        "--attach", metavar="JOB_ID", help="follow a running or finished Job; takes no recipe"
    )
    add_slurm(parser.add_argument_group("instead, a file for SLURM's sbatch"))
    then = parser.add_argument_group("what the Job does after it has published the merge")
    then.add_argument(
        "--then",
        choices=("evaluate",),
        help="ask base, experts and merge questions (--tasks), on a GPU that can hold each model; "
        "open a pull request on the merge with the results",
    )
    add_questions(then, required=False)


def add_slurm(group: argparse._ActionsContainer) -> None:
    """Add what says how a batch job of SLURM runs."""
    group.add_argument(
        "--slurm", action="store_true",
        help="print a batch file that merges on a cluster, and submit nothing",
    )  # fmt: skip
    group.add_argument("-o", dest="script", metavar="FILE", help="write it to this new file")
    group.add_argument("--out", metavar="DIR", help="the output folder, which all nodes share")
    counts = {
        "nodes": (1, "nodes that share the merge over the network (default: 1)"),
        "processes": (1, "processes on each node, such as one for each GPU (default: 1)"),
        "cpus": (4, "cores for each process (default: 4)"),
        "array": (0, "instead of nodes, an array of N parts without network between them"),
    }
    for name, (default, text) in counts.items():
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)


def add_job(group: argparse._ActionsContainer) -> None:
    """Add what says how a Job runs."""
    group.add_argument(
        "--flavor", metavar="NAME", help="run on this machine (default: the cheapest that fits)"
    )
    group.add_argument(
        "--timeout",
        metavar="TIME",
        help="end the Job after this time, such as 2h (default: from the estimate)",
    )
    group.add_argument(
        "--yes", action="store_true", help="start without asking you to accept the price"
    )


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``compare``."""
    add_recipe(parser)
    parser.add_argument(
        "--methods",
        metavar="A,B,C",
        required=True,
        help="methods, with parameters after colons: resmerge,ties:density=0.2,ties:paper",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="write a folder for each method, the table and the picture to this folder",
    )
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="write reports, table and picture, but no weights",
    )
    parser.add_argument(
        "--update", action="store_true", help="replace results whose sources changed"
    )
    parser.add_argument("--work-dir", metavar="DIR", help="the same as for merge")
    asked = parser.add_argument_group("which merge is best")
    asked.add_argument(
        "--evaluate",
        action="store_true",
        help="ask base, experts and merges the same questions (--tasks)",
    )
    add_questions(asked, required=False)
    asked.add_argument(
        "--keep",
        choices=("all", "best"),
        default="all",
        help="best: ask the merges in memory and write only the best (default: all)",
    )
    asked.add_argument(
        "--at-least",
        choices=("base", "experts"),
        help="with --keep best: keep nothing, and end with 2, where the best answers less than "
        "the base, or than the base or an expert",
    )


def add_analyse(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``analyse``."""
    add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder for the results")
    parser.add_argument(
        "--sft",
        metavar="ID",
        action="append",
        default=[],
        help="an SFT expert to compare with; repeat for each",
    )
    parser.add_argument("--rank", type=int, default=1, help="directions in the head (default: 1)")
    add_sample(parser)
    parser.add_argument(
        "--component",
        choices=("head", "residual"),
        help="instead, write the model W0 + head (or residual) of one expert",
    )
    parser.add_argument("--of", metavar="EXPERT", help="the expert for --component: ID or number")


def add_sample(parser: argparse.ArgumentParser) -> None:
    """Add ``--sample``."""
    parser.add_argument(
        "--sample",
        metavar="SHARE",
        default="100%",
        help="share of the layers to read, such as 20%% (default: 100%%)",
    )


def add_extract(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``extract``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an expert, a finished merge or an adapter: folder or namespace/name[@revision]",
    )
    parser.add_argument(
        "--base", metavar="ID", required=True, help="the base model that the adapter will belong to"
    )
    parser.add_argument(
        "--rank",
        metavar="K",
        dest="adapter_rank",
        default="32",
        help="highest rank of the adapter's modules (default: 32)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; print how much of the difference each rank up to K keeps",
    )
    parser.add_argument("--out", metavar="DIR", help="the output folder; must not exist yet")
    parser.add_argument(
        "--dtype", metavar="TYPE", help=f"one of {', '.join(OUTPUT_DTYPES)} (default: float32)"
    )
    add_publication(parser)
    add_machine(parser)
    add_json(parser)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``evaluate``."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folder or namespace/name[@revision]; give the base first",
    )
    add_questions(parser, required=True)
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="evaluation",
        help="the folder for results and unfinished answers (default: evaluation)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--card",
        metavar="MERGE",
        help="put the results into the card of this merge, one of the models; on the Hub, by a "
        "pull request",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, one event a line with its time"
    )
    job = parser.add_argument_group("as a Job on the Hub")
    job.add_argument(
        "--job",
        action="store_true",
        help="run on one of the Hub's machines, with a GPU that can hold each model; asks before "
        "it spends money; opens a pull request with the results (--card)",
    )
    add_job(job)


def add_questions(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """Add ``--tasks``, ``--limit`` and ``--engine``."""
    parser.add_argument(
        "--tasks",
        required=required,
        metavar="A,B,C",
        help="built-in tasks (add, sort, reverse, close), files (FILE.jsonl, FILE.yaml), or tasks "
        "of lm-evaluation-harness",
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, default=500, help="questions for each task (default: 500)"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "transformers", "vllm"),
        default="auto",
        help="what loads the models that are asked (default: vLLM where it is installed and there "
        "is a GPU, else transformers)",
    )
