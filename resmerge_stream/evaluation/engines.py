"""A model in memory that answers questions: by transformers, or by vLLM where it is installed."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..device import choose_device
from ..errors import CheckpointFormatError, NotEnoughMemoryError, RecipeError, Remedy, shown
from ..experts.evaluate import said
from ..experts.tasks import TASKS
from ..recipe import ModelRef
from ..specs import DTYPES, TensorSpec
from .tasks import BATCH, Questions
from .verifiers import verify

Engine = Literal["auto", "transformers", "vllm"]
ENGINES: tuple[Engine, ...] = ("auto", "transformers", "vllm")


class Loading(NamedTuple):
    """How a model is loaded.

    Attributes:
        device: as ``--device``.
        engine: as `choose_engine` takes it.
        token: to read the Hub with; None stands for HF_TOKEN or the login.
        cache: a folder for what is downloaded; None: where the Hub's client keeps it.
    """

    device: str = "auto"
    engine: str = "auto"
    token: str | bool | None = None
    cache: Path | None = None


class Answerer(Protocol):
    """A model in memory."""

    def answers(self, task: Questions) -> list[tuple[str, bool]]:
        """Return what it says to each question, decoded greedily, and whether that is right."""
        ...

    def takes(self, specs: Iterable[TensorSpec]) -> bool:
        """Return whether tensors can overwrite its weights, and be what loading them would give."""
        ...

    def overwrite(self, name: str, weight: Tensor) -> None:
        """Put other values into the weight of that name."""
        ...

    def for_harness(self) -> Any:
        """Return it as lm-evaluation-harness takes it."""
        ...


def choose_engine(name: str, device: str) -> Literal["transformers", "vllm"]:
    """Return what loads the models.

    Args:
        name: ``auto`` (vLLM where it is installed and there is a GPU), ``transformers`` or
            ``vllm``.
        device: as ``--device``.

    Raises:
        RecipeError: there is no such engine, or vLLM is asked for and not installed.
    """
    if name not in ENGINES:
        raise RecipeError(f"unknown engine {shown(name)}. Choose one of: {', '.join(ENGINES)}.")
    if name == "transformers":
        return "transformers"
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm":
        if not installed:
            raise RecipeError(
                "vLLM is not installed here: pip install vllm, or let transformers load the models."
            )
        return "vllm"
    return "vllm" if installed and choose_device(device).type == "cuda" else "transformers"


@contextmanager
def loaded(text: str, how: Loading, *, harness: bool) -> Iterator[Answerer]:
    """Load a model, and free its memory afterwards.

    Args:
        text: a folder, or namespace/name[@revision].
        how: device, engine, token and cache.
        harness: whether a task of the harness will be asked.

    Raises:
        CheckpointFormatError: it cannot be loaded.
        NotEnoughMemoryError: a GPU is too small for it.
        RecipeError: there is no such engine.
    """
    chosen = choose_engine(how.engine, how.device)
    with in_memory(text):
        made: Answerer = (
            WithVllm(text, harness=harness) if chosen == "vllm" else WithTransformers(text, how)
        )
    try:
        yield made
    finally:
        del made
        gc.collect()  # vLLM's engine is a process of its own, which ends with the last reference


@contextmanager
def in_memory(text: str) -> Iterator[None]:
    """Say in words that a GPU is too small.

    Raises:
        NotEnoughMemoryError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise NotEnoughMemoryError(
            f"{shown(text)} and its answers do not fit into the GPU's memory.",
            Remedy.ASK_ON_CPU,
        ) from exc


