"""Links in a model's folder: what they lead to must belong to the model."""

from pathlib import Path

import pytest

from resmerge_stream.errors import UnsupportedCheckpointError
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint
from tests.support.checkpoints import make_group


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder."""
    return make_group(tmp_path / "group", experts=1).base


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "chat_template.jinja", "config.json", "modeling_x.py"]
)
def test_a_link_out_of_the_folder_is_refused_by_name(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Nothing is published that lies elsewhere on the machine, such as a key."""
    secret = tmp_path / "id_ed25519"
    secret.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)

    with pytest.raises(UnsupportedCheckpointError, match=name):
        open_checkpoint(ModelRef(str(model)))


def test_a_link_put_there_after_planning_is_refused(model: Path, tmp_path: Path) -> None:
    """Each read looks again."""
    secret = tmp_path / "id_ed25519"
    secret.write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    opened = open_checkpoint(ModelRef(str(model)))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(secret)

    with pytest.raises(UnsupportedCheckpointError, match="link that leads out"):
        opened.read_small("tokenizer.json")


def test_links_within_the_folder_and_the_hubs_cache_are_read(model: Path, tmp_path: Path) -> None:
    """A snapshot of the Hub's cache is links to blobs beside it; weights may lie anywhere."""
    (model / "tokenizer.json").write_text("{}")
    (model / "vocab.json").symlink_to("tokenizer.json")
    cached = tmp_path / "models--a--b"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "blobs").mkdir()
    snapshot = cached / "snapshots" / "0123"
    snapshot.mkdir()
    for path in model.iterdir():
        blob = cached / "blobs" / path.name
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")

    assert open_checkpoint(ModelRef(str(model))).read_small("vocab.json") == b"{}"
    assert open_checkpoint(ModelRef(str(snapshot))).read_small("tokenizer.json") == b"{}"
