"""Run a Hub from the command line, with a demo user, until Ctrl-C."""

import argparse
import shlex
import signal
import threading
from pathlib import Path

from .server import LoopbackHub

DEMO_USER = "demo"
DEMO_TOKEN = "hf_demo"


def parser() -> argparse.ArgumentParser:
    """The options of `python -m loopback_hub`."""
    options = argparse.ArgumentParser(prog="python -m loopback_hub", description=__doc__)
    options.add_argument(
        "--dir", type=Path, required=True, help="where everything is kept, across restarts"
    )
    options.add_argument("--port", type=int, default=8800, help="port of the API (0: any free one)")
    options.add_argument(
        "--cdn-port", type=int, default=0, help="port of the storage (default: any free one)"
    )
    options.add_argument(
        "--user", action="append", default=[], metavar="NAME:TOKEN", help="add a user (repeat)"
    )
    options.add_argument(
        "--repo",
        action="append",
        default=[],
        metavar="NS/NAME=FOLDER",
        help="publish a folder, linked in place (repeat)",
    )
    options.add_argument(
        "--private", action="store_true", help="make the --repo repositories private"
    )
    options.add_argument(
        "--xet", action="store_true", help="copy their large files into Xet storage too"
    )
    options.add_argument(
        "--fake-above",
        type=int,
        metavar="BYTES",
        help="do not hash larger files: their SHA-256 is made up",
    )
    options.add_argument(
        "--down", type=float, metavar="BYTES", help="bytes a second that a client may download"
    )
    options.add_argument(
        "--up", type=float, metavar="BYTES", help="bytes a second that a client may upload"
    )
    options.add_argument(
        "--latency", type=float, default=0.0, metavar="SECONDS", help="wait before each answer"
    )
    options.add_argument(
        "--per", choices=["process", "agent", "all"], default="process", help="what a client is"
    )
    options.add_argument(
        "--trust-uploads", action="store_true", help="do not hash what is uploaded (for timing)"
    )
    options.add_argument(
        "--fault", action="append", default=[], metavar="NAME[@CHANCE][:PATH]",
        help="a named fault, e.g. 503@0.05:/resolve/ (repeat); names: see faults.py",
    )  # fmt: skip
    options.add_argument("--seed", type=int, default=0, help="seed of the faults' chances")
    options.add_argument(
        "--log", type=Path, metavar="FILE", help="append every request as a line of JSON"
    )
    return options


def build(options: argparse.Namespace) -> LoopbackHub:
    """A Hub as the options want it, not yet serving."""
    options.dir.mkdir(parents=True, exist_ok=True)
    hub = LoopbackHub(
        options.dir, port=options.port, cdn_port=options.cdn_port, log_file=options.log
    )
    hub.limits.down, hub.limits.up = options.down, options.up
    hub.limits.latency, hub.limits.per = options.latency, options.per
    hub.settings.verify_uploads = not options.trust_uploads
    hub.faults.seed(options.seed)
    for fault in options.fault:
        name_and_chance, _, path = fault.partition(":")
        name, _, chance = name_and_chance.partition("@")
        hub.faults.add(name, path=path or None, chance=float(chance or 1.0))
    hub.add_user(DEMO_USER, DEMO_TOKEN)
    for user in options.user:
        hub.add_user(*user.split(":", 1))
    for repo in options.repo:
        repo_id, _, folder = repo.partition("=")
        if not hub.has_repo(repo_id):
            hub.add_repo(
                repo_id,
                Path(folder),
                private=options.private,
                xet=options.xet,
                fake_above=options.fake_above,
            )
    return hub


def main() -> None:
    """Serve until interrupted."""
    hub = build(parser().parse_args())
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with hub:
        print(f"# user {DEMO_USER!r}; storage at {hub.cdn}")
        print(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={DEMO_TOKEN}")
        space = {"HF_ENDPOINT": hub.endpoint, **hub.space_env(f"{DEMO_USER}/space")}
        print("# for a Space whose visitors sign in here:")
        print("export " + " ".join(f"{k}={shlex.quote(v)}" for k, v in space.items()), flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
