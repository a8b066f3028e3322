"""What the command line takes: the options of every command. Light: `--help` needs no more."""

import argparse
from typing import Any

from ..planning.options import Declared, declared
from ..specs import OUTPUT_DTYPES


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")


def add_publication(parser: argparse.ArgumentParser) -> None:
    """Add what says where on the Hub to publish, and how."""
    hub = parser.add_argument_group("publish on the Hub, with HF_TOKEN or the Hub's login")
    hub.add_argument(
        "--push-to", metavar="NS/NAME", help="publish to this repository; a new one is private"
    )
    seen = hub.add_mutually_exclusive_group()
    seen.add_argument(
        "--private", action="store_true", help="keep it private (default for a new one)"
    )
    seen.add_argument(
        "--public", action="store_true", help="make it public when the merge is complete"
    )
    hub.add_argument(
        "--update",
        action="store_true",
        help="replace the model in it; the plan lists the files",
    )
    hub.add_argument(
        "--create-pr",
        action="store_true",
        help="open a pull request on it instead; change nothing else",
    )
    hub.add_argument(
        "--collection", metavar="OWNER/SLUG", help="add the model to this collection of yours"
    )
    hub.add_argument(
        "--discuss", action="store_true", help="open a discussion in it when the merge is done"
    )
    hub.add_argument(
        "--max-disk",
        metavar="SIZE",
        help="disk space for shards not yet sent (default: two shards per process); 0: write none",
    )
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
    what.add_argument(
        "--base", metavar="ID", help="the base model: a folder or namespace/name[@revision]"
    )
    what.add_argument(
        "--expert", metavar="ID", action="append", default=[], help="an expert; repeat for each"
    )
    what.add_argument(
        "--method",
        metavar="NAME",
        help="how to merge, also with a preset such as ties:paper (default: resmerge); "
        "'methods' lists all",
    )
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
    how = parser.add_argument_group("output")
    how.add_argument(
        "--dtype", metavar="TYPE", help=f"one of {', '.join(OUTPUT_DTYPES)} (default: the base's)"
    )
    for known in declared():
        if known.changes != "nothing":
            _add(how, known)
    add_machine(parser)
    add_json(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add what changes nothing that is written."""
    machine = parser.add_argument_group("machine")
    for known in declared():
        if known.changes == "nothing":
            _add(machine, known)


def _add(group: Any, known: Declared) -> None:
    if known.default is True:
        group.add_argument(
            known.flag, dest=known.key, action="store_const", const=False, help=known.help
        )
        return
    kind = int if type(known.default) is int else str
    group.add_argument(known.flag, metavar=known.metavar, type=kind, help=known.help)


def add_submit(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``submit``."""
    add_recipe(parser)
    add_publication(parser)
    job = parser.add_argument_group("the Job")
    add_job(job)
    job.add_argument(
        "--attach", metavar="JOB_ID", help="follow a running or finished Job; takes no recipe"
    )
    then = parser.add_argument_group("what the Job does after it has published the merge")
    then.add_argument(
        "--then",
        choices=("evaluate",),
        help="ask base, experts and merge questions (--tasks), on a GPU that can hold each model; "
        "open a pull request on the merge with the results",
    )
    add_questions(then, required=False)


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
        help="best: run one merge after another, and keep only the best model's files "
        "(default: all)",
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
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")
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
