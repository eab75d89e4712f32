"""PyTorch's own examination of an operator: schema, autograd registration, fake tensors, and AOT dispatch with dynamic
shapes."""

import pytest
import torch
from support.catalogue import CATALOGUE, DIFFERENTIABLE, calls, namespace_ops
from support.samples import ops

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_every_operator_has_an_entry():
    assert sorted(CATALOGUE) == namespace_ops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_opcheck(name, dtype, device):
    for call in calls(name, device=device, dtype=dtype):
        torch.library.opcheck(getattr(ops, name).default, call.args, call.kwargs, test_utils=UTILITIES)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name, device):
    for call in calls(name, device=device, grad=True):
        torch.library.opcheck(getattr(ops, name).default, call.args, call.kwargs, test_utils=UTILITIES)


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - {"update_expert_bias"}))
def test_opcheck_of_no_tokens(name, device):
    for call in calls(name, device=device, tokens=0):
        torch.library.opcheck(getattr(ops, name).default, call.args, call.kwargs, test_utils=UTILITIES)
