"""The forms of the Hub's answers: what has another is an answer of something on the way."""

import re
from collections.abc import Callable
from typing import Any

import httpx2

from ..documents import load_json

_MOST_BYTES = 1 << 53


class StrangeAnswerError(ValueError):
    """An answer that is JSON, but not of the form that the Hub gives it."""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_BYTES


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_link(value: object) -> bool:
    return isinstance(value, str) and re.match(r"https?://[^/\s]", value) is not None


# A form is a type, a check, a tuple of forms of which one fits, a list of one form, or a mapping of
# keys to forms. Of a mapping only these keys are looked at: a key with ? may be absent or null.
Form = type | Callable[[object], bool] | tuple[Any, ...] | list[Any] | dict[str, Any]

_LFS: Form = {"sha256?": str, "oid?": str, "size?": _is_count, "pointerSize?": _is_count}
_REPO: Form = {
    "id": _is_name, "sha?": _is_name, "private?": bool, "gated?": (bool, str), "disabled?": bool,
    "siblings?": [{"rfilename": _is_name, "size?": _is_count, "blobId?": str, "lfs?": _LFS}],
    "cardData?": dict, "tags?": [str], "author?": str, "lastModified?": str, "createdAt?": str,
}  # fmt: skip
_FILE: Form = {"type": str, "path": _is_name, "size?": _is_count, "oid?": str, "lfs?": _LFS}
_REF: Form = {"name": _is_name, "ref": str, "targetCommit": str}
_THREAD: Form = {"num": _is_count, "title": str, "status": str, "isPullRequest?": bool,
                 "author?": {"name?": str}, "createdAt": str}  # fmt: skip
_ENTITY: Form = {"name?": str, "type?": str}
_ACTION: Form = {"href": _is_link, "header?": dict}
_NAMED = r"/api/(models|datasets|spaces)/[^/]+/[^/]+"
# The method, the path, and the form of what is answered.
_FORMS: tuple[tuple[str, str, Form], ...] = (
    ("GET", rf"{_NAMED}(/revision/.+)?", _REPO),
    ("GET", r"/api/(models|datasets|spaces)", [_REPO]),
    ("GET", rf"{_NAMED}/refs", {"branches": [_REF], "tags?": [_REF], "converts?": [_REF]}),
    ("GET", rf"{_NAMED}/tree/.+", [_FILE]),
    ("POST", rf"{_NAMED}/paths-info/.+", [_FILE]),
    ("POST", rf"{_NAMED}/preupload/.+", {"files": [{"path": str, "uploadMode": str}]}),
    ("POST", rf"{_NAMED}/commit/.+",
     {"commitUrl": _is_link, "commitOid": _is_name, "pullRequestUrl?": str}),
    ("GET", rf"{_NAMED}/discussions", {"discussions": [_THREAD], "count": _is_count}),
    ("POST", r"/api/repos/create", {"url": _is_link}),
    ("GET", r"/api/whoami-v2", {
        "name": _is_name, "type?": str, "orgs?": [{"name?": str, "roleInOrg?": str}],
        "auth?": {"expiresAt?": str, "accessToken?": {
            "role?": str,
            "fineGrained?": {"scoped?": [{"entity?": _ENTITY, "permissions?": [str]}]},
        }},
    }),
    ("POST", r"/.+\.git/info/lfs/objects/batch", {"objects": [{
        "oid": str, "size": _is_count, "actions?": {"upload?": _ACTION, "verify?": _ACTION},
    }]}),
)  # fmt: skip
_READ = tuple((method, re.compile(path), form) for method, path, form in _FORMS)


def check_answer(response: httpx2.Response) -> None:
    """Refuse a good answer whose JSON is not of the form of its path; a hook of the client.

    Raises:
        StrangeAnswerError: it is not. What is no JSON at all is left to whoever reads it.
    """
    request = response.request
    if response.status_code >= 300 or request.method not in ("GET", "POST"):
        return
    form = next(
        (
            form
            for method, path, form in _READ
            if method == request.method and path.fullmatch(request.url.path)
        ),
        None,
    )
    if form is None:
        return
    response.read()
    try:
        value = load_json(response.content)
    except ValueError:
        return
    if wrong := _wrong(value, form, "it"):
        raise StrangeAnswerError(f"{request.method} {request.url.path}: {wrong}")


def _wrong(value: object, form: Form, name: str) -> str:
    """Return what of a value is not of a form; nothing where all of it is."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name} is no object"
        for key, inner in form.items():
            part = value.get(key.removesuffix("?"))
            if part is None and key.endswith("?"):
                continue
            if wrong := _wrong(part, inner, key.removesuffix("?")):
                return wrong
        return ""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        return next(filter(None, (_wrong(part, form[0], f"one of {name}") for part in value)), "")
    if isinstance(form, tuple):
        fits = any(not _wrong(value, one, name) for one in form)
    elif isinstance(form, type):
        fits = isinstance(value, form)
    else:
        fits = form(value)
    return "" if fits else f"{name} is of another kind"
