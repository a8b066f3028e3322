"""How long a run will take, told from what it has done."""

import pytest

from resmerge_stream.run import progress as module
from resmerge_stream.run.progress import Progress


class Clock:
    """A clock that stands until it is set."""

    now = 0.0

    def monotonic(self) -> float:
        """Return what it was set to."""
        return self.now


@pytest.mark.parametrize("send_speed", [0.5, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("step", [1, 100])
def test_the_time_left_is_right_within_a_quarter(
    monkeypatch: pytest.MonkeyPatch, send_speed: float, step: int
) -> None:
    """From a fifth of the way on, whether sending or merging decides, told byte by byte or not.

    In the last seconds, when a quarter is next to nothing, within 3 % of the whole.
    """
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    shards, shard_bytes, warm_up = 20, 100, 3.0
    sent = 0
    progress = Progress(lambda: sent)
    progress.merge_bytes = progress.send_bytes = shards * shard_bytes
    progress.start_merging()
    told, seconds, free = [], 0.1, 0.0
    finished, ends = 0, []
    for number in range(shards):  # when each shard is merged, then when it is sent
        merged = warm_up + (number + 1) * shard_bytes / 10
        begins = max(merged, free)
        free = begins + shard_bytes / (10 * send_speed)
        ends.append((merged, begins, free))
    total = ends[-1][2]
    while clock.now < total - 1:
        clock.now += seconds
        progress.bytes_written = int(max(0, min((clock.now - warm_up) * 10, shards * shard_bytes)))
        exact = 0.0
        for merged, begins, ended in ends:
            if merged <= clock.now and finished < ends.index((merged, begins, ended)) + 1:
                finished += 1
                progress.start_sending()
            exact += shard_bytes * min(max((clock.now - begins) / (ended - begins), 0), 1)
        sent = int(exact) // step * step
        left = progress.now()["seconds_left"]
        if clock.now > 0.2 * total and left is not None:
            told.append((clock.now, left, total - clock.now))

    assert told
    for moment, left, truth in told:
        assert abs(left - truth) <= max(0.25 * truth, 0.03 * total), moment
