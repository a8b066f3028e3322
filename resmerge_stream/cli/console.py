"""What a terminal shows: plans, progress, summaries, checks. Text only."""

import json
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

from ..errors import ResMergeError, listed
from ..experts.accuracy import Accuracy
from ..planning.plan import Plan, RefusedPlan
from ..report.build import told_of_experts
from ..report.values import has_values, median
from ..report.words import NAMES, TERMINAL_COLUMNS
from ..roles import MATRIX_ROLES
from ..run.events import (
    Analysed,
    Counted,
    Event,
    Finished,
    PartFinished,
    Planned,
    Progressed,
    Published,
    ShardFinished,
    TensorMerged,
)
from ..units import format_duration, format_size, printable

# Of a merge in a log.
_LINE_EACH_S = 60.0
# tqdm's, without its own time left: the merge's is of merging and sending.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def tell(event: Mapping[str, Any]) -> None:
    """Print an event for programs: one JSON object a line, with the time (UTC, ISO 8601)."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({**event, "time": now}), flush=True)


def say(text: str) -> None:
    """Print a line for people, on standard error."""
    print(text, file=sys.stderr)


_CHOSEN_BY = {
    "default": "the default; name another with --method",
    "recipe": "by the recipe",
    "option": "by --method",
}
_MOST_PATTERNS = 20
_MOST_SETTINGS = 3


class Printable:
    """A stream for people: no control character passes but those that begin or end a line.

    Args:
        stream: what is written to; all else is asked of it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; a stranger's name in it may not move the cursor or colour the rest."""
        return self._stream.write(printable(text, "\N{REPLACEMENT CHARACTER}", kept="\n\r\t"))

    def __getattr__(self, name: str) -> Any:
        """Return what else the stream has."""
        return getattr(self._stream, name)


def failed(error: ResMergeError, *, as_json: bool) -> None:
    """Print an error: one message on standard error, and an event where JSON was asked for."""
    if as_json:
        name = "stopped" if error.exit_code == 3 else "refused"
        tell({"event": name, "message": str(error), **error.to_dict()})
    say(f"resmerge-stream: {error}")


def show_plan(plan: Plan | RefusedPlan) -> None:
    """Print a plan: its method, then problems first."""
    print(method_line(plan.to_dict()))
    for problem in plan.problems:
        print(f"problem: {problem}")
    for warning in plan.warnings:
        print(f"warning: {warning}")
    if plan.tensors:
        rules = ", ".join(f"{count} {rule}" for rule, count in plan.by_rule().items())
        print(f"tensors:  {len(plan.tensors)} ({rules})")
        for line in [] if plan.refused else _patterns(plan.patterns()):
            print(f"          {line.rstrip()}")
        ranks = [row["adapter_rank"] for row in plan.to_dict()["sources"] if row["adapter_rank"]]
        adapters = f", {len(ranks)} of them LoRA adapters (rank {listed(ranks)})" if ranks else ""
        experts = f"{len(plan.experts)} expert(s){adapters}"
        print(f"sources:  {format_size(plan.read_bytes)} to read, {experts}")
        print(f"output:   {format_size(plan.write_bytes)} in {len(plan.shards)} file(s)")
        if plan.memory_budget:
            peak, budget = format_size(plan.peak_memory_bytes), format_size(plan.memory_budget)
            print(f"memory:   at most {peak} private, of a budget of {budget}")
        if plan.target is not None:
            kind = "public" if plan.target.ends_public else "private"
            disk = format_size(plan.peak_disk_bytes)
            print(
                f"target:   {plan.target.repo.id} on the Hub, {kind}; at most {disk} on this disk"
            )
        if plan.own is not None:
            names = f": {listed(plan.own)}" if plan.own else ""
            print(f"part:     {plan.options.part}, {len(plan.own)} file(s){names}")
        print(f"time:     about {format_duration(plan.seconds_estimate)} on two cores")
    print("refused" if plan.refused else f"plan {plan.plan_hash}: ready to merge")


def method_line(plan: Mapping[str, Any]) -> str:
    """Return which method a plan is of, and who chose it."""
    return f"method: {plan['method']}, {_CHOSEN_BY[plan['chosen_by']]}"


