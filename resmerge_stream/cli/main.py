"""The command line: its commands and their options; what they do is imported when one runs."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ..device import share_heaps
from ..version import __version__
from .arguments import (
    add_analyse,
    add_average,
    add_compare,
    add_evaluate,
    add_extract,
    add_init,
    add_json,
    add_merge,
    add_publication,
    add_recipe,
    add_sample,
    add_submit,
)

_EXIT = """\
exit codes: 0 done; 2 refused (bad input, or verify found a difference); 3 stopped, the same
command continues (verify: a check was skipped, and no difference was found); 130 interrupted,
143 ended by SIGTERM, 129 by SIGHUP, the same command continues; 1 a bug.
"""
_EXAMPLES = {
    "plan": "resmerge-stream plan --base models/base --expert models/math --expert models/code",
    "merge": "resmerge-stream merge recipe.yml --push-to me/merged\n"
    "in 8 processes: accelerate launch --multi_gpu --num_processes 8 -m resmerge_stream merge …",
    "average": "resmerge-stream average 'runs/checkpoint-*' --last 10 --weights 1-sqrt --out mean",
    "verify": "resmerge-stream verify merged",
    "compare": "resmerge-stream compare recipe.yml --methods resmerge,ties,tsv_m --out compared",
    "analyse": "resmerge-stream analyse recipe.yml --out analysis",
    "extract": "resmerge-stream extract models/math --base models/base --rank 32 --out math-lora",
    "evaluate": "resmerge-stream evaluate models/base models/math merged --tasks questions.jsonl\n"
    "as a Job: resmerge-stream evaluate org/base me/merged --tasks gsm8k --card me/merged --job",
    "submit": "resmerge-stream submit recipe.yml --push-to me/merged\n"
    "and then: resmerge-stream submit recipe.yml --push-to me/merged --then evaluate "
    "--tasks gsm8k",
    "init": "resmerge-stream init recipe.yml --base models/base --expert models/math",
    "methods": "resmerge-stream methods ties",
    "demo": "resmerge-stream demo --out demo-merge",
}


# mergekit's options, and what does the same here; empty: leave it away.
_MERGEKITS = {
    "--cuda": "--device cuda",
    "--gpu-rich": "--device cuda",
    "--out-shard-size": "--max-shard-size",
    "--random-seed": "--seed",
    "--allow-crimes": "",
    "--async-write": "",
    "--clone-tensors": "",
    "--copy-tokenizer": "",
    "--lazy-unpickle": "",
    "--lora-merge-cache": "",
    "--lora-merge-dtype": "",
    "--low-cpu-memory": "",
    "--multi-gpu": "",
    "--read-to-gpu": "",
    "--safe-serialization": "",
    "--transformers-cache": "",
    "--trust-remote-code": "",
    "--write-model-card": "",
    "--write-threads": "",
}
_UNREAD = "unrecognized arguments: "
_CHOICE = re.compile(r"invalid choice: '([^']*)'")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one message, what was meant, and where to read on."""

    def error(self, message: str) -> NoReturn:
        words = message.partition(_UNREAD)[2].split()
        hint = _hint(words, list(self._option_string_actions)) if words else ""
        if not words and (named := _CHOICE.search(message)):
            known = [str(one) for action in self._actions for one in action.choices or ()]
            hint = _did_you_mean(named[1], known)
        self.exit(2, f"{self.prog}: {message}\n{hint}See '{self.prog} --help'.\n")


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f"Did you mean {close[0]!r}?\n" if close else ""


def _hint(words: Sequence[str], options: Sequence[str]) -> str:
    """Return what to write instead of mergekit's words and of misspelt ones, a sentence a line."""
    known = {word: _MERGEKITS[word] for word in words if word in _MERGEKITS}
    lines = [f"Instead of {word} write {ours}." for word, ours in known.items() if ours]
    if idle := [word for word, ours in known.items() if not ours]:
        lines.append(f"Leave {', '.join(idle)} away: nothing here needs it.")
    if not words[0].startswith("-") and "--out" in options:
        lines.append(
            f"Give each expert its own --expert, and the output folder as an option: "
            f"--expert {words[0]}, or --out {words[0]}."
        )
    others = [word.partition("=")[0] for word in words if word.startswith("--")]
    meant = (_did_you_mean(word, options) for word in others if word not in known)
    return "".join(f"{line}\n" for line in lines) + "".join(meant)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments, without the program's name; `sys.argv` when None.
    """
    share_heaps()
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could stand here
        import argcomplete

        argcomplete.autocomplete(parser)
    args, unread = parser.parse_known_args(argv)
    if unread:  # said by the command's own parser, which knows its options
        args.parser.error(_UNREAD + " ".join(unread))
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
    add_merge(merge)
    add_average(_command(commands, "average", "average checkpoints of one run"))
    verify = _command(commands, "verify", "check a merged model against its report")
    verify.add_argument(
        "merged", metavar="ID", help="the output folder of a merge, or namespace/name"
    )
    verify.add_argument(
        "--recipe", metavar="FILE", help="the recipe, where the report does not name the sources"
    )
    verify.add_argument("--base", metavar="ID", help="where the base lies now")
    verify.add_argument(
        "--expert",
        metavar="ID",
        action="append",
        default=[],
        help="where an expert lies now; repeat for all, in the recipe's order",
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
    init = _command(commands, "init", "write a recipe with a comment on every key, to begin with")
    add_init(init)
    methods = _command(commands, "methods", "list the methods and their parameters")
    methods.add_argument("name", nargs="?", metavar="NAME", help="show this one alone")
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
    parser.set_defaults(command=name, parser=parser)
    return parser
