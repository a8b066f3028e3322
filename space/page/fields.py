"""The form: models, method and name; parameters, weights and output options under Advanced."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import gradio as gr

from resmerge_stream.methods import MergeMethod, find_methods, parameter_fields
from resmerge_stream.planning.options import declared
from resmerge_stream.recipe import DEFAULT_METHOD
from resmerge_stream.specs import RECIPE_DTYPES

from ..examples import examples
from ..questions import MOST_BYTES
from ..view.jobs import method_html
from .forms import (
    ADAPTER_RANK,
    AS_IT_IS,
    AS_NEW,
    AS_PULL_REQUEST,
    AS_UPDATE,
    BEYOND,
    PRIVATE,
    PUBLIC,
    ROWS,
    SAME_AS_BASE,
    field_name,
    output_options,
)

Parts = dict[str, Any]
_RECIPE = "base_model: org/base\nmodels:\n  - model: org/math\n  - model: org/code"
# What a field of a model says below its name.
INFO = {
    "base": "owner/name, with @revision if you like, or its address on the Hub",
    "expert0": "a model that was trained from this base, or a LoRA adapter of it",
}
# The methods that are offered first, and what is said of each; a test counts it in the evidence.
SHORT = {
    "head_regression": "the best, or within a point of it, in 54 of 67 groups",
    "swudi": "so in 51 of 67; takes more memory",
    "tsv_m": "3 points behind the best on average",
}
# The fields that name a model.
MODELS = ("base", *(f"expert{number}" for number in range(ROWS)))


def choose(parts: Parts) -> None:
    """Add what is merged, how, and what it will be called."""
    parts["base"] = _model("Base model", "base", info=INFO["base"])
    for number in range(ROWS):
        name = f"expert{number}"
        info = INFO.get(name, "")
        parts[name] = _model(f"Expert {number + 1}", name, info=info, visible=number < 2)
    with gr.Row():
        parts["add"] = gr.Button("Add an expert", size="sm", scale=0, min_width=160)
    with gr.Accordion("Or paste a recipe, or take an example", open=False):
        _start_from(parts)
    methods = find_methods()
    parts["short"] = gr.Radio(short_list(SHORT), value=DEFAULT_METHOD, label="Method, recommended")
    parts["about_method"] = gr.HTML(
        method_html(methods[DEFAULT_METHOD]), container=False, padding=False
    )
    with gr.Accordion(f"All {len(methods)} methods", open=False):
        titles = [(method.title, name) for name, method in methods.items()]
        parts["method"] = gr.Dropdown(titles, value=DEFAULT_METHOD, label="Method")
    with gr.Row():
        parts["namespace"] = gr.Dropdown([], label="Owner", visible=False, min_width=140)
        parts["name"] = gr.Textbox(
            label="Name of the result", placeholder="my-merge, or owner/my-merge",
            max_length=200, min_width=220,
        )  # fmt: skip
    parts["chips"] = gr.HTML(label="What was changed", container=False, padding=False)
    with gr.Accordion("Advanced", open=False):
        _part("The method")
        with gr.Row():
            for number in range(ROWS):
                parts[f"weight{number}"] = gr.Number(
                    1.0, label=f"Weight {number + 1}", min_width=90, visible=False
                )
        for name, method in methods.items():
            _controls(parts, method, visible=name == DEFAULT_METHOD)
        _part("What is written")
        _output(parts)
        _part("How it is published")
        _publish(parts)
        _part("What it is asked afterwards")
        parts["questions"] = gr.Textbox(
            label="Questions", lines=2, max_lines=10, max_length=MOST_BYTES,
            placeholder='{"prompt": "2+2=", "answer": "4", "verify": "number"}',
            info="one JSON object a line; base, experts and merge answer here if they are small",
        )  # fmt: skip


def short_list(found: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the choices of the short list, from what is said of each method."""
    methods = find_methods()
    return [(f"{methods[name].title}: {said}", name) for name, said in found.items()]


def names() -> list[str]:
    """Return the names of every field whose value the form sends."""
    rows = [f"{key}{number}" for number in range(ROWS) for key in ("expert", "weight")]
    controls = [
        field_name(name, key)
        for name, method in find_methods().items()
        for key in parameter_fields(method)
    ]
    output = ["dtype", *output_options()]
    goal = ["namespace", "name", "publish", "visibility", "collection", "discuss", "questions"]
    return ["base", *rows, "method", *controls, *output, *goal, BEYOND]


