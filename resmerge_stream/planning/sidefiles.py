"""The small files of an output: config with the output dtype; tokenizer and the like, copied."""

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..documents import load_json
from ..errors import Findings, Remedy, listed
from ..sinks.provenance import digest_of
from ..sources.checkpoint import Checkpoint
from ..sources.files import is_small
from ..specs import FP8
from .dtypes import fp8_config, main_dtype

# Which tokens there are: the files that tokenizers of transformers 5.24 name in their
# `vocab_files_names` (a test compares), what is beside them, Mistral's own and OpenAI's form.
_VOCABULARY = re.compile(
    r"tokenizer\.json|tokenizer\.model(\.v\w+)?|(sentencepiece.*|spiece|spm|spm_char|tiktoken)\.model|"
    r"(source|target)\.spm|vocab(-src|-tgt)?\.json|target_vocab\.json|entity_vocab\.json|"
    r"vocab\.txt|merges\.txt|bpe\.codes|dict\.txt|byte_maps\.json|emoji\.json|normalizer\.json|"
    r"prophetnet\.tokenizer|word_(pronunciation|shape)\.json|added_tokens\.json|"
    r"tekken\.json|.*\.tiktoken"
)
_TOKENIZER = re.compile(
    rf"{_VOCABULARY.pattern}|tokenizer.*\.(json|model|txt)|special_tokens_map\.json|"
    r"chat_template\.(jinja|json)|additional_chat_templates/.+\.jinja"
)
_MODEL = re.compile(
    r"generation_config\.json|custom_generate/[^/]+|(video_)?preprocessor_config\.json|"
    r"processor_config\.json|audio_tokenizer_config\.json|image_processor.*\.json|"
    r"feature_extractor.*\.json|"
    r"modules\.json|config_sentence_transformers\.json|sentence_.+_config\.json"
)
# A tokenizer in a folder of its own is part of a processor.
_INNER_TOKENIZER = "/tokenizer_config.json"
MODULES = "modules.json"
# Keys of settings that say which version of a library wrote them.
_WRITERS = ("transformers_version", "__version__")
# Kind of the warning that code goes along.
OWN_CODE = "own-code"
# What may name further files: settings and code; not a vocabulary, whose words can be anything.
_NAMING = re.compile(r"(.*/)?([\w-]*config[\w-]*|modules)\.json|.*\.py")
_QUOTED = re.compile(r"""["']([\w./-]{1,200})["']""")
_IMPORTED = re.compile(r"^\s*(?:from|import)\s+\.?(\w+)", re.MULTILINE)
_NOT_ALONG = re.compile(r"config\.json|.*\.safetensors\.index\.json|[^/]*\.md|resmerge/.*")


def side_files(base: Checkpoint, tokenizer: Checkpoint) -> dict[str, bytes]:
    """Return the files to copy byte for byte, by name.

    Args:
        base: gives generation config, processor files, and the code that they and its config name.
        tokenizer: gives tokenizer files, chat templates and the code that these name; usually the
            base again.
    """
    files = {name: tokenizer.read_small(name) for name in tokenizer_files(tokenizer)}
    return files | {name: base.read_small(name) for name in model_files(base)}


