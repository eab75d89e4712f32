"""The functional form against the reference, over dtypes of every argument, and what it refuses."""

import pytest
import torch

from fastmoe_cpp import fused_experts, reference

E, H, INNER, K = 5, 12, 10, 2


def arguments(device="cpu", dtype=torch.float64, leading=(7,), rows=2 * INNER):
    return {
        "hidden_states": torch.randn(*leading, H, device=device, dtype=dtype),
        "gate_up_proj": torch.randn(E, rows, H, device=device, dtype=dtype) * 0.4,
        "down_proj": torch.randn(E, H, INNER, device=device, dtype=dtype) * 0.4,
        "topk_ids": torch.rand(*leading, E, device=device).argsort(-1)[..., :K],
        "topk_weights": torch.rand(*leading, K, device=device, dtype=dtype),
    }


def expected(a, capacity=None, drop_policy="position", padding_mask=None, **kwargs):
    x = a["hidden_states"].reshape(-1, H)
    weights = a["topk_weights"].reshape(-1, K)
    plan = reference.dispatch(
        a["topk_ids"].reshape(-1, K), E, topk_weights=weights, capacity=capacity, drop_policy=drop_policy,
        padding_mask=None if padding_mask is None else padding_mask.reshape(-1),
    )  # fmt: skip
    y = reference.experts(x, a["gate_up_proj"], a["down_proj"], weights, *plan[:3], **kwargs)
    return y.reshape(a["hidden_states"].shape)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(leading, id_dtype, weight_dtype, device):
    a = arguments(device, leading=leading)
    a["topk_ids"] = a["topk_ids"].to(id_dtype)
    a["topk_ids"][..., 0][torch.rand(leading, device=device) < 0.3] = -1
    a["topk_weights"] = a["topk_weights"].to(weight_dtype)
    wanted = [t.requires_grad_() for n, t in a.items() if n != "topk_ids"]
    y, truth = fused_experts(**a), expected({**a, "topk_weights": a["topk_weights"].double()})
    assert y.shape == a["hidden_states"].shape and y.dtype == torch.float64
    torch.testing.assert_close(y, truth)
    grad = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(t, wanted, grad) for t in (y, truth)), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    if a["topk_ids"].numel():
        dropped = a["topk_ids"] < 0
        assert (torch.autograd.grad(fused_experts(**a).sum(), a["topk_weights"])[0][dropped] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_keep_their_dtype_and_the_bar(dtype, device):
    a = arguments(device, dtype, leading=(64,))
    y = fused_experts(**a)
    assert y.dtype == dtype
    wide = {n: t.double() if t.is_floating_point() else t for n, t in a.items()}
    truth, eager = expected(wide), expected(a)
    floor = torch.finfo(dtype).eps * truth.abs().max()
    assert (y - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor


@pytest.mark.parametrize("options", [
    {"activation": "geglu"},
    {"activation": "clamped_swiglu", "activation_alpha": 1.2, "activation_limit": 0.7, "interleaved": True},
    {"weight_on_input": True},
    {"recompute": True},
    {"capacity": 2},
    {"capacity": 2, "drop_policy": "probs"},
    {"capacity": 0},
], ids=str)  # fmt: skip
def test_options(options, device):
    a = arguments(device, leading=(3, 4))
    mask = torch.rand(3, 4, device=device) < 0.3
    biases = {
        "gate_up_bias": torch.randn(E, 2 * INNER, device=device).double(),
        "down_bias": torch.randn(E, H, device=device).double(),
    }
    y = fused_experts(**a, **options, **biases, padding_mask=mask)
    torch.testing.assert_close(y, expected(a, **options, **biases, padding_mask=mask))
    assert (y[mask] == 0).all()


def test_ungated(device):
    a = arguments(device, rows=INNER)
    torch.testing.assert_close(fused_experts(**a, activation="relu2"), expected(a, activation="relu2"))


def test_transposed_weights_and_strided_input(device):
    a = arguments(device, leading=(6,))
    same = {**a,
            "gate_up_proj": a["gate_up_proj"].mT.contiguous().mT,
            "down_proj": a["down_proj"].mT.contiguous().mT,
            "hidden_states": a["hidden_states"].T.contiguous().T,
            "topk_ids": a["topk_ids"].T.contiguous().T}  # fmt: skip
    torch.testing.assert_close(fused_experts(**same), fused_experts(**a))


@pytest.mark.parametrize("change,error,message", [
    ({"topk_ids": torch.tensor([[0, 5]] * 7)}, ValueError, "topk_ids .*5"),
    ({"topk_ids": torch.tensor([[0, -2]] * 7)}, ValueError, "topk_ids .*-2"),
    ({"topk_ids": torch.zeros(7, K)}, TypeError, "topk_ids must be int32 or int64"),
    ({"topk_ids": torch.zeros(6, K).long()}, ValueError,
     r"topk_ids must have shape \[7, K\] with K of at least 1 for hidden_states \[7, 12\], got \[6, 2\]"),
    ({"topk_ids": torch.zeros(7, 0).long()}, ValueError, r"topk_ids must have shape \[7, K\] with K of at least 1"),
    ({"topk_ids": torch.zeros(7, 3).long()}, ValueError, r"topk_weights must have shape \[7, 3\] as topk_ids, got"),
    ({"topk_weights": torch.zeros(7)}, ValueError, r"topk_weights must have shape \[7, K\]"),
    ({"topk_weights": torch.zeros(7, K).long()}, TypeError, "topk_weights must be of a floating dtype, got"),
    ({"hidden_states": torch.zeros(())}, ValueError, r"hidden_states must have shape \[..., H\], got a scalar"),
    ({"hidden_states": torch.zeros(7, H).bfloat16()}, TypeError, "gate_up_proj must have the dtype of hidden_states"),
    ({"hidden_states": torch.zeros(7, 11).double()}, ValueError, "gate_up_proj must have shape"),
    ({"gate_up_proj": torch.zeros(20, H).double()}, ValueError, r"gate_up_proj must have shape \[E, 2 \* I, H\]"),
    ({"gate_up_proj": torch.zeros(E, 19, H).double()}, ValueError, "gate_up_proj must have shape"),
    ({"down_proj": torch.zeros(E - 1, H, INNER).double()}, ValueError, "down_proj must have shape"),
    ({"down_proj": torch.zeros(E, H, INNER)}, TypeError, "down_proj must have the dtype of hidden_states"),
    ({"activation": "mish"}, ValueError, "activation must be one of 'swiglu'.*, got 'mish'"),
    ({"capacity": -1}, ValueError, "capacity must be at least 0, got -1"),
    ({"drop_policy": "last"}, ValueError, "drop_policy must be one of 'position', 'probs', got 'last'"),
    ({"padding_mask": torch.zeros(7)}, TypeError, "padding_mask must be bool"),
    ({"padding_mask": torch.zeros(6).bool()}, ValueError, r"padding_mask must have shape \[7\]"),
    ({"gate_up_bias": torch.zeros(E, INNER).double()}, ValueError, "gate_up_bias must have shape"),
    ({"down_bias": torch.zeros(E, H)}, TypeError, "down_bias must be"),
], ids=lambda v: None)  # fmt: skip
def test_bad_arguments_are_one_sentence(change, error, message):
    with pytest.raises(error, match=message) as caught:
        fused_experts(**(arguments() | change))
    assert len(str(caught.value).splitlines()) == 1
