"""The command line: its commands and their options; what they do is imported when one runs."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..version import __version__
from .arguments import (
    add_analyse,
    add_compare,
    add_evaluate,
    add_extract,
    add_json,
    add_publication,
    add_recipe,
    add_sample,
    add_submit,
)

_EXIT = """\
exit codes: 0 done; 2 refused (bad input, or verify found a difference); 3 stopped, the same
command continues; 130 interrupted, 143 ended by SIGTERM, the same command continues; 1 a bug.
"""
_EXAMPLES = {
    "plan": "resmerge-stream plan --base models/base --expert models/math --expert models/code",
    "merge": "resmerge-stream merge recipe.yml --push-to me/merged\n"
    "in 8 processes: accelerate launch --multi_gpu --num_processes 8 -m resmerge_stream merge …",
    "verify": "resmerge-stream verify merged",
    "compare": "resmerge-stream compare recipe.yml --methods resmerge,ties,tsv_m --out compared",
    "analyse": "resmerge-stream analyse recipe.yml --out analysis",
    "extract": "resmerge-stream extract models/math --base models/base --rank 32 --out math-lora",
    "evaluate": "resmerge-stream evaluate models/base models/math merged --tasks questions.jsonl\n"
    "as a Job: resmerge-stream evaluate org/base me/merged --tasks gsm8k --card me/merged --job",
    "submit": "resmerge-stream submit recipe.yml --push-to me/merged\n"
    "and then: resmerge-stream submit recipe.yml --push-to me/merged --then evaluate "
    "--tasks gsm8k",
    "methods": "resmerge-stream methods",
    "demo": "resmerge-stream demo --out demo-merge",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one message, and where to read on."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nSee '{self.prog} --help'.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments, without the program's name; `sys.argv` when None.
    """
    args = _parser().parse_args(argv)
    # Behind the parser: the library takes three times as long to import, and --help needs none.
    from .commands import run_command

    return run_command(args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="resmerge-stream",
        description="Merge RL experts of one base model, one tensor at a time, in little memory.",
        epilog=_EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"resmerge-stream {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    plan = _command(commands, "plan", "show what a merge would do; reads headers only")
    add_recipe(plan)
    plan.add_argument("--out", metavar="DIR", help="also check this output folder and its disk")
    plan.add_argument(
        "--advice",
        action="store_true",
        help="read the weights, and say which methods to compare, and why",
    )
    add_sample(plan)
    add_publication(plan)
    merge = _command(commands, "merge", "merge, write, and report")
    add_recipe(merge)
    merge.add_argument("--out", metavar="DIR", help="the output folder; must not exist yet")
    add_publication(merge)
    merge.add_argument(
        "--discard-staging",
        action="store_true",
        help="list and remove what an unfinished merge left at the target, then start afresh",
    )
    verify = _command(commands, "verify", "check a merged model against its report")
    verify.add_argument(
        "merged", metavar="ID", help="the output folder of a merge, or namespace/name"
    )
    verify.add_argument(
        "--recipe", metavar="FILE", help="the recipe, where the report does not name the sources"
    )
    verify.add_argument(
        "--sample",
        type=int,
        default=3,
        metavar="N",
        help="how many tensors to merge again (default: 3)",
    )
    add_json(verify)
    add_compare(_command(commands, "compare", "merge by several methods in one pass"))
    add_analyse(_command(commands, "analyse", "measure the experts' spectra; no merging"))
    add_extract(_command(commands, "extract", "turn a model into a LoRA adapter of its base"))
    add_evaluate(_command(commands, "evaluate", "ask models the same questions"))
    add_submit(_command(commands, "submit", "merge as a Job on the Hub; asks before it spends"))
    methods = _command(commands, "methods", "list the methods and their parameters")
    add_json(methods)
    demo = _command(commands, "demo", "merge the built-in experts and ask them; no network")
    demo.add_argument(
        "--out", metavar="DIR", default="demo-merge", help="the output folder (default: demo-merge)"
    )
    demo.add_argument(
        "--prompts",
        type=int,
        default=500,
        metavar="N",
        help="prompts to ask for each task (default: 500; 0: none)",
    )
    demo.add_argument(
        "--lora",
        action="store_true",
        help="merge the experts as LoRA adapters of rank 16, extracted from them",
    )
    add_json(demo)
    return parser


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {_EXAMPLES[name]}\n\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name)
    return parser
