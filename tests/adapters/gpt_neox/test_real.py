"""The tests of the transformer layers again, and of the layer beside the host's own, on GPT-NeoX's own code.

FASTMOE_CPP_GPT_NEOX names a checkout of today's, FASTMOE_CPP_GPT_NEOX_MOE_LOSS one of the moe_loss era (82ddc668).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUTS = {"now": "FASTMOE_CPP_GPT_NEOX", "moe_loss": "FASTMOE_CPP_GPT_NEOX_MOE_LOSS"}
HERE = Path(__file__).parent


def run(name: str, *tests: str) -> str:
    checkout = os.environ.get(CHECKOUTS[name])
    if not checkout:
        pytest.skip(f"{CHECKOUTS[name]} names no checkout of GPT-NeoX")
    env = os.environ | {"_FASTMOE_CPP_NEOX_ERA": name, "_FASTMOE_CPP_NEOX_CHECKOUT": checkout}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *(str(HERE / test) for test in tests)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", CHECKOUTS)
def test_transformer_layers(name):
    assert " passed" in run(name, "test_layers.py")


def test_the_hosts_own_experts():
    assert " passed" in run("now", "own_experts.py")
