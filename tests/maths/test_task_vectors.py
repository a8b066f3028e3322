"""Scratch buffers that are lent and kept for later, within a limit."""

import torch

from resmerge_stream.maths.task_vectors import Workspace


def test_buffers_kept_for_later_leave_room_for_what_others_hold():
    """Beside bytes that others hold less is kept, now and when the next buffer is lent."""
    workspace = Workspace(torch.device("cpu"), limit=4000)
    for buffer in [workspace.take(400), workspace.take(300)]:
        workspace.give(buffer)
    assert workspace._total == 2800

    workspace.leave_room(2000)
    assert workspace._total == 1200

    workspace.give(workspace.take(300))
    assert workspace._total == 1200
    workspace.give(workspace.take(450))
    assert workspace._total == 1800


def test_what_is_lent_is_never_dropped():
    """However little room there is, a buffer that somebody works with stays."""
    workspace = Workspace(torch.device("cpu"), limit=1000)
    held = workspace.take(200)

    workspace.leave_room(5000)

    assert workspace.lent_bytes == 800
    workspace.give(held)
