"""Every architecture of transformers that can be built small, through plan, merge and load."""

import pytest

from tests.zoo import architectures
from tests.zoo.adapted import KINDS, adapt
from tests.zoo.page import KNOWN_WARNINGS
from tests.zoo.trial import attempt

FEW = ("qwen3_5", "gpt_oss", "deepseek_v3", "nemotron_h")
REST = [name for name in architectures.buildable() if name not in FEW]


@pytest.mark.parametrize(
    "architecture", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("without_picture")
def test_an_architecture_merges_and_loads(architecture, tmp_path):
    """Planned without a wrong word, merged twice, loaded whole; two equal experts give that one."""
    trial = attempt(architecture, tmp_path)

    assert trial.problems == []
    assert [text for text in trial.warnings if not KNOWN_WARNINGS.search(text)] == []
    assert trial.decomposed > 0
    assert trial.loads
    assert trial.equal or trial.lacking


# What was refused before names went through transformers' tables, one of each way.
ADAPTED = (
    ("qwen2_5_vl", "linear"),
    ("llava", "linear"),
    ("mixtral", "experts"),
    ("deepseek_v4", "experts"),
    ("gpt_oss", "experts"),
    ("exaone", "linear"),
    ("nemotron_h", "experts"),
)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *ADAPTED,
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in architectures.buildable()
            for kind in KINDS
            if (name, kind) not in ADAPTED
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("without_picture")
def test_an_adapter_merges_as_peft_merges_it(architecture, kind, tmp_path):
    """Every tensor is PEFT's; what is refused stands on the page, and nothing is wrong."""
    pytest.importorskip("peft")

    result = adapt(architecture, kind, tmp_path)

    assert result.outcome != "wrong", result.why
    assert result.outcome == "equal" or (architecture, kind) not in ADAPTED
