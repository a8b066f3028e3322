"""The form: models, method with its own controls, output and target."""

import dataclasses
from typing import Any, cast

import gradio as gr

from resmerge_stream.methods import MergeMethod, find_methods
from resmerge_stream.specs import OUTPUT_DTYPES

from ..examples import examples
from ..view.jobs import method_html
from .forms import AS_IT_IS, PRIVATE, PUBLIC, ROWS, SAME_AS_BASE, field_name, output_options
from .texts import step

Parts = dict[str, Any]
_RECIPE = "base_model: org/base\nmodels:\n  - model: org/math\n  - model: org/code"


def choose(parts: Parts) -> None:
    """Add what is merged and how."""
    gr.HTML(
        step(1, "Choose", "Start from an example, or write your own."),
        container=False,
        padding=False,
    )
    with gr.Row():
        for number, example in enumerate(examples()):
            with gr.Column(min_width=220):
                parts[f"example{number}"] = gr.Button(example.label, size="md")
                gr.HTML(f'<p class="rm-soft">{example.note}</p>', container=False, padding=False)
    _model(parts, "base", "base_revision", "Base model", None)
    for number in range(ROWS):
        _expert(parts, number)
    parts["add"] = gr.Button("Add an expert", size="sm")
    with gr.Accordion("Or paste a recipe (mergekit's YAML)", open=False):
        parts["yaml"] = gr.Textbox(
            label="Recipe", lines=8, max_lines=20, max_length=32_768,
            placeholder=_RECIPE,
        )  # fmt: skip
        parts["fill"] = gr.Button("Fill the form from it", size="sm")
        parts["pasted"] = gr.HTML(container=False, padding=False)
    methods = find_methods()
    titles = [(method.title, name) for name, method in methods.items()]
    parts["method"] = gr.Dropdown(titles, value="resmerge", label="Method")
    parts["about_method"] = gr.HTML(
        method_html(methods["resmerge"]), container=False, padding=False
    )
    for name, method in methods.items():
        _controls(parts, method, visible=name == "resmerge")
    _output(parts)


def target(parts: Parts) -> None:
    """Add where the result goes."""
    gr.HTML(step(2, "Name the result", ""), container=False, padding=False)
    parts["as_files"] = gr.Checkbox(
        False, label="Files to download instead of a repository (built-in example only)"
    )
    with gr.Row():
        parts["namespace"] = gr.Dropdown([], label="Owner", visible=False, min_width=140)
        parts["name"] = gr.Textbox(
            label="Repository", placeholder="my-merge, or namespace/my-merge", max_length=200,
            min_width=220,
        )  # fmt: skip
    parts["visibility"] = gr.Radio([PRIVATE, PUBLIC, AS_IT_IS], value=PRIVATE, label="Visibility")
    parts["update"] = gr.Checkbox(False, label="Replace the model that stands there")


def names() -> list[str]:
    """Return the names of every field whose value the form sends."""
    rows = [f"{key}{number}" for number in range(ROWS) for key in ("expert", "revision", "weight")]
    controls = [
        field_name(name, field.name)
        for name, method in find_methods().items()
        for field in dataclasses.fields(method)
    ]
    output = ["dtype", *output_options()]
    goal = ["as_files", "namespace", "name", "visibility", "update"]
    return ["base", "base_revision", *rows, "method", *controls, *output, *goal]


def filled() -> list[str]:
    """Return the names of every part that filling the form may change."""
    rows = [f"row{number}" for number in range(ROWS)]
    groups = [f"controls.{name}" for name in find_methods()]
    return [*names(), "count", *rows, *groups, "about_method", "planned"]


def _model(parts: Parts, name: str, revision: str, label: str, info: str | None) -> None:
    with gr.Row():
        parts[name] = gr.Dropdown(
            [], value=None, label=label, info=info, allow_custom_value=True, filterable=True,
            scale=4, min_width=240, elem_id=name,
        )  # fmt: skip
        parts[revision] = gr.Textbox(
            label="Base revision", placeholder="main", max_length=200, scale=1, min_width=130
        )


def _expert(parts: Parts, number: int) -> None:
    label = f"Expert {number + 1}"
    with gr.Row(visible=number < 2) as parts[f"row{number}"]:
        parts[f"expert{number}"] = gr.Dropdown(
            [], value=None, label=label, allow_custom_value=True, filterable=True, scale=4,
            min_width=240, elem_id=f"expert{number}",
        )  # fmt: skip
        parts[f"revision{number}"] = gr.Textbox(
            label=f"Revision {number + 1}",
            placeholder="main",
            max_length=200,
            scale=1,
            min_width=110,
        )
        parts[f"weight{number}"] = gr.Number(
            1.0, label=f"Weight {number + 1}", scale=1, min_width=90, visible=False
        )
        parts[f"remove{number}"] = gr.Button(
            f"Remove {label.lower()}", size="sm", scale=0, min_width=140, elem_classes="rm-remove"
        )


def _controls(parts: Parts, method: type[MergeMethod], *, visible: bool) -> None:
    """Add the controls of a method's own parameters, from its fields."""
    with gr.Group(visible=visible) as parts[f"controls.{method.name}"], gr.Row():
        for field in dataclasses.fields(method):
            parts[field_name(method.name, field.name)] = _control(field)


def _control(field: dataclasses.Field[Any]) -> Any:
    meta, default = field.metadata, cast(Any, field.default)
    label, low, high = f"{field.name}", meta["minimum"], meta["maximum"]
    info = meta["label"]
    if isinstance(default, bool):
        return gr.Checkbox(default, label=label, info=info, min_width=200)
    if isinstance(default, str):
        if meta["choices"]:
            return gr.Dropdown(
                list(meta["choices"]), value=default, label=label, info=info, min_width=200
            )
        return gr.Textbox(default, label=label, info=info, min_width=200)
    whole = isinstance(default, int)
    if low is not None and high is not None and not whole and high - low <= 1:
        return gr.Slider(low, high, value=default, step=0.01, label=label, info=info, min_width=200)
    return gr.Number(
        default, label=label, info=info, minimum=low, maximum=high, precision=0 if whole else None,
        min_width=200,
    )  # fmt: skip


def _output(parts: Parts) -> None:
    with gr.Accordion("Output options", open=False):
        with gr.Row():
            parts["dtype"] = gr.Dropdown(
                [SAME_AS_BASE, *OUTPUT_DTYPES], value=SAME_AS_BASE, label="Output type",
                info="float32 keeps what rounding would lose", min_width=200,
            )  # fmt: skip
            parts["rounding"] = gr.Dropdown(
                ["nearest", "stochastic"], value="nearest", label="Rounding",
                info="stochastic loses no small update on average", min_width=200,
            )  # fmt: skip
            parts["seed"] = gr.Number(
                0, label="Seed", info="of random numbers", precision=0, minimum=0, min_width=140
            )
        with gr.Row():
            parts["max_shard_size"] = gr.Textbox(
                label="File size, at most", placeholder="as the base's files, cut at 5GB",
                info="such as 5GB or 800MB", max_length=40, min_width=200,
            )  # fmt: skip
            parts["tokenizer_from"] = gr.Textbox(
                label="Tokenizer from", placeholder="the base", info="namespace/name",
                max_length=200, min_width=200,
            )  # fmt: skip
            parts["missing"] = gr.Dropdown(
                ["base", "refuse"], value="base", label="Tensors that some lack",
                info="base: merged among the experts that have them", min_width=200,
            )  # fmt: skip
