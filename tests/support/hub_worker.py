"""Runs command lines one after another in one process, so that tests pay for the imports once.

Reads one JSON list of arguments a line, answers each with the exit code and what was printed.
"""

import contextlib
import io
import json
import sys

from resmerge_stream.cli.main import main


def run(arguments: list[str]) -> dict[str, object]:
    """Run one command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    answers = sys.stdout
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
