"""The form: models, method and name; parameters, weights and output options under Advanced."""

import dataclasses
from typing import Any, cast

import gradio as gr

from resmerge_stream.methods import RECOMMENDED, MergeMethod, find_methods, parameter_fields
from resmerge_stream.specs import OUTPUT_DTYPES

from ..examples import examples
from ..questions import MOST_BYTES
from ..view.jobs import method_html
from .forms import (
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
from .texts import heading

Parts = dict[str, Any]
_RECIPE = "base_model: org/base\nmodels:\n  - model: org/math\n  - model: org/code"
MODEL_INFO = "owner/name, with @revision if you like, or its address on the Hub"
METHOD = RECOMMENDED
# The fields that name a model.
MODELS = ("base", *(f"expert{number}" for number in range(ROWS)))


def choose(parts: Parts) -> None:
    """Add what is merged, how, and what it will be called."""
    gr.HTML(heading("Merge your own"), container=False, padding=False)
    parts["base"] = _model("Base model", "base", info=MODEL_INFO)
    for number in range(ROWS):
        name = f"expert{number}"
        parts[name] = _model(f"Expert {number + 1}", name, visible=number < 2)
    with gr.Row():
        parts["add"] = gr.Button("Add an expert", size="sm", scale=0, min_width=160)
    methods = find_methods()
    titles = [(method.title, name) for name, method in methods.items()]
    parts["method"] = gr.Dropdown(titles, value=METHOD, label="Method")
    parts["about_method"] = gr.HTML(method_html(methods[METHOD]), container=False, padding=False)
    with gr.Row():
        parts["namespace"] = gr.Dropdown([], label="Owner", visible=False, min_width=140)
        parts["name"] = gr.Textbox(
            label="Name of the result", placeholder="my-merge, or owner/my-merge",
            max_length=200, min_width=220,
        )  # fmt: skip
    parts["chips"] = gr.HTML(label="What was changed", container=False, padding=False)
    with gr.Accordion("Advanced", open=False):
        _part("Start from")
        _start_from(parts)
        _part("The method")
        with gr.Row():
            for number in range(ROWS):
                parts[f"weight{number}"] = gr.Number(
                    1.0, label=f"Weight {number + 1}", min_width=90, visible=False
                )
        for name, method in methods.items():
            _controls(parts, method, visible=name == METHOD)
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
    return [*names(), "count", *groups, "about_method", "planned"]


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
        info="no field shows it; it goes over the fields until another recipe or example is chosen",
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
            parts[field_name(method.name, key)] = _control(key, field)


def _control(label: str, field: dataclasses.Field[Any]) -> Any:
    meta, default = field.metadata, cast(Any, field.default)
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
    # Without ends: gradio would refuse the whole form, and not say which field; the plan does.
    return gr.Number(default, label=label, info=info, precision=0 if whole else None, min_width=200)


def _output(parts: Parts) -> None:
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
        parts["as"] = gr.Radio(
            [("whole model", "model"), ("as adapter", "adapter")], value="model", label="Output",
            info="adapter: a LoRA adapter of the base, a few megabytes", min_width=200,
        )  # fmt: skip
        # Text: gradio's number makes 0 of an empty field.
        parts["adapter_rank"] = gr.Textbox(
            label="Adapter's rank, at most", max_length=8, min_width=200, visible=False,
            info="whole experts need one; empty: as high as it takes to keep all",
        )  # fmt: skip
        parts["tokenizer_from"] = gr.Textbox(
            label="Tokenizer from", placeholder="the base", info="owner/name",
            max_length=200, min_width=200,
        )  # fmt: skip
        parts["missing"] = gr.Dropdown(
            ["base", "refuse"], value="base", label="Tensors that some lack",
            info="base: merged among the experts that have them", min_width=200,
        )  # fmt: skip


def _publish(parts: Parts) -> None:
    """Add how the result is published, and what follows."""
    parts["publish"] = gr.Radio(
        [AS_NEW, AS_UPDATE, AS_PULL_REQUEST], value=AS_NEW, label="Publish as",
        info="an update replaces what the repository has; a pull request proposes to",
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
