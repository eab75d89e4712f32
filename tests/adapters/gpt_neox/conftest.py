"""The host of a test: small layers of our own, or the checkout named for a process of its own (test_real.py)."""

import os
from pathlib import Path

import pytest
import torch

from . import real, small

ERAS = ("now", "moe_loss")
#: Set by test_real.py for the process it starts: an era and a checkout.
REAL_ERA, REAL_CHECKOUT = os.environ.get("_FASTMOE_CPP_NEOX_ERA"), os.environ.get("_FASTMOE_CPP_NEOX_CHECKOUT")


def pytest_generate_tests(metafunc):
    if "host" in metafunc.fixturenames:
        metafunc.parametrize("era", [REAL_ERA] if REAL_ERA else ERAS, scope="module")


@pytest.fixture(scope="module")
def host(era):
    """arguments() and layer() of a host in which our adapter is installed."""
    from megatron_adapters import gpt_neox

    if REAL_ERA:
        real.prepare(Path(REAL_CHECKOUT))
        assert gpt_neox.detect_era() == era
        gpt_neox.install()
        yield real
        return
    with small.host(era):
        assert gpt_neox.detect_era() == era
        undo = gpt_neox.install()
        yield small
        undo()


@pytest.fixture(autouse=True)
def device_of_new_layers(request, monkeypatch):
    """A host with a GPU makes its layers there; tests of the CPU want them here."""
    if "cuda" not in request.keywords:
        monkeypatch.setattr("megatron_adapters.gpt_neox.dropless._device", lambda: torch.device("cpu"))
