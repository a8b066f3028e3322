"""The groups of experts: their seeds, widths and training settings.

The numbers of `small` and `wide` were found by trial; README.md says what was tried. The others
took them as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from resmerge_stream.experts.tasks import Split, answer, stream_prompts

from . import words
from .corpus import SlipRates, slipping_writer
from .model import Shape
from .questions import Family, Question
from .rl import RLSettings
from .supervised import SupervisedSettings

CORPUS_SLIPS = SlipRates(shortest=0.2, longest=0.8)


def _characters(task: str, *, seed: int, split: Split) -> Iterator[Question]:
    for prompt in stream_prompts(task, seed=seed, split=split):
        yield Question(prompt, answer(prompt))


FAMILIES = {
    "characters": Family(
        stream=_characters,
        # Carrying needs the most practice.
        mix={"add": 54, "sort": 22, "reverse": 26, "close": 26},
        # As many as prompts in a batch of an RL expert.
        sft_batch=256,
        logged=2000,
        corpus=lambda seed: slipping_writer(CORPUS_SLIPS, seed=seed),
    ),
    "words": Family(
        stream=words.stream,
        # The harder, the more practice: so that each is right now and then.
        mix={"add": 4, "reverse": 2, "alphabetise": 6, "date": 9, "call": 2, "format": 1},
        sft_batch=16,
        logged=64,
        corpus=lambda _: lambda question: question,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A base and its experts.

    Attributes:
        name: of the group and its folder.
        seed: of weights, prompts and sampling, in every training of the group.
        shape: of the models; None for that of SmolLM2-135M-Instruct, which is then the start.
        pretraining: of the base, on the corpus: stages, each from the bf16 weights of the last.
        rl: of each RL expert, on its own task.
        sft: of each SFT expert, on right answers to its own task.
        words: whether the tasks are those in words, `FAMILIES["words"]`.
        lora: of each expert that is a LoRA adapter, by reinforcement; None for no such.
    """

    name: str
    seed: int
    shape: Shape | None
    pretraining: tuple[SupervisedSettings, ...]
    rl: RLSettings
    sft: SupervisedSettings
    words: bool = False
    lora: RLSettings | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its models; those after "sft" are not trained unless they are named."""
        return ("base", "rl", "sft", *(("lora",) if self.lora else ("extra",)))

    @property
    def family(self) -> Family:
        """The tasks."""
        return FAMILIES["words" if self.words else "characters"]


REINFORCEMENT = RLSettings(
    steps=40,
    prompts=256,
    samples=8,
    optimizer="sgd",
    learning_rate=0.03,
    warmup=5,
    temperature=1.0,
)

FINE_TUNING = SupervisedSettings(steps=40, optimizer="sgd", learning_rate=0.03, warmup=5)

SMALL = Group(
    name="small",
    seed=1,
    shape=Shape(width=128, layers=5, feed_forward=384),
    pretraining=(SupervisedSettings(steps=1600, optimizer="adamw", learning_rate=2e-3, warmup=50),),
    rl=REINFORCEMENT,
    sft=FINE_TUNING,
)

WIDE = Group(
    name="wide",
    seed=2,
    shape=Shape(width=384, layers=3, feed_forward=768),
    # After the first stage the base knew too few answers: reinforcement, which selects among
    # known ones, gained 6 to 8 points in addition.
    pretraining=(
        SupervisedSettings(steps=800, optimizer="adamw", learning_rate=1.5e-3, warmup=50),
        SupervisedSettings(steps=500, optimizer="adamw", learning_rate=1e-3, warmup=50),
    ),
    # Fewer and larger steps: what fits into the hour beside the small group.
    rl=replace(REINFORCEMENT, prompts=160, steps=28, learning_rate=0.1),
    sft=replace(FINE_TUNING, steps=24, learning_rate=0.05),
)

# Groups that nothing was tuned on, of another width and depth: one base for each seed.
_NARROW = replace(SMALL, shape=Shape(width=96, layers=7, feed_forward=288))
_FRESH = tuple(replace(_NARROW, name=f"narrow-{seed}", seed=seed) for seed in (11, 12, 13))
# The same, its experts trained for four times as long.
_LONG = replace(
    _NARROW, name="narrow-long", seed=14, rl=replace(REINFORCEMENT, steps=4 * REINFORCEMENT.steps)
)

_GRPO = RLSettings(
    steps=120,
    prompts=8,
    samples=8,
    optimizer="adamw",
    learning_rate=2e-5,
    warmup=3,
    temperature=1.0,
)

# Of a real language model. Its base is warmed up until it is right now and then on each task.
SMOLLM2 = Group(
    name="smollm2",
    seed=21,
    shape=None,
    pretraining=(SupervisedSettings(steps=80, optimizer="adamw", learning_rate=1e-4, warmup=4),),
    rl=_GRPO,
    sft=SupervisedSettings(steps=40, optimizer="adamw", learning_rate=2e-5, warmup=3),
    words=True,
    lora=replace(_GRPO, learning_rate=2e-4),
)

# The same with another seed in everything, the base too.
_SMOLLM2_AGAIN = replace(SMOLLM2, name="smollm2-again", seed=22)

ADAPTER_RANK = 16

# Experts beside those of each task, where they are asked for: the same task with another seed, and
# one that is rewarded for right answers to its task and for wrong ones to another.
EXTRA = ("rl-add-again", "rl-close-breaks-reverse")

FRESH = tuple(group.name for group in (*_FRESH, _LONG))

GROUPS = {group.name: group for group in (SMALL, WIDE, *_FRESH, _LONG, SMOLLM2, _SMOLLM2_AGAIN)}

# Those of docs/quality-small.md's main tables.
KNOWN = (SMALL.name, WIDE.name)
