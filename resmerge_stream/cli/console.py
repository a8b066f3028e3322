"""What a terminal shows: plans, progress, summaries, checks. Text only."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ResMergeError
from ..experts.accuracy import Accuracy, mean_accuracy
from ..planning.plan import Plan, RefusedPlan
from ..report.values import median
from ..report.words import NAMES, TERMINAL_COLUMNS
from ..roles import MATRIX_ROLES
from ..run.events import (
    Analysed,
    Counted,
    Event,
    Finished,
    Planned,
    Progressed,
    Published,
    ShardFinished,
    TensorMerged,
)
from ..units import format_size, printable

# Of a merge in a log.
_LINE_EACH_S = 60.0
# tqdm's, without its own time left: the merge's is of merging and sending.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def say(text: str) -> None:
    """Print a line for people, on standard error."""
    print(plain(text), file=sys.stderr)


_MOST_PATTERNS = 20
_MOST_SETTINGS = 3


def plain(text: str) -> str:
    """Return text without control characters: names come from strangers' files."""
    return "\n".join(printable(line, "\N{REPLACEMENT CHARACTER}") for line in text.split("\n"))


def failed(error: ResMergeError, *, as_json: bool) -> None:
    """Print an error: one message on standard error, and an event where JSON was asked for."""
    if as_json:
        name = "stopped" if error.exit_code == 3 else "refused"
        print(json.dumps({"event": name, "message": str(error), **error.to_dict()}), flush=True)
    say(f"resmerge-stream: {error}")


def show_plan(plan: Plan | RefusedPlan) -> None:
    """Print a plan: problems first."""
    for problem in plan.problems:
        print(plain(f"problem: {problem}"))
    for warning in plan.warnings:
        print(plain(f"warning: {warning}"))
    if plan.tensors:
        rules = ", ".join(f"{count} {rule}" for rule, count in plan.by_rule().items())
        print(f"tensors:  {len(plan.tensors)} ({rules})")
        for line in [] if plan.refused else _patterns(plan.patterns()):
            print(f"          {line.rstrip()}")
        print(f"sources:  {format_size(plan.read_bytes)} to read, {len(plan.experts)} expert(s)")
        print(f"output:   {format_size(plan.write_bytes)} in {len(plan.shards)} file(s)")
        peak, budget = format_size(plan.peak_memory_bytes), format_size(plan.memory_budget)
        print(f"memory:   at most {peak} private, of a budget of {budget}")
        if plan.target is not None:
            kind = "public" if plan.target.ends_public else "private"
            disk = format_size(plan.peak_disk_bytes)
            print(
                f"target:   {plan.target.repo.id} on the Hub, {kind}; at most {disk} on this disk"
            )
        print(f"time:     about {plan.seconds_estimate:.0f} s on two cores")
    print("refused" if plan.refused else f"plan {plan.plan_hash}: ready to merge")


