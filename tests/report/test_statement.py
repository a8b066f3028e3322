"""The in-toto statement of a merge, read by in-toto's own code, and by `verify`."""

import hashlib
import json

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message

from resmerge_stream.report.statement import STATEMENT, statement_of
from resmerge_stream.run.verify import verify_folder
from tests.support.checkpoints import make_group, merge


@pytest.fixture
def merged(tmp_path):
    """Return a group and its merge."""
    group = make_group(tmp_path / "group", sharded=True)
    return group, merge(group, tmp_path / "out").out


def test_in_totos_own_code_reads_and_accepts_it(merged):
    """Its messages take every field, and its validation finds nothing missing."""
    text = (merged[1] / STATEMENT).read_text()

    statement = json_format.Parse(text, Message())
    Statement.copy_from_pb(statement).validate()
    predicate = json.dumps(json_format.MessageToDict(statement)["predicate"])
    provenance = json_format.Parse(predicate, provenance_pb2.Provenance())

    assert provenance.build_definition.build_type
    assert provenance.run_details.builder.id


def test_it_names_every_file_and_every_parent_by_its_hash(merged):
    """Subjects are the weight files as they lie there; parents' files have their own sha256."""
    group, out = merged
    statement = json.loads((out / STATEMENT).read_text())

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert subjects == {path.name: digest(path) for path in out.glob("*.safetensors")}
    materials = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    theirs = {one["digest"]["sha256"] for one in materials}
    weights = [path for folder in group.folders for path in folder.glob("*.safetensors")]
    assert theirs == {digest(path) for path in weights}


def test_a_model_of_the_hub_is_named_by_its_commit():
    """A package URL with the commit; a file within it by its path; what has no hash has a place."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = {"name": "model.safetensors", "size": 1, "sha256": "ab"}
    hub = {"id": "org/base", "revision": commit, "subfolder": "a b", "files": [file]}
    folder = {"id": "expert", "revision": None, "files": [{**file, "sha256": None}]}
    report = {"files": [], "recipe": {}, "sources": [hub, folder]}

    build = statement_of(report)["predicate"]["buildDefinition"]

    assert build["resolvedDependencies"] == [
        {"name": "org/base", "uri": f"pkg:huggingface/org/base@{commit}",
         "digest": {"gitCommit": commit}},
        {"name": "org/base/a%20b/model.safetensors",
         "uri": f"pkg:huggingface/org/base@{commit}#a%20b/model.safetensors",
         "digest": {"sha256": "ab"}},
        {"name": "expert/model.safetensors", "uri": "file:expert/model.safetensors"},
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["subject", "recipe", "no JSON"])
def test_verify_finds_a_statement_that_says_something_else(change, merged):
    """A statement that was edited, or that belongs to another merge, fails."""
    _, out = merged
    path = out / STATEMENT
    said = json.loads(path.read_text())
    if change == "subject":
        said["subject"][0]["digest"]["sha256"] = "0" * 64
    said["predicate"]["buildDefinition"]["externalParameters"]["recipe"] = {}
    path.write_text("{" if change == "no JSON" else json.dumps(said))

    (*_, last) = verify_folder(out)

    assert last.name == "statement"
    assert last.status == "failed"


def test_a_merge_without_one_is_verified_all_the_same(merged):
    """What was merged before there were statements lacks nothing."""
    (merged[1] / STATEMENT).unlink()

    assert "statement" not in [check.name for check in verify_folder(merged[1])]
