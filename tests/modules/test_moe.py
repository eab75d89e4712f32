"""The layer against the reference, and its contract: what goes in, what comes out, what is refused."""

import copy
import pickle
import warnings

import pytest
import torch

from fastmoe_cpp import MoE, MoEConfig, MoEOutput, RouterConfig, reference
from modules.cases import CASES, EXPERTS, HIDDEN, TOP_K, assert_same, config, gradients, make, run_reference, tensors

FLOATS = ("hidden_states", "router_logits", "router_scores", "topk_weights", "balance_loss", "z_loss", "aux_loss")
COUNTS = ("topk_ids", "tokens_per_expert", "dropped")


def compare(layer, x, **kwargs):
    """Every field of the output, and every gradient, through the output and the auxiliary loss."""
    out = layer.forward_with_routing(x, **kwargs)
    expected = run_reference(layer, x, **kwargs)
    assert_same({n: getattr(out, n) for n in FLOATS}, {n: getattr(expected, n) for n in FLOATS})
    for name in COUNTS:
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    grad = torch.randn_like(x)
    losses = [(o.hidden_states * grad).sum() + 3 * o.aux_loss + o.balance_loss for o in (out, expected)]
    # recompute and bfloat16 logits change roundings, not values
    assert_same(*(gradients(layer, x, loss) for loss in losses), rtol=1e-10)
    return out


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_reference(case, training, device):
    layer = make(case, device).train(training)
    x = torch.randn(2, 9, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    compare(layer, x)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_reference_with_padding(case, device):
    layer = make(case, device)
    x = torch.randn(3, 7, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 7, device=device) < 0.4
    mask[1] = True
    out = compare(layer, x, padding_mask=mask)
    assert out.dropped[mask.flatten()].all()


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_reference_under_replay(case, device):
    layer = make(case, device)
    k = layer.config.top_k
    x = torch.randn(2, 6, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(2, 6, layer.config.num_experts, device=device).argsort(-1)[..., :k].int()
    ids[0, 2] = -1
    ids[1, 3, 0] = -1
    out = compare(layer, x, topk_ids=ids)
    assert out.topk_ids.dtype == torch.int64 and torch.equal(out.topk_ids, ids.long().flatten(0, 1))


def test_replaying_its_own_choice_changes_nothing(device):
    layer = make("deepseek", device)
    x = torch.randn(20, HIDDEN, device=device, dtype=torch.float64)
    out = layer.forward_with_routing(x)
    again = layer.forward_with_routing(x, topk_ids=out.topk_ids)
    assert torch.equal(out.hidden_states, again.hidden_states) and torch.equal(out.topk_weights, again.topk_weights)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("case", ["mixtral", "deepseek", "gpt_oss", "capacity", "global"])
def test_every_leading_shape(shape, case, device):
    layer = make(case, device)
    x = torch.randn(*shape, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    tokens = x.numel() // HIDDEN
    y = layer(x)
    assert isinstance(y, torch.Tensor) and y.shape == x.shape and y.dtype == x.dtype
    out = layer.forward_with_routing(x)
    assert isinstance(out, MoEOutput) and torch.equal(out.hidden_states, y)
    e, k = EXPERTS, layer.config.top_k
    shapes = {
        "hidden_states": tuple(x.shape), "router_logits": (tokens, e), "router_scores": (tokens, e),
        "topk_weights": (tokens, k), "topk_ids": (tokens, k), "tokens_per_expert": (e,), "dropped": (tokens, k),
        "balance_loss": (), "z_loss": (), "aux_loss": (),
    }  # fmt: skip
    assert {n: tuple(t.shape) for n, t in out._asdict().items()} == shapes
    assert all(t.device == x.device for t in out)
    assert out.balance_loss.isfinite() and out.z_loss.isfinite() and out.aux_loss.isfinite()
    (y.sum() + out.aux_loss).backward()
    for name, p in [("x", x), *layer.named_parameters()]:
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.isfinite().all(), name
        if tokens == 0:
            assert (p.grad == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["mixtral", "deepseek", "float64_router", "bfloat16_router"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "padded", "replay"])
def test_output_dtypes_on_every_path(dtype, case, mode, device):
    layer = make(case, device, dtype).train(mode != "eval")
    x = torch.randn(2, 4, HIDDEN, device=device, dtype=dtype)
    kwargs = {}
    if mode == "padded":
        kwargs["padding_mask"] = torch.tensor([[False] * 4, [True] * 4], device=device)
    if mode == "replay":
        kwargs["topk_ids"] = torch.arange(TOP_K, device=device).expand(2, 4, TOP_K)
    with torch.set_grad_enabled(mode != "no_grad"):
        out = layer.forward_with_routing(x, **kwargs)
    routing = torch.float64 if torch.float64 in (dtype, layer.config.router.dtype) else torch.float32
    assert out.hidden_states.dtype == dtype
    assert all(getattr(out, n).dtype == routing for n in FLOATS[1:])
    assert out.topk_ids.dtype == out.tokens_per_expert.dtype == torch.int64 and out.dropped.dtype == torch.bool
    assert (out.hidden_states.requires_grad, out.aux_loss.requires_grad) == (mode != "no_grad",) * 2


def test_a_token_of_nan_harms_itself_alone(device):
    for case in ("mixtral", "deepseek", "gpt_oss"):
        layer = make(case, device).eval()
        x = torch.randn(9, HIDDEN, device=device, dtype=torch.float64)
        clean = layer(x)
        x[4] = float("nan")
        out = layer.forward_with_routing(x)
        assert out.hidden_states[4].isnan().all()
        others = torch.arange(9, device=device) != 4
        assert torch.equal(out.hidden_states[others], clean[others])
        assert len(set(out.topk_ids[4].tolist())) == TOP_K and (0 <= out.topk_ids).all() and (out.topk_ids < 8).all()


def test_strided_input(device):
    layer = make("mixtral", device)
    x = torch.randn(HIDDEN * 2, 5, 4, device=device, dtype=torch.float64).permute(2, 1, 0)[..., ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


# --- capacity and padding ---------------------------------------------------------------------------------------------


def test_zero_capacity_drops_everything_and_keeps_the_weights_in_the_graph(device):
    layer = make(config(capacity_factor=0.0), device)
    x = torch.randn(7, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    out = layer.forward_with_routing(x)
    assert (out.hidden_states == 0).all() and out.dropped.all() and out.tokens_per_expert.sum() == 7 * TOP_K
    out.hidden_states.sum().backward()
    for name, p in [("x", x), *layer.named_parameters()]:
        assert p.grad is not None and (p.grad == 0).all(), name
    # in evaluation no limit was asked for
    assert not layer.eval().forward_with_routing(x).dropped.any()


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_capacity_keeps_the_first_or_the_largest(policy, device):
    layer = make(config(capacity_factor=0.5, drop_policy=policy), device)
    out = layer.forward_with_routing(torch.randn(32, HIDDEN, device=device, dtype=torch.float64))
    capacity = 6  # 0.5 * 32 * 3 / 8
    ids, dropped = out.topk_ids.flatten(), out.dropped.flatten()
    order = torch.arange(96, device=device).double()
    rank_by = order if policy == "position" else -out.topk_weights.flatten()
    assert dropped.any()
    for e in range(EXPERTS):
        mine = ids == e
        kept, lost = mine & ~dropped, mine & dropped
        assert kept.sum() == min(capacity, int(mine.sum()))
        if lost.any():
            assert rank_by[kept].max() <= rank_by[lost].min()


def test_a_trace_says_that_it_fixes_the_capacity(device):
    """torch.jit.trace keeps the number; torch.export keeps its formula."""
    x = torch.randn(32, HIDDEN, device=device, dtype=torch.float64)
    limited, unlimited = make(config(capacity_factor=0.5), device), make(config(), device)
    with pytest.warns(torch.jit.TracerWarning, match="makes the capacity of 32 tokens a constant"):
        torch.jit.trace(limited, x, check_trace=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.trace(unlimited, x)
    assert not any("capacity" in str(w.message) for w in caught)
    exported = torch.export.export(limited, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)).module()
    torch.testing.assert_close(exported(x[:20]), limited(x[:20]))


def test_capacity_above_the_tokens_is_no_limit(device):
    x = torch.randn(8, HIDDEN, device=device, dtype=torch.float64)
    layer = make(config(capacity_factor=1000.0), device)
    unlimited = MoE(config(), device=device, dtype=torch.float64)
    unlimited.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), unlimited(x))


def test_padding_takes_no_capacity_and_gets_no_expert(device):
    layer = make(config(capacity_factor=1.0, shared_intermediate_size=4), device)
    x = torch.randn(2, 8, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 8, dtype=torch.bool, device=device)
    mask[0] = True
    out = layer.forward_with_routing(x, mask)
    assert not out.dropped[8:].any() or (out.tokens_per_expert > 6).any()
    assert out.tokens_per_expert.sum() == 8 * TOP_K
    # only the shared expert sees padding
    torch.testing.assert_close(out.hidden_states[0], layer.shared_experts(x[0]))
    routed = out.hidden_states - layer.shared_experts(x)
    grads = torch.autograd.grad(routed.sum() + out.balance_loss + out.z_loss, x)[0]
    assert grads[0].abs().max() < 1e-12 and (grads[1] != 0).any()


# --- jitter, initial weights, precision -------------------------------------------------------------------------------


def test_jitter_is_of_the_router_and_of_training_alone(device):
    layer = make(config({"jitter_eps": 0.3}), device)
    plain = MoE(config(), device=device, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(64, HIDDEN, device=device, dtype=torch.float64)
    torch.manual_seed(3)
    out = layer.forward_with_routing(x)
    torch.manual_seed(3)
    noise = torch.empty_like(x).uniform_(0.7, 1.3)
    torch.testing.assert_close(out.router_logits, (x * noise) @ layer.router.weight.T)
    replayed = reference.experts(
        x, layer.experts.gate_up_proj, layer.experts.down_proj, out.topk_weights,
        *reference.dispatch(out.topk_ids, EXPERTS)[:3],
    )  # fmt: skip
    torch.testing.assert_close(out.hidden_states, replayed)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), plain(x))
    torch.manual_seed(3)
    seen = layer.train().router(x).logits
    assert torch.equal(seen, out.router_logits)


def test_weights_start_from_the_configured_normal_distribution():
    c = MoEConfig(64, 96, 16, 2, bias=True, initializer_range=0.05, shared_intermediate_size=64,
                  router=RouterConfig(bias=True, expert_bias=True))  # fmt: skip
    layer = MoE(c)
    for name, p in layer.named_parameters():
        if "bias" in name:
            assert (p == 0).all(), name
        else:
            assert p.mean().abs() < 0.006 and abs(p.std() - 0.05) < 0.005, name
    before = {n: p.clone() for n, p in layer.named_parameters()}
    layer.router.expert_bias.fill_(1.0)
    torch.manual_seed(7)
    layer.reset_parameters()
    assert (layer.router.expert_bias == 0).all()
    assert all("bias" in n or not torch.equal(before[n], p) for n, p in layer.named_parameters())


def test_meta_device():
    with torch.device("meta"):
        layer = MoE(config({"expert_bias": True}, shared_intermediate_size=4))
    assert all(t.is_meta for t in tensors(layer).values())
    y = layer(torch.empty(2, 5, HIDDEN, device="meta"))
    assert y.is_meta and y.shape == (2, 5, HIDDEN)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(3, HIDDEN)).isfinite().all()
    assert MoE(config(), device="meta", dtype=torch.bfloat16).router.weight.dtype == torch.bfloat16


def test_the_selection_bias_keeps_its_precision():
    layer = make("deepseek", dtype=torch.float32)
    exact = layer.router.expert_bias.clone()
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.expert_bias.dtype == torch.float32 and torch.equal(layer.router.expert_bias, exact)
    assert layer.double().router.expert_bias.dtype == torch.float64


def test_a_router_in_float32_under_bfloat16_experts(device):
    layer = make("mixtral", device, torch.bfloat16)
    layer.router.float()
    x = torch.randn(6, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = layer.forward_with_routing(x)
    torch.testing.assert_close(out.router_logits, x.float() @ layer.router.weight.T)
    out.hidden_states.sum().backward()
    assert layer.router.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_bfloat16_router_are_rounded(dtype, device):
    layer = make("bfloat16_router", device, dtype)
    x = torch.randn(200, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    out = layer.forward_with_routing(x)
    rounded = (x.float() @ layer.router.weight.float().T).bfloat16().float()
    # sums in another order may round to the neighbour
    assert (out.router_logits == rounded).float().mean() > 0.98
    assert torch.equal(out.router_logits, out.router_logits.bfloat16().float())
    torch.testing.assert_close(out.router_scores, out.router_logits.softmax(-1))
    out.topk_weights.square().sum().backward()
    assert layer.router.weight.grad.dtype == dtype and layer.router.weight.grad.norm() > 0


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_state_round_trips(case, tmp_path, device):
    layer = make(case, device)
    x = torch.randn(12, HIDDEN, device=device, dtype=torch.float64)
    y = layer.eval()(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = MoE(layer.config, device=device, dtype=torch.float64).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True), strict=True)
    assert torch.equal(other(x), y)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y) and copied.config == layer.config
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copied.parameters(), layer.parameters(), strict=True))