def filled() -> list[str]:
    """Return the names of every part that filling the form may change."""
    groups = [f"controls.{name}" for name in find_methods()]
    return [*names(), "count", *groups, "about_method", "short", "planned"]


def _part(title: str) -> None:
    gr.HTML(f'<h3 class="rm-part">{title}</h3>', container=False, padding=False)


def _start_from(parts: Parts) -> None:
    with gr.Row():
        for number, example in enumerate(examples()):
            parts[f"example{number}"] = gr.Button(example.label, size="sm", min_width=180)
    parts["yaml"] = gr.Textbox(
        label="Recipe", lines=4, max_lines=20, max_length=32_768, placeholder=_RECIPE,
        info="mergekit's YAML, or a merged model on the Hub: owner/name",
    )  # fmt: skip
    with gr.Row():
        parts["fill"] = gr.Button("Fill the form from it", size="sm")
        parts["file"] = gr.Button("Open a file", size="sm")
    parts["pasted"] = gr.HTML(container=False, padding=False)
    parts[BEYOND] = gr.Textbox(
        label="Also from the recipe", interactive=False, visible=False, max_lines=8,
        info="applies as written, until you load another recipe or example",
    )  # fmt: skip


def _model(label: str, elem_id: str, *, info: str = "", visible: bool = True) -> gr.Dropdown:
    return gr.Dropdown(
        [], value=None, label=label, info=info or None, allow_custom_value=True, filterable=True,
        elem_id=elem_id, visible=visible,
    )  # fmt: skip


def _controls(parts: Parts, method: type[MergeMethod], *, visible: bool) -> None:
    """Add the controls of a method's own parameters, from its fields."""
    with gr.Group(visible=visible) as parts[f"controls.{method.name}"], gr.Row():
        for key, field in parameter_fields(method).items():
            meta, default = field.metadata, cast(Any, field.default)
            parts[field_name(method.name, key)] = _control(
                default, meta["choices"], label=key, info=meta["label"]
            )


def _control(default: Any, choices: Sequence[str], *, placeholder: str = "", **said: Any) -> Any:
    """Return the control of a parameter or an option, from what is declared of it."""
    said["min_width"] = 200
    if isinstance(default, bool):
        return gr.Checkbox(default, **said)
    if choices:
        return gr.Dropdown(list(choices), value=default, **said)
    if isinstance(default, int | float):
        # Without ends: gradio would refuse the whole form, and not say which field; the plan does.
        return gr.Number(default, precision=0 if isinstance(default, int) else None, **said)
    # Also where nothing is the default: gradio's number makes 0 of an empty field.
    return gr.Textbox(default, placeholder=placeholder or None, max_length=200, **said)


def _output(parts: Parts) -> None:
    with gr.Row():
        parts["dtype"] = gr.Dropdown(
            [SAME_AS_BASE, *RECIPE_DTYPES], value=SAME_AS_BASE, label="Output type",
            info="float32 keeps what rounding would lose", min_width=200,
        )  # fmt: skip
        for known in declared():
            if known.changes != "nothing":
                parts[known.key] = _control(
                    known.default, known.choices, placeholder=known.placeholder,
                    label=known.label, info=known.info, visible=known.key != ADAPTER_RANK,
                )  # fmt: skip


def _publish(parts: Parts) -> None:
    """Add how the result is published, and what follows."""
    parts["publish"] = gr.Radio(
        [AS_NEW, AS_UPDATE, AS_PULL_REQUEST], value=AS_NEW, label="Publish as",
        info="update: replaces the model in the repository; pull request: proposes the change",
    )  # fmt: skip
    parts["visibility"] = gr.Radio(
        [PRIVATE, PUBLIC, AS_IT_IS], value=PRIVATE, label="Visibility",
        info="set when everything is there; a pull request leaves it as it is",
    )  # fmt: skip
    with gr.Row():
        parts["collection"] = gr.Textbox(
            label="Add to the collection", placeholder="owner/title-id, or its address",
            info="one of yours; empty for none", max_length=300, min_width=320,
        )  # fmt: skip
        parts["discuss"] = gr.Checkbox(
            False, label="Post when it is done",
            info="opens a discussion in the new repository", min_width=320,
        )  # fmt: skip
