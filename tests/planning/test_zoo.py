"""Every architecture of transformers that can be built small, through plan, merge and load."""

import pytest

from tests.zoo import architectures
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
