"""What is suggested of a visitor's own models, asked of a Hub."""

import json

from loopback_hub import LoopbackHub
from tests.support.checkpoints import run_python

# In a process of its own: the client reads once where the Hub is.
LOOK = """
import json, sys
from space.identity import Visitor
from space.search import Search

search, alice = Search(), Visitor("alice", sys.argv[1])
found = [search.own(alice), search.own(alice, merges=True), search.own(Visitor(), merges=True),
         search.ids("merged", Visitor()), search.ids("m", Visitor())]
print(json.dumps(found))
"""
MODELS = {
    "alice/merged": "[merge, resmerge]",
    "alice/of-another-tool": "[merge, mergekit]",
    "bob/merged": "[merge, resmerge]",
}


def test_models_are_found_by_account_by_tag_and_by_what_is_typed(tmp_path, monkeypatch):
    """Merges have this tool's tag; who looks for another's sees what is public."""
    with LoopbackHub(tmp_path / "hub") as hub:
        token = hub.add_user("alice")
        hub.add_user("bob")
        for name, tags in MODELS.items():
            card = f"---\ntags: {tags}\n---\n# A model\n"
            hub.add_repo(name, {"README.md": card.encode()}, private=name == "alice/merged")
        for key, value in hub.env(xet=False, home=tmp_path / "home").items():
            monkeypatch.setenv(key, value)
        done = run_python(LOOK, token)

    assert done.returncode == 0, done.stderr
    own, merges, of_nobody, typed, too_short = json.loads(done.stdout)
    assert sorted(own) == ["alice/merged", "alice/of-another-tool"]
    assert merges == ["alice/merged"]
    assert of_nobody == too_short == []
    assert typed == ["bob/merged"]
