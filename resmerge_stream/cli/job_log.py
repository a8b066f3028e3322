"""How a Job ended, by its log: the exit code that this calls for, and what to say of it."""

import re
from dataclasses import dataclass

# What the Job's wrapper prints at its end, see `jobs.submission`.
_EXIT = re.compile(r"resmerge-stream job: exit code (\d+)")
# How lines begin that no installer writes.
_OURS = ("resmerge-stream: ", "merging: ", "merged into ")


@dataclass(slots=True)
class JobLog:
    """What a Job's log has told of its end.

    Attributes:
        lines: how many there were.
        exit_code: of the command, or of its installation; None as long as it is not known.
        began: whether the command itself said something.
        traceback: whether a bug showed itself.
    """

    lines: int = 0
    exit_code: int | None = None
    began: bool = False
    traceback: bool = False

    def read(self, line: str) -> None:
        """Take a line of the log."""
        self.lines += 1
        if match := _EXIT.fullmatch(line.strip()):
            self.exit_code = int(match[1])
        elif line.startswith(_OURS):
            self.began = True
        elif line.startswith("Traceback (most recent call last)"):
            self.traceback = True

    def ending(self, stage: str, message: str | None) -> tuple[int, str]:
        """Return the exit code that a Job's end calls for, and what to say of it.

        Args:
            stage: the Hub's word for the Job's state.
            message: the Hub's reason, where it gives one.
        """
        again = "The same command starts it again; what is published is kept."
        why = f" ({' '.join(message.split())[:200]})" if message else ""
        if stage == "COMPLETED":
            return 0, "the Job is done."
        if stage in ("CANCELED", "DELETED"):
            return 3, f"the Job was cancelled{why}. {again}"
        if self.exit_code == 2 and self.began:
            return 2, "it was refused in the Job; its log above says why."
        if self.exit_code == 1 and self.traceback:
            return 1, "it failed in the Job: a bug. Its log above has the traceback."
        if self.exit_code == 137:
            return 3, (
                f"the Job was killed, most likely for its memory{why}. Give a larger --flavor, or "
                f"merge with a smaller --memory-budget. {again}"
            )
        if self.exit_code is not None and not self.began:
            return (
                3,
                f"the Job ended before it began; its log above says why{why}. {again}",
            )
        if self.exit_code is None:
            return 3, (
                f"the Job was stopped{why}: its time was up, or its machine failed. {again} "
                "--timeout gives it more time."
            )
        return 3, f"it stopped in the Job; its log above says why{why}. {again}"
