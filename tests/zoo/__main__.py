"""Try every architecture, or those named, and write ``docs/models.md`` where all were tried."""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

from tests.zoo.adapted import KINDS, adapt
from tests.zoo.architectures import buildable, model_types
from tests.zoo.page import adapters_part, page, parts
from tests.zoo.trial import attempt


def main() -> None:
    """Print a line for each architecture; write the page after all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; default: all that can be built")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="LoRA adapters of them; writes that part of the page",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if args.adapters:
        _adapters(args.names, args.out)
        return
    every = model_types()
    trials = []
    for name in args.names or buildable():
        start = time.perf_counter()
        with (
            tempfile.TemporaryDirectory() as folder,
            patch("resmerge_stream.report.card.gates_png", lambda report: b""),
        ):
            trial = attempt(name, Path(folder))
        trials.append(trial)
        seconds = time.perf_counter() - start
        print(f"{seconds:5.1f} s  {name}: {trial.equal or trial.problems or trial.lacking}")
        sys.stdout.flush()
    if not args.names:
        _, kept = parts(args.out.read_text()) if args.out.exists() else ("", "")
        args.out.write_text(page(trials, len(every)) + kept)


def _adapters(names: list[str], out: Path) -> None:
    results = []
    for name in names or buildable():
        for kind in KINDS:
            start = time.perf_counter()
            with (
                tempfile.TemporaryDirectory() as folder,
                patch("resmerge_stream.report.card.gates_png", lambda report: b""),
            ):
                results.append(adapt(name, kind, Path(folder)))
            seconds = time.perf_counter() - start
            print(f"{seconds:5.1f} s  {name}, {kind}: {results[-1].outcome} {results[-1].why}")
            sys.stdout.flush()
    if not names:
        first, _ = parts(out.read_text())
        out.write_text(first + adapters_part(results))


if __name__ == "__main__":
    main()