class WithTransformers:
    """A model loaded by transformers: in float32 on a CPU, as stored on a GPU.

    Args:
        text: a folder, or namespace/name[@revision].
        how: it is loaded.

    Attributes:
        weights: its parameters and buffers by name; they share its memory.

    Raises:
        CheckpointFormatError: it cannot be loaded, or lacks weights.
    """

    def __init__(self, text: str, how: Loading) -> None:
        self._text = text
        self._model, self._tokenizer = _load(text, how)
        self.weights: dict[str, Tensor] = self._model.state_dict()

    def answers(self, task: Questions) -> list[tuple[str, bool]]:
        """Return what it says to each question, and whether that is right.

        Raises:
            CheckpointFormatError: it does not run.
            RecipeError: a task's check failed.
        """
        tokenizer, first = self._tokenizer, task.prompts[0]
        if (
            task.name in TASKS
            # A tokenizer may take prompts apart as the built-in experts' does.
            and len(tokenizer(first).input_ids) == len(first)
            and tokenizer.eos_token is not None
        ):
            return said(self._model, tokenizer, task.prompts)
        try:
            texts = self._texts(task)
        except (
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as exc:  # whatever its parts raise
            if type(exc).__name__ == "OutOfMemoryError":
                raise  # `in_memory` says it
            raise CheckpointFormatError(
                f"{shown(self._text)} does not answer: {_first(exc)}"
            ) from exc
        return list(zip(texts, verify(task.rules, texts), strict=True))

    def takes(self, specs: Iterable[TensorSpec]) -> bool:
        """Return whether it has weights of these names and shapes that hold such values exactly."""

        def holds(spec: TensorSpec) -> bool:
            own = self.weights.get(spec.name)
            if own is None or own.shape != spec.shape:
                return False
            return own.dtype in (torch.float32, getattr(torch, DTYPES[spec.dtype].torch_name))

        return all(holds(spec) for spec in specs)

    def overwrite(self, name: str, weight: Tensor) -> None:
        """Put other values into the weight of that name; they are cast to its dtype.

        Raises:
            CheckpointFormatError: it has no such weight of this shape.
        """
        own = self.weights.get(name)
        if own is None or own.shape != weight.shape:
            raise CheckpointFormatError(
                f"{shown(self._text)} has {shown(name)} under another name or in another shape in "
                "memory. Merge it into a model, and ask that."
            )
        own.copy_(weight)

    def for_harness(self) -> Any:
        """Return it as the harness takes it."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self._model, tokenizer=self._tokenizer, batch_size=BATCH)

    def _texts(self, task: Questions) -> list[str]:
        tokenizer, texts = self._tokenizer, []
        for start in range(0, len(task.prompts), BATCH):
            asked = list(task.prompts[start : start + BATCH])
            batch = tokenizer(asked, padding=True, return_tensors="pt").to(self._model.device)
            batch.pop("token_type_ids", None)
            with torch.no_grad():
                tokens = self._model.generate(
                    **batch,
                    max_new_tokens=task.new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            new = tokens[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts


class WithVllm:
    """A model loaded by vLLM, which answers all questions of a task at once.

    Args:
        text: a folder, or namespace/name[@revision].
        harness: whether a task of the harness will be asked: then the harness loads it, so that
            it is in memory once.

    Raises:
        CheckpointFormatError: it cannot be loaded.
    """

    def __init__(self, text: str, *, harness: bool) -> None:
        ref = ModelRef.parse(text)
        if ref.subfolder and not os.path.isdir(ref.id):
            raise CheckpointFormatError(
                f"{shown(text)}: vLLM loads whole repositories, not one of their folders. "
                "Let transformers load it."
            )
        place = os.path.join(ref.id, ref.subfolder) if ref.subfolder else ref.id
        revision = ref.revision or None
        self._lm: Any = None
        try:
            if harness:
                from lm_eval.models.vllm_causallms import VLLM

                self._lm = VLLM(place, revision=revision, tokenizer_revision=revision)
                self._llm: Any = self._lm.model
            else:
                from vllm import LLM

                self._llm = LLM(place, revision=revision, tokenizer_revision=revision)
        except Exception as exc:  # vLLM raises whatever its parts raise
            raise CheckpointFormatError(f"vLLM cannot load {shown(text)}: {_first(exc)}") from exc

    def answers(self, task: Questions) -> list[tuple[str, bool]]:
        """Return what it says to each question, and whether that is right.

        Raises:
            RecipeError: a task's check failed.
        """
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=task.new_tokens)
        found: Sequence[Any] = self._llm.generate(list(task.prompts), greedy, use_tqdm=False)
        texts = [one.outputs[0].text for one in found]
        return list(zip(texts, verify(task.rules, texts), strict=True))

    def takes(self, specs: Iterable[TensorSpec]) -> bool:
        """Return that it does not."""
        return False

    def overwrite(self, name: str, weight: Tensor) -> None:
        """Refuse: its weights lie in a process of its own.

        Raises:
            CheckpointFormatError: always.
        """
        raise CheckpointFormatError(
            f"{shown(name)}: vLLM is given whole models here. Let transformers load the base, or "
            "merge the adapter into a model and ask that."
        )

    def for_harness(self) -> Any:
        """Return it as the harness takes it."""
        return self._lm


def _load(text: str, how: Loading) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    where = choose_device(how.device)
    dtype = torch.float32 if where.type == "cpu" else "auto"
    ref = ModelRef.parse(text)
    found_at: dict[str, Any] = {
        "revision": ref.revision or "main",
        "subfolder": ref.subfolder or "",
        "token": how.token,
        "cache_dir": how.cache,
    }
    logging: Any = transformers_logging
    logging.disable_progress_bar()
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            ref.id,
            **found_at,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,  # nobody is asked, and no code of a stranger runs
            output_loading_info=True,
        )
        model, info = made
        tokenizer: Any = AutoTokenizer.from_pretrained(ref.id, **found_at, trust_remote_code=False)
    except Exception as exc:  # transformers raises whatever its parts raise
        raise CheckpointFormatError(f"{shown(text)} cannot be loaded: {_first(exc)}") from exc
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointFormatError(f"{shown(text)} lacks weights of its architecture: {missing}.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(where).eval(), tokenizer


def _first(exc: Exception) -> str:
    """Return the first line of what went wrong."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