def test_names_in_the_state():
    assert set(make("mixtral").state_dict()) == {"router.weight", "experts.gate_up_proj", "experts.down_proj"}
    everything = config(
        {"bias": True, "expert_bias": True}, bias=True, shared_intermediate_size=4, shared_expert_gate=True
    )
    assert set(MoE(everything).state_dict()) == {
        "router.weight", "router.bias", "router.expert_bias",
        "experts.gate_up_proj", "experts.gate_up_bias", "experts.down_proj", "experts.down_bias",
        "shared_experts.gate_up_proj", "shared_experts.down_proj", "shared_experts.gate",
    }  # fmt: skip
    layer = make("mixtral")
    assert layer.router.weight.shape == (EXPERTS, HIDDEN)
    assert layer.experts.gate_up_proj.shape == (EXPERTS, 24, HIDDEN)
    assert layer.experts.down_proj.shape == (EXPERTS, HIDDEN, 12)
    assert "num_experts=8" in repr(layer)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x,kwargs,error,message",
    [
        (torch.zeros(3, 15), {}, ValueError, r"hidden_states must have shape \[\.\.\., 16\], got \[3, 15\]"),
        (torch.zeros(()), {}, ValueError, r"hidden_states must have shape \[\.\.\., 16\], got \[\]"),
        (torch.zeros(3, 16).bfloat16(), {}, TypeError, "gate_up_proj must have the dtype of hidden_states"),
        (torch.zeros(3, 16).long(), {}, TypeError, "hidden_states must be float64, float32, bfloat16 or float16"),
        (
            torch.zeros(3, 16),
            {"padding_mask": torch.zeros(4, dtype=torch.bool)},
            ValueError,
            r"padding_mask must have shape \[3\] for hidden_states \[3, 16\], got \[4\]",
        ),
        (
            torch.zeros(3, 16),
            {"padding_mask": torch.zeros(3)},
            TypeError,
            "padding_mask must be bool, True for padding, got torch.float32",
        ),
        (
            torch.zeros(3, 16),
            {"topk_ids": torch.zeros(3, 2, dtype=torch.long)},
            ValueError,
            r"topk_ids must have shape \[3, 3\], got \[3, 2\]",
        ),
        (
            torch.zeros(3, 16),
            {"topk_ids": torch.full((3, 3), 8)},
            ValueError,
            "topk_ids must be .*8",
        ),
        (torch.zeros(3, 16), {"topk_ids": torch.zeros(3, 3)}, TypeError, "topk_ids must be int32 or int64"),
    ],
)
def test_bad_input_is_one_sentence(x, kwargs, error, message):
    layer = make("mixtral", dtype=torch.float32)
    with pytest.raises(error, match=message) as caught:
        layer.forward_with_routing(x, **kwargs)
    assert len(str(caught.value).splitlines()) == 1


def test_a_config_must_be_a_config():
    with pytest.raises(TypeError, match="config must be a MoEConfig, got dict"):
        MoE({"hidden_size": 4})


@pytest.mark.parametrize("form", ["batch", "global"])
def test_weights_assigned_over_meta_are_counted(form, device):
    router = {"expert_bias": True, "balance_loss": form, "balance_loss_coefficient": 0.1}
    real, layer = make(config(router), device), MoE(config(router), device="meta", dtype=torch.float64)
    layer.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(5, HIDDEN, device=device, dtype=torch.float64)
    for each in (real, layer):
        each(x).sum().backward()
    assert torch.equal(layer.router.tokens_per_expert, real.router.tokens_per_expert)
    layer.update_expert_bias()
    assert layer.router.tokens_per_expert.sum() == 0 and layer.router.expert_bias.abs().max() > 0


def test_counts_of_a_layer_made_empty_start_at_zero(device):
    layer = MoE(config({"expert_bias": True}), device="meta").to_empty(device=device)
    assert torch.equal(layer.router.tokens_per_expert, torch.zeros(EXPERTS, dtype=torch.int64, device=device))