def digests_of_copied(
    sources: Iterable[Checkpoint], layout: Checkpoint, gives_tokens: Iterable[Checkpoint]
) -> dict[int, str]:
    """Return a digest of what each folder or bucket gives an output beside weights, by its number.

    A model of a repository has a commit, which says the same.

    Args:
        sources: all that are open.
        layout: gives the config and what `model_files` names.
        gives_tokens: those of which tokenizer files are read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    tokens = {one.id for one in gives_tokens}
    found = {}
    for number, source in enumerate(sources):
        if source.revision is not None:
            continue
        is_layout = source.id == layout.id
        names = tokenizer_files(source) if source.id in tokens else []
        names += model_files(source) if is_layout else []
        files = {name: hashlib.sha256(source.read_small(name)).hexdigest() for name in names}
        if is_layout:
            files["config.json"] = digest_of(source.config)
        if files:
            found[number] = digest_of(files)
    return found


def check_side_files(base: Checkpoint, tokenizer: Checkpoint, found: Findings) -> None:
    """Read now what will be copied, where that is quick, and say what will be missing.

    Raises:
        CheckpointError: a file cannot be copied.
    """
    names, others = tokenizer_files(tokenizer), model_files(base)
    for source, those in ((tokenizer, names), (base, others)):
        for name in those if source.folder is not None else ():
            source.read_small(name)
    if not vocabulary_files(tokenizer):
        found.warning(
            f"{tokenizer.id} has no tokenizer files, so the output will have none",
            Remedy.TOKENIZER_FROM,
        )
    if code := code_files([*names, *others]):
        found.warning(
            f"the merge needs its own code to load (auto_map); copied: {', '.join(code)}",
            kind=OWN_CODE,
        )
    both = [name for name in code_files(names) if name in others and tokenizer is not base]
    if differ := [name for name in both if tokenizer.read_small(name) != base.read_small(name)]:
        found.warning(
            f"{base.id} and {tokenizer.id}, whose tokenizer is taken, have other code under the "
            f"same names; the former's is copied: {listed(differ)}"
        )
    for source, those in ((tokenizer, names), (base, others)):
        if lacking := _lacking_code(source, those):
            found.warning(
                f"{source.id} names code that it does not have: {listed(lacking)}. Without it the "
                "output will not load; put it into that folder."
            )


def check_modules(base: Checkpoint, experts: Sequence[Checkpoint], found: Findings) -> None:
    """Refuse modules with weights of their own that differ; name settings that do.

    A model of sentence-transformers has further modules, each in a folder. Their settings go along,
    as a processor's do; weights of theirs are not merged, so they must be the same everywhere.
    """
    kept = _settings(base)
    for expert in experts:
        other = [
            name
            for name in _settings(expert)
            if name not in kept
            or (
                not same_small_file(base, expert, name) and _said(base, name) != _said(expert, name)
            )
        ]
        if other:
            found.warning(
                f"{expert.id} has other settings than {base.id} in {listed(other)}; those of "
                f"{base.id} are kept"
            )
        apart = [
            name
            for folder in module_folders(base)
            for name in sorted(_inside(base, folder))
            if not is_small(name.rpartition("/")[2])
            and module_folders(expert)
            and not (name in expert.small_files and same_small_file(base, expert, name))
        ]
        if apart:
            found.problem(
                f"{expert.id} has other weights than {base.id} in {listed(apart)}, a module of its "
                f"own that is not merged. Remove {MODULES} from both to merge what is left, and "
                "train that module again."
            )


def _settings(checkpoint: Checkpoint) -> list[str]:
    """Return the files of a model's processors and modules that hold settings."""
    names = _matching(checkpoint, _MODEL)
    for folder in module_folders(checkpoint):
        names |= _inside(checkpoint, folder)
    return sorted(
        name
        for name in names
        if name.endswith(".json")
        and name != "generation_config.json"
        and not _TOKENIZER.fullmatch(name)
    )


def _said(checkpoint: Checkpoint, name: str) -> Any:
    """Return what a file of settings says, without who wrote it."""
    try:
        said = load_json(checkpoint.read_small(name))
    except ValueError:
        return checkpoint.read_small(name)
    return {k: v for k, v in said.items() if k not in _WRITERS} if isinstance(said, dict) else said


