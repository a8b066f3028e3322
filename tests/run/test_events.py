"""Events between processes."""

import json

import pytest

from resmerge_stream.run import events
from resmerge_stream.run.events import Event

EVERY = [
    events.Planned(plan={"tensors": 3}),
    events.Counted(tensor="w", number=1, passes=2, bytes_read=3),
    events.Analysed(tensor="w", bytes_read=3),
    events.Progressed(bytes_read=3, seconds_left=None),
    events.TensorMerged(tensor="w", rule="mean", entry={"name": "w"}, bytes_written=2),
    events.ShardFinished(
        shard="a", bytes=3, sha256="f", resumed=True, shards_done=1, shards=2, sent_speed=0.5
    ),
    events.Published(where="here"),
    events.PartFinished(part="1/4", shards=["a"], missing=["b"]),
    events.Finished(where="here", report={"files": []}, already_there=True),
]


@pytest.mark.parametrize("event", EVERY, ids=lambda event: event.name)
def test_an_event_crosses_between_processes(event):
    """Each event is the same after JSON, whatever the sender adds beside it."""
    line = json.dumps({**event.to_dict(), "memory_bytes": 5})

    assert Event.from_dict(json.loads(line)) == event


def test_every_event_can_be_read():
    """No event of a run is unknown to the reader."""
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type)}

    assert {type(event) for event in EVERY} == {
        kind for kind in kinds if issubclass(kind, Event) and kind is not Event
    }


def test_what_is_no_event_is_none():
    """A worker's own words beside a run's events are for whoever knows them."""
    assert Event.from_dict({"event": "asking", "model": "base"}) is None