def _patterns(patterns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which tensors take which rule, linear maps first; what is too long is counted."""
    ranked = sorted(patterns, key=lambda row: row["role"] not in MATRIX_ROLES)
    shown = [
        [
            f"{row['tensors']} × {row['rule']}",
            row["role"] or "",
            plain(row["pattern"]),
            _settings(row["settings"]),
        ]
        for row in ranked[:_MOST_PATTERNS]
    ]
    rest = ranked[_MOST_PATTERNS:]
    more = [f"… and {sum(row['tensors'] for row in rest)} more; --json lists all"] if rest else []
    return _columns(shown) + more


def _settings(settings: Mapping[str, Sequence[Any]]) -> str:
    """Return the settings that differ between tensors: a value, or the least and the greatest."""
    words = []
    for name, values in settings.items():
        are_numbers = all(isinstance(value, int | float) for value in values)
        ordered = sorted(values) if are_numbers else list(values)
        low, high = (f"{v:.3g}" if are_numbers else str(v) for v in (ordered[0], ordered[-1]))
        words.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    more = [f"and {len(words) - _MOST_SETTINGS} more"] if len(words) > _MOST_SETTINGS else []
    return ", ".join([*words[:_MOST_SETTINGS], *more])


def nothing(events: Iterable[Event]) -> None:
    """Show nothing: the main process of a run shows what happens in all of them."""
    for _ in events:
        pass


def print_json(events: Iterable[Event]) -> None:
    """Print each event as one JSON object a line."""
    for event in events:
        print(json.dumps(event.to_dict()), flush=True)


def follow(events: Iterable[Event]) -> None:
    """Show progress on standard error and the summary on standard output.

    A bar on a terminal; a line a minute in a file or a Job's log, where a bar would be one
    endless line.
    """
    from tqdm import tqdm

    bar: Any = None
    try:
        for event in events:
            if isinstance(event, Planned):
                total = sum(shard["bytes"] for shard in event.plan["shards"])
                for warning in event.plan["warnings"]:
                    say(f"warning: {warning}")
                bar = (
                    tqdm(
                        total=total,
                        unit="B",
                        unit_scale=True,
                        desc="merging",
                        file=sys.stderr,
                        mininterval=0.5,
                        bar_format=_BAR,
                    )
                    if sys.stderr.isatty()
                    else _Lines(total)
                )
            elif isinstance(event, Counted):
                bar.set_postfix_str(
                    f"counting first, {event.number} of {event.passes}: {event.tensor[-40:]}"
                )
            elif isinstance(event, ShardFinished):
                if event.resumed:
                    bar.update(event.bytes)
            elif isinstance(event, Progressed):
                bar.update(event.bytes_written - getattr(bar, "written", 0))
                bar.written = event.bytes_written
                bar.set_postfix_str(_pace(event), refresh=not isinstance(event, TensorMerged))
            elif isinstance(event, Published):
                bar.set_postfix_str("")
                bar.close()
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
        parts.append(f"{_minutes(event.seconds_left)} left")
    return ", ".join(parts)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class _Lines:
    """Stands in for the bar: says how far the merge is at each tenth, and once a minute."""

    def __init__(self, total: int) -> None:
        self.total, self.n, self._said, self.written = total, 0, 0, 0
        self._said_at = time.monotonic()
        say(f"merging: {format_size(total)} to write")

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
        done = f"merging: {share} %, {format_size(self.n)} of {format_size(self.total)}"
        say(f"{done}, {text}" if text else done)

    def close(self) -> None:
        """Leave what was said."""


def count(events: Iterable[Event]) -> Event | None:
    """Show on standard error how far a run is that writes no single model.

    Returns:
        the last event.
    """
    from tqdm import tqdm

    bar: Any = None
    event = None
    try:
        for event in events:
            if isinstance(event, Planned):
                for warning in event.plan["warnings"]:
                    say(f"warning: {warning}")
                total = event.plan["read_bytes"]
                bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", file=sys.stderr)
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


def show_summary(event: Finished) -> None:
    """Print what a merge did, from its report."""
    summary = event.report["summary"]
    if event.already_there:
        print(f"{event.where} already holds the finished result of this merge; nothing was done.")
    else:
        print(
            f"merged into {event.where}: {summary['tensors']} tensors in "
            f"{summary['seconds']:.1f} s, {format_size(summary['bytes_written'])} written, "
            f"peak private memory {format_size(summary['peak_private_bytes'])}"
        )
    for line in gate_table(event.report["tensors"]):
        print(line)
    # A result that was there already is read back: its report may hold anything.
    norm, cosine = summary.get("kept_norm"), summary.get("kept_cosine")
    if isinstance(norm, int | float) and isinstance(cosine, int | float):
        print(
            f"after the cast: {norm:.2f} of the update's norm is left, "
            f"cosine {cosine:.2f} with what was meant"
        )


def gate_table(tensors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a table of the gates' medians by role, as lines of text."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in tensors:
        kind = (plain(str(row.get("role"))), plain(str(row.get("rule"))))
        groups.setdefault(kind, []).append(row)
    lines = [["role", "rule", "tensors", *(NAMES[key] for key in TERMINAL_COLUMNS)]]
    for (role, rule), rows in sorted(groups.items()):
        cells = [role, rule, str(len(rows))]
        for key in TERMINAL_COLUMNS:
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


def show_checks(checks: Iterable[Any], *, as_json: bool) -> bool:
    """Print each check as it is done, and return whether all passed."""
    passed = True
    for check in checks:
        passed &= not check.problems
        if as_json:
            print(json.dumps(check.to_dict()), flush=True)
            continue
        print(f"{'ok    ' if not check.problems else 'FAILED'} {check.name}: {check.detail}")
        for problem in check.problems:
            print(f"       {problem}")
    return passed


def show_accuracies(models: Mapping[str, Mapping[str, Accuracy]], *, as_json: bool) -> None:
    """Print how often each model answers each task rightly, with 95 % intervals."""
    if as_json:
        plain_values = {
            name: {task: result._asdict() for task, result in results.items()}
            for name, results in models.items()
        }
        print(json.dumps({"event": "evaluated", "accuracy": plain_values}), flush=True)
        return
    tasks = list(next(iter(models.values())))
    prompts = next(iter(models.values()))[tasks[0]].n
    print(f"right answers in % to {prompts} held-out prompts a task (95 % interval):")
    rows = [["model", *tasks, "mean"]]
    for name, results in models.items():
        shown = [*(results[task] for task in tasks), mean_accuracy(results)]
        rows.append([name, *(percent(result) for result in shown)])
    for line in _columns(rows):
        print(line)


def percent(result: Accuracy) -> str:
    """Return an accuracy and its interval in percent."""
    return f"{100 * result.accuracy:.0f} ({100 * result.low:.0f}–{100 * result.high:.0f})"


def show_methods(methods: Iterable[Mapping[str, Any]]) -> None:
    """Print every method with its parameters."""
    for method in methods:
        print(f"{method['name']}: {method['title']} ({method['paper']}, {method['url']})")
        print(f"    {' '.join(method['summary'].split())}")
        for parameter in method["parameters"]:
            allowed = ", ".join(parameter["choices"])
            if not allowed and parameter["minimum"] is not None:
                allowed = f"{parameter['minimum']:g} to {parameter['maximum']:g}"
            print(
                f"    {parameter['name']} = {parameter['default']}  {parameter['label']}"
                + (f" [{allowed}]" if allowed else "")
            )