def same_small_file(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Return whether two models have the same content in a file that both have."""
    known = one.small_oid(name), other.small_oid(name)
    if None not in known:
        return known[0] == known[1]
    return one.read_small(name) == other.read_small(name)


def tokenizer_files(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a tokenizer's files, chat templates and code."""
    return _with_named(checkpoint, _matching(checkpoint, _TOKENIZER))


def vocabulary_files(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the files that say which tokens a model has."""
    return sorted(_matching(checkpoint, _VOCABULARY))


def model_files(checkpoint: Checkpoint) -> list[str]:
    """Return the names of what else a model is loaded with: settings, processors, modules, code."""
    names = _matching(checkpoint, _MODEL)
    for name in checkpoint.small_files:
        inside = _inside(checkpoint, name.removesuffix(_INNER_TOKENIZER))
        if all(is_small(path.rpartition("/")[2]) for path in inside):  # a trainer's folder has more
            names |= inside
    for folder in module_folders(checkpoint):
        names |= _inside(checkpoint, folder)
    every = _with_named(checkpoint, names, json.dumps(checkpoint.config))
    return [name for name in every if not _TOKENIZER.fullmatch(name)]


def module_folders(checkpoint: Checkpoint) -> list[str]:
    """Return the folders of a model's further modules, as sentence-transformers lists them."""
    if MODULES not in checkpoint.small_files:
        return []
    try:
        modules = load_json(checkpoint.read_small(MODULES))
    except ValueError:
        return []  # not its format; the file goes along
    paths = (one.get("path") for one in modules if isinstance(one, dict))
    return [path for path in paths if isinstance(path, str) and path]


def code_files(names: Iterable[str]) -> list[str]:
    """Return those of some files that are code."""
    return sorted(name for name in names if name.endswith(".py"))


def _lacking_code(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """Return the code that a model's settings name and that is neither there nor elsewhere."""
    settings = [checkpoint.config]
    for name in names:
        if name.endswith("_config.json"):
            with contextlib.suppress(ValueError):  # somebody else's business
                settings.append(load_json(checkpoint.read_small(name)))
    maps = (one.get("auto_map") for one in settings if isinstance(one, dict))
    values = [value for one in maps if isinstance(one, dict) for value in one.values()]
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    files = {f"{name.partition('.')[0]}.py" for name in classes if isinstance(name, str)}
    return sorted(name for name in files if "--" not in name and name not in checkpoint.small_files)


def _matching(checkpoint: Checkpoint, pattern: re.Pattern[str]) -> set[str]:
    return {name for name in checkpoint.small_files if pattern.fullmatch(name)}


def _inside(checkpoint: Checkpoint, folder: str) -> set[str]:
    return {name for name in checkpoint.small_files if name.startswith(f"{folder}/")}


def _with_named(checkpoint: Checkpoint, names: set[str], *texts: str) -> list[str]:
    """Return files, and those of the same model that they or some texts name."""
    there = {name for name in checkpoint.small_files if not _NOT_ALONG.fullmatch(name)}
    names = names & there
    unread = [name for name in names if _NAMING.fullmatch(name)]
    for text in texts:
        unread += [name for name in _named_in(text, there) if name not in names]
    while unread:
        name = unread.pop()
        names.add(name)
        if _NAMING.fullmatch(name):
            text = checkpoint.read_small(name).decode("utf-8", "replace")
            folder = name[: name.rfind("/") + 1]  # code imports what lies beside it
            imported = _IMPORTED.findall(text) if name.endswith(".py") else ()
            more = {f"{folder}{module}.py" for module in imported} & there
            more |= {*_named_in(text, there)}
            unread += more - names - set(unread)
    return sorted(names)


def _named_in(text: str, there: Collection[str]) -> Iterator[str]:
    """Yield the files that a text names: by their names, or by a class in a file of code."""
    for quoted in _QUOTED.findall(text):
        if quoted in there:
            yield quoted
        code = f"{quoted.rpartition('--')[2].partition('.')[0]}.py"
        if code in there and "." in quoted:
            yield code


def output_config(
    base: Checkpoint,
    dtype: str | None,
    ids: Mapping[str, int] | None = None,
    written: Mapping[str, str] | None = None,
) -> bytes:
    """Return ``config.json``: the base's, with the output dtype.

    Args:
        base: the base checkpoint.
        dtype: ``bfloat16`` and so on, or None for what most of the base's weights have.
        ids: what is said otherwise of special tokens, where a section says anything of them.
        written: the dtype of each tensor; for those in FP8.
    """
    name = "bfloat16" if dtype == FP8 else dtype or main_dtype(base)
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if isinstance(section.get(key), str):
                section[key] = name
        section.update({key: number for key, number in (ids or {}).items() if key in section})
    if "torch_dtype" not in config and "dtype" not in config:
        config["dtype"] = name
    if dtype == FP8:
        config["quantization_config"] = fp8_config(base, written or {})
    return json_file(config)


def json_file(document: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file as transformers writes it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
