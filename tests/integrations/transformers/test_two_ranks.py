# ruff: noqa: E402
"""Models that transformers 5 spreads over two processes, with our experts, beside the whole model with eager ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..conftest import require

require("transformers", "5")
pytest.importorskip("accelerate", reason="transformers asks for accelerate to spread a model")

from transformers import AutoModelForCausalLM

from . import families

CASES = ("gpt_oss-ep", "mixtral-ep", "mixtral-tp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    for family in sorted({case.split("-")[0] for case in CASES}):
        families.make(family).save_pretrained(folder / family)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(__file__).with_name("two_ranks.py")), str(folder), *CASES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_experts_of_a_model_on_two_ranks(case, folder):
    """Expert parallelism (ep), whose routers write an index past the end for another rank's experts, and tensor
    parallelism (tp), which cuts every expert: logits and gradients."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / case.split("-")[0], experts_implementation="eager", attn_implementation="eager"
    ).eval()
    torch.manual_seed(5)
    ids = families.tokens(2, 12)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    actual = torch.load(folder / f"{case}.pt")
    assert (actual["logits"] - expected.logits).abs().max() < 3e-6 * expected.logits.abs().max()
    compared = 0
    for name, grad in actual["grads"].items():
        host = model.get_parameter(name).grad
        assert (grad - host).abs().max() < 3e-5 * host.abs().max(), name
        compared += ".mlp." in name
    assert compared >= (6 if case.endswith("ep") else 2)
