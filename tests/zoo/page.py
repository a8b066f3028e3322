"""What the trials found, as ``docs/models.md``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from tests.zoo.architectures import UNBUILT
from tests.zoo.trial import Trial

# Warnings that are right, and what the page says of them.
KNOWN_WARNINGS = re.compile(r"ties \S+ to \S+, but both are there")
_TIED = "transformers writes a head of its own though the config ties it; merged as it loads it"
# Forms of their own that architectures are published in: tests/sources/test_quantised.py.
_PUBLISHED = {"gpt_oss": ["MXFP4"]}
_TOP = """\
# Which models merge

{merged} of {built} architectures merge, and {loaded} of the results load again; transformers
{transformers} has {all} causal language models and image-text models, of which {unbuilt} were not
built.

This page is written by `python -m tests.zoo`, with torch {torch}. For each architecture,
transformers makes a small random model and writes it with `save_pretrained`, as a base and two
experts. Columns:

- **decomposed**: how many of its tensors follow ResMerge's own rule; the rest follow the rule of
  `other`. Every linear map is decomposed, even routers; `resmerge-stream plan` lists them.
- **merges**: planned without a problem, and merged by `mean` and by `resmerge`.
- **loads**: `from_pretrained` loads both results, with nothing missing and nothing unexpected.
- **two equal experts**: their mean is that expert, bit for bit. *Logits*: a forward pass gives
  equal logits too. *Weights*: the forward pass needs more than token ids (mostly an image), or
  does not work with the small sizes.
- **quantised**: the same holds with such a base. FP8 is `weight_scale_inv` with blocks of
  128 × 128 on every linear map except routers and stacks of experts; scales by channel and by
  tensor are read too. GPTQ, AWQ, bitsandbytes and GGUF are refused; the message says what to do.

If gate and up share one tensor, or experts are stacked, the bytes are those of the same model with
each in its own tensor. This holds even if a stack stores its maps as (in, out), as in Llama 4 and
gpt-oss.

Small models test names, shapes and storage, not whether a merge is good; for that see
[quality.md](quality.md).

| | architectures |
|---|---|
| tried | {built} |
| merged by `mean` and `resmerge` | {merged} |
| loaded, nothing missing, nothing unexpected | {loaded} |
| mean of two equal experts: equal logits | {logits} |
| mean of two equal experts: equal weights | {weights} |
| the same from an FP8 base | {fp8} |
| refused | {refused} |
| not built | {unbuilt} |

## Tried

| architecture | decomposed | merges | loads | two equal experts | quantised | notes |
|---|---|---|---|---|---|---|
"""


def page(trials: Sequence[Trial], architectures: int) -> str:
    """Return the page.

    Args:
        trials: of all architectures that were built.
        architectures: how many transformers has.
    """
    merged = [trial for trial in trials if trial.tensors]
    equal = Counter(trial.equal for trial in trials)
    head = _TOP.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        all=architectures,
        built=len(trials),
        unbuilt=len(UNBUILT),
        merged=len(merged),
        refused=len(trials) - len(merged),
        loaded=sum(trial.loads and not trial.lacking for trial in trials),
        logits=equal["logits"],
        weights=equal["logits"] + equal["parameters"],
        fp8=sum("FP8" in trial.quantised for trial in trials),
    )
    rows = "".join(_row(trial) for trial in trials)
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(UNBUILT.items()):
        reasons.setdefault(reason, []).append(f"`{name}`")
    unbuilt = "".join(f"| {reason} | {', '.join(names)} |\n" for reason, names in reasons.items())
    return f"{head}{rows}\n## Not built\n\n| why | architectures |\n|---|---|\n{unbuilt}"


def _row(trial: Trial) -> str:
    notes = [re.sub(r"/\S*/", "", problem) for problem in trial.problems]
    notes += [_TIED if KNOWN_WARNINGS.search(text) else text for text in trial.warnings]
    if trial.lacking:
        notes.append("transformers does not find all that it writes itself")
    forms = [*trial.quantised, *_PUBLISHED.get(trial.architecture, [])]
    cells = [
        f"`{trial.architecture}`",
        f"{trial.decomposed} of {trial.tensors}" if trial.tensors else "",
        "yes" if trial.tensors else "refused",
        "yes" if trial.loads and not trial.lacking else "no",
        {"logits": "logits", "parameters": "weights"}.get(trial.equal, ""),
        ", ".join(forms),
        "; ".join(notes).replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |\n"
