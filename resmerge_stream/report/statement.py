"""Where a merge comes from, for supply-chain tools: an in-toto statement of SLSA provenance.

It says in their words what ``report.json`` says in ours: which files (by sha256) were made of which
models (by commit and sha256), by which recipe and version. Made from the report alone, so that
`verify` can make it again.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

STATEMENT = "resmerge/provenance.intoto.json"
_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"
# What was run, and what ran it; no page stands behind them.
_BUILD_TYPE, _BUILDER = "urn:resmerge-stream:merge:v1", "urn:resmerge-stream"


def statement_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statement, ready for JSON.

    Args:
        report: as it is published, checked by `parse_report`.
    """
    environment = report.get("environment") or {}
    materials: list[dict[str, Any]] = []
    for source in report.get("sources") or ():
        # A model by its commit where it has one, and its weight files.
        name, commit = str(source["id"]), source.get("revision")
        place = f"pkg:huggingface/{quote(name)}@{commit}" if commit else f"file:{quote(name)}"
        if commit:
            materials.append({"name": name, "uri": place, "digest": {"gitCommit": commit}})
        below = PurePosixPath(source.get("subfolder") or "")
        for file in source.get("files") or ():
            # A GGUF file is a place of its own.
            folder = below.parent if below.name == file["name"] else below
            inside = quote(str(folder / file["name"]))
            material = {
                "name": f"{name}/{inside}",
                "uri": f"{place}{'#' if commit else '/'}{inside}",
            }
            # A large folder's file has one only where `--check-sources full` asked for it.
            digest = {"digest": {"sha256": file["sha256"]}} if file["sha256"] else {}
            materials.append({**material, **digest})
    return {
        "_type": _TYPE,
        "subject": [
            {"name": file["name"], "digest": {"sha256": file["sha256"]}} for file in report["files"]
        ],
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "recipe": report["recipe"],
                    "method": report.get("method"),
                    "options": report.get("options"),
                },
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {
                    "id": _BUILDER,
                    "version": {
                        key: environment[key]
                        for key in ("resmerge_stream", "torch")
                        if isinstance(environment.get(key), str)
                    },
                },
                "metadata": {"invocationId": report.get("plan_hash")},
            },
        },
    }