def _patterns(patterns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which tensors take which rule, linear maps first; what is too long is counted."""
    ranked = sorted(patterns, key=lambda row: row["role"] not in MATRIX_ROLES)
    shown = []
    for row in ranked[:_MOST_PATTERNS]:
        words = []  # settings that differ between tensors: a value, or the least and the greatest
        for name, values in row["settings"].items():
            are_numbers = all(isinstance(value, int | float) for value in values)
            ordered = sorted(values) if are_numbers else list(values)
            low, high = (f"{v:.3g}" if are_numbers else str(v) for v in (ordered[0], ordered[-1]))
            words.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
        if len(words) > _MOST_SETTINGS:
            words[_MOST_SETTINGS:] = [f"and {len(words) - _MOST_SETTINGS} more"]
        count = f"{row['tensors']} × {row['rule']}"
        shown.append([count, row["role"] or "", row["pattern"], ", ".join(words)])
    rest = ranked[_MOST_PATTERNS:]
    more = [f"… and {sum(row['tensors'] for row in rest)} more; --json lists all"] if rest else []
    return _columns(shown) + more


def nothing(events: Iterable[Event]) -> None:
    """Show nothing: the main process of a run shows what happens in all of them."""
    for _ in events:
        pass


def print_json(events: Iterable[Event]) -> None:
    """Print each event as one JSON object a line."""
    for event in events:
        tell(event.to_dict())


def follow(events: Iterable[Event]) -> None:
    """Show progress on standard error and the summary on standard output."""
    bar: Any = None
    own: Collection[str] = ()
    try:
        for event in events:
            if isinstance(event, Planned):
                sizes = {shard["name"]: shard["bytes"] for shard in event.plan["shards"]}
                own = event.plan.get("own", sizes)
                total = sum(sizes[name] for name in own)
                say(method_line(event.plan))
                for warning in event.plan["warnings"]:
                    say(f"warning: {warning}")
                bar = _bar(total, "merging", "write", mininterval=0.5, bar_format=_BAR)
            elif isinstance(event, Counted):
                bar.set_postfix_str(
                    f"counting first, {event.number} of {event.passes}: {event.tensor[-40:]}"
                )
            elif isinstance(event, ShardFinished):
                if event.resumed and event.shard in own:
                    bar.update(event.bytes)
            elif isinstance(event, Progressed):
                bar.update(event.bytes_written - getattr(bar, "written", 0))
                bar.written = event.bytes_written
                bar.set_postfix_str(_pace(event), refresh=not isinstance(event, TensorMerged))
            elif isinstance(event, Published):
                bar.set_postfix_str("")
                bar.close()
            elif isinstance(event, PartFinished):
                bar.close()
                show_part(event)
            elif isinstance(event, Finished):
                show_summary(event)
    finally:
        if bar is not None:
            bar.close()


def _pace(event: Progressed) -> str:
    """Return what the bar of a merge does not say: the tensor, the speeds, how long; or a wait."""
    if event.waiting is not None:
        return event.waiting
    parts = [event.tensor[-40:]] if isinstance(event, TensorMerged) else []
    if not sys.stderr.isatty():
        parts.append(f"{format_size(event.write_speed)}/s")  # a bar says it itself
    if event.bytes_sent:
        parts.append(f"sent {format_size(event.bytes_sent)}, {format_size(event.sent_speed)}/s")
    if event.seconds_left is not None:
        parts.append(f"{format_duration(event.seconds_left)} left")
    return ", ".join(parts)


def _bar(total: int, doing: str, what: str, **how: Any) -> Any:
    """Return a bar on a terminal; lines in a file or a Job's log, where it would be an endless one.

    Args:
        total: bytes.
        doing, what: with them, for people.
        how: as for tqdm.
    """
    if not sys.stderr.isatty():
        return _Lines(total, doing, what)
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=doing, file=sys.stderr, **how)


class _Lines:
    """Stands in for the bar: says how far a run is at each tenth, and once a minute."""

    def __init__(self, total: int, doing: str, what: str) -> None:
        self.total, self.n, self._said, self.written, self.counted = total, 0, 0, 0, 0
        self._doing, self._said_at = doing, time.monotonic()
        say(f"{doing}: {format_size(total)} to {what}")

    def update(self, nbytes: int) -> None:
        self.n += nbytes

    def set_postfix_str(self, text: str, *, refresh: bool = True) -> None:
        """Say it, where it is time to."""
        tenths = 10 * self.n // self.total if self.total else 10
        now = time.monotonic()
        if tenths == self._said and now - self._said_at < _LINE_EACH_S:
            return
        self._said, self._said_at = tenths, now
        share = 100 * self.n // self.total if self.total else 100
        done = f"{self._doing}: {share} %, {format_size(self.n)} of {format_size(self.total)}"
        say(f"{done}, {text}" if text else done)

    def close(self) -> None:
        """Leave what was said."""


def count(events: Iterable[Event]) -> Event | None:
    """Show on standard error how far a run is that writes no single model, as `follow` does.

    Returns:
        the last event.
    """
    bar: Any = None
    event = None
    try:
        for event in events:
            if isinstance(event, Planned):
                for warning in event.plan["warnings"]:
                    say(f"warning: {warning}")
                bar = _bar(event.plan["read_bytes"], "reading", "read")
            elif isinstance(event, Counted | TensorMerged | Analysed):
                counted = event.bytes_read if isinstance(event, Counted) else 0
                done = counted or getattr(bar, "counted", 0) + event.bytes_read
                bar.counted = counted or getattr(bar, "counted", 0)
                bar.update(done - bar.n)
                bar.set_postfix_str(event.tensor[-40:], refresh=False)
    finally:
        if bar is not None:
            bar.close()
    return event


def show_part(event: PartFinished) -> None:
    """Print what a part of a merge made, and what is missing yet."""
    done = f"part {event.part.replace('/', ' of ')} done: {len(event.shards)} file(s)"
    if event.missing:
        print(f"{done}; missing: {listed(event.missing)}; the last part publishes, or --finish")
    else:
        print(f"{done}; nothing is missing: publish it with --finish")


def show_summary(event: Finished) -> None:
    """Print what a merge did, from its report."""
    summary = event.report["summary"]
    if event.already_there:
        print(f"{event.where} already holds the finished result of this merge; nothing was done.")
    else:
        print(
            f"merged into {event.where}: {summary['tensors']} tensors in "
            f"{summary['seconds']:.1f} s, {format_size(summary['bytes_read'])} read, "
            f"{format_size(summary['bytes_written'])} written, "
            f"peak private memory {format_size(summary['peak_private_bytes'])}"
        )
    for line in gate_table(event.report["tensors"]):
        print(line)
    for text in told_of_experts(summary):
        print(f"warning: {text}")
    # A result that was there already is read back: its report may hold anything.
    norm, cosine = summary.get("kept_norm"), summary.get("kept_cosine")
    if isinstance(norm, int | float) and isinstance(cosine, int | float):
        print(
            f"rounding kept {100 * norm:.0f} % of the update's length and {cosine:.2f} of its "
            "direction (1: all)"
        )


def gate_table(tensors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a table of the gates' medians by role, as lines of text."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in tensors:
        kind = (str(row.get("role")), str(row.get("rule")))
        groups.setdefault(kind, []).append(row)
    every = [row for rows in groups.values() for row in rows]
    shown = [key for key in TERMINAL_COLUMNS if has_values(every, key)]
    lines = [["role", "rule", "tensors", *(NAMES[key] for key in shown)]]
    for (role, rule), rows in sorted(groups.items()):
        cells = [role, rule, str(len(rows))]
        for key in shown:
            values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
            cells.append(f"{median(values):.3g}" if values else "-")
        lines.append(cells)
    return _columns(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def discarded(names: Iterable[str]) -> None:
    """Print what `--discard-staging` removed."""
    for name in names:
        say(f"removed {name}")


def show_checks(checks: Iterable[Any], *, as_json: bool) -> set[str]:
    """Print each check as it is done, and return how they ended, as `Check.status`."""
    statuses = set()
    for check in checks:
        statuses.add(check.status)
        if as_json:
            tell(check.to_dict())
            continue
        word = "FAILED" if check.problems else check.status
        print(f"{word:7} {check.name}: {check.detail}")
        for problem in check.problems:
            print(f"       {problem}")
    return statuses


def show_accuracies(models: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> None:
    """Print how often each model answers each task rightly, with 95 % intervals.

    Args:
        models: of an evaluation.
        as_json: as one line of JSON.
    """
    if as_json:
        shares = {
            name: {task: share for task, share in row.items() if task != "mean"}
            for name, row in models.items()
        }
        tell({"event": "evaluated", "accuracy": shares})
        return
    tasks = list(next(iter(models.values())))
    prompts = next(iter(models.values()))[tasks[0]]["n"]
    print(f"right answers in % to {prompts} held-out prompts a task (95 % interval):")
    rows = [["model", *tasks]]
    for name, row in models.items():
        rows.append([name, *(percent(Accuracy(**row[task])) for task in tasks)])
    for line in _columns(rows):
        print(line)


def percent(result: Accuracy) -> str:
    """Return an accuracy and its interval in percent."""
    return f"{100 * result.accuracy:.0f} ({100 * result.low:.0f}–{100 * result.high:.0f})"


def allowed(parameter: Mapping[str, Any]) -> str:
    """Return the values that a parameter of `describe_methods` may have; empty for any."""
    if parameter["choices"] or parameter["minimum"] is None:
        return ", ".join(parameter["choices"])
    return f"{parameter['minimum']:g} to {parameter['maximum']:g}"


def show_methods(methods: Iterable[Mapping[str, Any]]) -> None:
    """Print every method with its parameters."""
    for method in methods:
        print(f"{method['name']}: {method['title']} ({method['paper']}, {method['url']})")
        print(f"    {' '.join(method['summary'].split())}")
        for parameter in method["parameters"]:
            values = allowed(parameter)
            print(
                f"    {parameter['name']} = {parameter['default']}  {parameter['label']}"
                + (f" [{values}]" if values else "")
            )
