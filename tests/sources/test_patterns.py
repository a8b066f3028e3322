"""Patterns of module names mean what PEFT's regexes mean, and none takes long."""

import random
import re

import pytest

from resmerge_stream.sources.patterns import Patterns

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
    "a.b",
    "x\n",
    "",
)
PARTS = (
    "q_proj", "a", "b", ".", r"\d+", r"\d", "[a-z]", "[^a-z.]", r"\.", "layers", "(q|k)", "(.*)",
    "(?:a|b)*", "x{2,3}", "^", "$", r"\w+?", "model", "(a|ab)(c|bcd)?", "l?", r"[\w.]*", "_proj",
    ")|(.*", r"\Z", r"\A", "[]a]", r"\s", r"\W", "(){2}",
)  # fmt: skip


def test_a_pattern_matches_as_a_regex_of_python_does():
    """Hundreds of random patterns match the names that PEFT's call of `re.match` matches."""
    drawn = random.Random(0)

    for _ in range(400):
        key = "".join(drawn.choice(PARTS) for _ in range(drawn.randint(1, 5)))
        try:
            regex = re.compile(rf"(.*\.)?({key})$")
        except re.error:
            with pytest.raises(ValueError, match="the pattern"):
                Patterns({key: 1})
            continue
        found = [Patterns({key: 1}).get(name, 0) for name in NAMES]
        assert found == [int(regex.match(name) is not None) for name in NAMES], key


def test_the_first_pattern_counts():
    """Names and other patterns are asked in the order of the config."""
    module = "model.layers.1.self_attn.v_proj"

    assert Patterns({"v_proj": 1, r".*v_proj": 2}).get(module, 0) == 1
    assert Patterns({r".*v_proj": 2, "v_proj": 1}).get(module, 0) == 2
    assert Patterns({"self_attn.v_proj": 3, "v_proj": 1}).get(module, 0) == 3
    assert Patterns({"proj": 1}).get(module, 0) == 0


@pytest.mark.parametrize(
    "key",
    [
        r"(.|.)*X",
        r"(a|a|.)+!",
        r"((.)+)+!",
        r"(?:.?.?){30}!",
        r"(\w|\w\w|\.)*\d!",
        r".*.*.*.*.*.*.*.*.*.*.*.*.*.*X",
        r"([a-z]|[a-z_.]|[0-9.])*#",
    ],
)
def test_a_pattern_that_backtracks_for_ever_is_matched_at_once(key):
    """Python's own matcher would not come back within a day; the steps here are few."""
    patterns = Patterns({key: 1})

    assert [patterns.get(f"model.layers.{n}.self_attn.q_proj", 0) for n in range(100)] == [0] * 100


def test_twenty_thousand_names_are_looked_up():
    """As many keys as a config may have, none of which fits."""
    patterns = Patterns({f"m{number}x": 2 for number in range(20_000)})

    assert [patterns.get(f"layers.{number}.q_proj", 0) for number in range(500)] == [0] * 500


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (r"(?=(.|.)*X).*", "assert"),
        (r"(a)\1", "groupref"),
        (r"(?i)q_proj", "flags"),
        (r"(?i:q_proj)", "subpattern"),
        ("(a{900}){900}", "too complicated"),
        ("(((){2000}){2000}){2000}", "too complicated"),
        ("(" * 90_000, "the pattern"),
    ],
)
def test_what_is_not_matched_here_is_refused(key, words):
    """What looks ahead or back, sets flags, or has thousands of states is named."""
    with pytest.raises(ValueError, match=words):
        Patterns({key: 1})


def test_patterns_that_take_too_long_together_are_refused():
    """Thousands of regexes on long names end with a message and not in hours."""
    patterns = Patterns({rf"(.|.)*{number}!": 1 for number in range(2000)})
    long = ".".join(str(number) for number in range(5000))

    with pytest.raises(ValueError, match="too long to be matched"):
        patterns.get(long, 0)
