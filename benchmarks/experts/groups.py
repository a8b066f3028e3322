"""The groups of experts: their seeds, widths and training settings.

The numbers of `small` and `wide` were found by trial; docs/log.md says what was tried. The others
took them as they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .corpus import SlipRates
from .model import Shape
from .rl import RLSettings
from .supervised import SupervisedSettings

# Prompts of each task in one pre-training batch: carrying needs the most practice.
CORPUS_MIX = {"add": 54, "sort": 22, "reverse": 26, "close": 26}

CORPUS_SLIPS = SlipRates(shortest=0.2, longest=0.8)

# Prompts in one batch of an SFT expert, as many as in one of an RL expert.
SFT_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A base and its experts.

    Attributes:
        name: of the group and its folder.
        seed: of weights, prompts and sampling, in every training of the group.
        shape: of the models.
        pretraining: of the base, on the corpus: stages, each from the bf16 weights of the last.
        rl: of each RL expert, on its own task.
        sft: of each SFT expert, on right answers to its own task.
    """

    name: str
    seed: int
    shape: Shape
    pretraining: tuple[SupervisedSettings, ...]
    rl: RLSettings
    sft: SupervisedSettings


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

# Experts beside those of each task, where they are asked for: the same task with another seed, and
# one that is rewarded for right answers to its task and for wrong ones to another.
EXTRA = ("rl-add-again", "rl-close-breaks-reverse")

FRESH = tuple(group.name for group in (*_FRESH, _LONG))

GROUPS = {group.name: group for group in (SMALL, WIDE, *_FRESH, _LONG)}

# Those of docs/quality.md's main tables.
KNOWN = (SMALL.name, WIDE.name)
