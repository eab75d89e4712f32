# ruff: noqa: E501 (one row a case)
"""Bad input, one row a case: the right exception, one sentence that names the argument, what was expected and what was found,
from the CPU kernel and from the Meta kernel alike; and garbage that can't crash."""

import pytest
import torch
from support.catalogue import CATALOGUE, DIFFERENTIABLE, Setting, calls, run
from support.samples import dispatch, experts_inputs, normal, ops, run_experts

T, H, I, E, K = 7, 6, 4, 5, 2


def base(device="cpu"):
    """Every argument by the name its operator knows it by."""
    made = experts_inputs(T, H, I, E, K, dtype=torch.float32, bias=True, device=device)
    plan = dispatch(made["topk_ids"], E)
    return made | {
        "plan": plan[:3],
        "slot_index": plan[0],
        "token_slot": plan[1],
        "expert_offsets": plan[2],
        "logits": normal(T, E, dtype=torch.float32, device=device),
        "rows": normal(T * K, H, dtype=torch.float32, device=device),
        "weight": normal(E, I, H, dtype=torch.float32, device=device),
    }


def f(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def route(b, **k):
    return ops.route(k.pop("logits", b["logits"]), k.pop("top_k", K), **k)


def do_dispatch(b, **k):
    return ops.dispatch(k.pop("topk_ids", b["topk_ids"]), k.pop("num_experts", E), **k)


def experts(b, **k):
    names = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "slot_index", "token_slot", "expert_offsets")
    return ops.experts(*[k.pop(n, b[n]) for n in names], **k)


def grouped(b, **k):
    return ops.grouped_linear(*[k.pop(n, b[n]) for n in ("rows", "weight", "expert_offsets")], k.pop("bias", None))


def combine(b, **k):
    return ops.combine(
        *[k.pop(n, b[n]) for n in ("rows", "topk_weights", "slot_index", "token_slot", "expert_offsets")]
    )


def gather(b, **k):
    return ops.gather(*[k.pop(n, b[n]) for n in ("hidden_states", "slot_index", "token_slot", "expert_offsets")])


def router_logits(b, **k):
    return ops.router_logits(
        *[k.get(n, d) for n, d in (("hidden_states", b["hidden_states"]), ("weight", f(E, H)), ("bias", None))]
    )


V, TYPE = ValueError, TypeError
# operator, changed arguments, exception, and words that must occur: argument, expected, found
CASES = {
    # router_logits
    "logits_hidden_1d": (router_logits, {"hidden_states": f(H)}, V, ("hidden_states", "[T, H]", "[6]")),
    "logits_weight_wrong_h": (router_logits, {"weight": f(E, H + 1)}, V, ("weight", "[E, H]", "6", "[5, 7]")),
    "logits_bias_wrong_e": (router_logits, {"bias": f(E + 1)}, V, ("bias", "[E]", "5", "[6]")),
    "logits_int_hidden": (router_logits, {"hidden_states": f(T, H, dtype=torch.int64)}, TYPE, ("hidden_states", "float32", "Long")),
    "logits_bool_weight": (router_logits, {"weight": f(E, H, dtype=torch.bool)}, TYPE, ("weight", "float32", "Bool")),
    "logits_complex_bias": (router_logits, {"bias": f(E, dtype=torch.complex64)}, TYPE, ("bias", "float32", "Complex")),
    "logits_weight_on_meta": (router_logits, {"weight": f(E, H, device="meta")}, V, ("weight", "hidden_states", "cpu", "meta")),
    # route
    "route_k_above_e": (route, {"top_k": E + 1}, V, ("top_k", "1", "5", "6")),
    "route_k_zero": (route, {"top_k": 0}, V, ("top_k", "1", "0")),
    "route_k_negative": (route, {"top_k": -3}, V, ("top_k", "1", "-3")),
    "route_logits_3d": (route, {"logits": f(2, T, E)}, V, ("logits", "[T, E]", "[2, 7, 5]")),
    "route_logits_int": (route, {"logits": f(T, E, dtype=torch.int32)}, TYPE, ("logits", "float32", "Int")),
    "route_no_experts": (route, {"logits": f(T, 0), "top_k": 0}, V, ("number of experts", "1", "0")),
    "route_too_many_experts": (route, {"logits": f(2, 1025)}, V, ("number of experts", "1024", "1025")),
    "route_score_function": (route, {"score_function": "Softmax"}, V, ("score_function", "'softmax'", "'Softmax'")),
    "route_group_score": (route, {"group_score": "sum"}, V, ("group_score", "'max'", "'sum'")),
    "route_groups_do_not_divide": (route, {"num_groups": 2}, V, ("num_groups", "5", "2")),
    "route_groups_zero": (route, {"num_groups": 0}, V, ("num_groups", "5", "0")),
    "route_topk_groups_above": (route, {"num_groups": 5, "topk_groups": 6}, V, ("topk_groups", "5", "6")),
    "route_topk_groups_zero": (route, {"num_groups": 5, "topk_groups": 0}, V, ("topk_groups", "1", "0")),
    "route_groups_too_few": (route, {"num_groups": 5, "topk_groups": 1}, V, ("topk_groups", "top_k", "2")),
    "route_epsilon": (route, {"renormalize_epsilon": -1.0}, V, ("renormalize_epsilon", "negative", "-1")),
    "route_scaling_nan": (route, {"scaling_factor": float("nan")}, V, ("scaling_factor", "number", "NaN")),
    "route_bias_shape": (route, {"expert_bias": f(E - 1)}, V, ("expert_bias", "[E]", "5", "[4]")),
    "route_bias_int": (route, {"expert_bias": f(E, dtype=torch.int64)}, TYPE, ("expert_bias", "float32", "Long")),
    "route_selection_shape": (route, {"selection_scores": f(T, E + 1)}, V, ("selection_scores", "[T, E]", "5", "[7, 6]")),
    "route_selection_on_meta": (route, {"selection_scores": f(T, E, device="meta")}, V, ("selection_scores", "cpu", "meta")),
    "route_replay_shape": (route, {"topk_ids": f(T, K + 1, dtype=torch.int64)}, V, ("topk_ids", "[T, K]", "2", "[7, 3]")),
    "route_replay_rows": (route, {"topk_ids": f(T + 1, K, dtype=torch.int64)}, V, ("topk_ids", "[T, K]", "7", "[8, 2]")),
    "route_replay_float": (route, {"topk_ids": f(T, K)}, TYPE, ("topk_ids", "int64", "Float")),
    "sinkhorn_1d": (lambda b: ops.sinkhorn(f(E)), {}, V, ("logits", "[T, E]", "[5]")),
    "sinkhorn_iterations": (lambda b: ops.sinkhorn(f(T, E), -1), {}, V, ("iterations", "negative", "-1")),
    "sinkhorn_tolerance": (lambda b: ops.sinkhorn(f(T, E), 0, 0.0), {}, V, ("tolerance", "positive", "0")),
    # dispatch
    "dispatch_ids_1d": (do_dispatch, {"topk_ids": f(T, dtype=torch.int64)}, V, ("topk_ids", "[T, K]", "[7]")),
    "dispatch_ids_float": (do_dispatch, {"topk_ids": f(T, K)}, TYPE, ("topk_ids", "int64", "Float")),
    "dispatch_ids_int16": (do_dispatch, {"topk_ids": f(T, K, dtype=torch.int16)}, TYPE, ("topk_ids", "int64", "Short")),
    "dispatch_no_experts": (do_dispatch, {"num_experts": 0}, V, ("num_experts", "1", "1024", "0")),
    "dispatch_too_many_experts": (do_dispatch, {"num_experts": 1025}, V, ("num_experts", "1024", "1025")),
    "dispatch_too_many_pairs": (do_dispatch, {"topk_ids": f(1, 1, dtype=torch.int64).expand(2**30, 2)}, V, ("topk_ids", "2^31 - 1", "[1073741824, 2]")),
    "dispatch_capacity": (do_dispatch, {"capacity": -1}, V, ("capacity", "0", "-1")),
    "dispatch_policy": (do_dispatch, {"drop_policy": "random"}, V, ("drop_policy", "'position'", "'random'")),
    "dispatch_probs_without_weights": (do_dispatch, {"capacity": 1, "drop_policy": "probs"}, V, ("drop_policy", "topk_weights", "None")),
    "dispatch_weights_shape": (do_dispatch, {"topk_weights": f(T, K + 1)}, V, ("topk_weights", "[T, K]", "[7, 3]")),
    "dispatch_weights_int": (do_dispatch, {"topk_weights": f(T, K, dtype=torch.int64)}, TYPE, ("topk_weights", "float32", "Long")),
    "dispatch_padding_shape": (do_dispatch, {"padding_mask": f(T - 1, dtype=torch.bool)}, V, ("padding_mask", "[T]", "7", "[6]")),
    "dispatch_padding_int": (do_dispatch, {"padding_mask": f(T, dtype=torch.int64)}, TYPE, ("padding_mask", "Bool", "Long")),
    "dispatch_padding_on_meta": (do_dispatch, {"padding_mask": f(T, dtype=torch.bool, device="meta")}, V, ("padding_mask", "cpu", "meta")),
    # gather and combine
    "gather_rows": (gather, {"hidden_states": f(T + 1, H)}, V, ("token_slot", "[T, K]", "8", "[7, 2]")),
    "gather_slot_index_int64": (gather, {"slot_index": f(T * K, dtype=torch.int64)}, TYPE, ("slot_index", "Int", "Long")),
    "gather_slot_index_long": (gather, {"slot_index": f(T * K + 1, dtype=torch.int32)}, V, ("slot_index", "T * K = 14", "15")),
    "gather_offsets_empty": (gather, {"expert_offsets": f(0, dtype=torch.int32)}, V, ("number of experts", "expert_offsets", "at least 1", "-1")),
    "gather_offsets_2d": (gather, {"expert_offsets": f(1, E + 1, dtype=torch.int32)}, V, ("expert_offsets", "[E + 1]", "[1, 6]")),
    "gather_backward_rows": (lambda b: ops.gather_backward(f(T * K + 1, H), b["token_slot"]), {}, V, ("grad_rows", "T * K = 14", "15")),
    "combine_rows": (combine, {"rows": f(T * K - 1, H)}, V, ("rows", "[P, H]", "14", "[13, 6]")),
    "combine_weights_bf16": (combine, {"topk_weights": f(T, K, dtype=torch.bfloat16)}, TYPE, ("topk_weights", "Float", "BFloat16")),
    "combine_weights_shape": (combine, {"topk_weights": f(T, 1)}, V, ("topk_weights", "[T, K]", "[7, 1]")),
    "combine_rows_int": (combine, {"rows": f(T * K, H, dtype=torch.int64)}, TYPE, ("rows", "float32", "Long")),
    # experts
    "experts_hidden_3d": (experts, {"hidden_states": f(1, T, H)}, V, ("hidden_states", "[T, H]", "[1, 7, 6]")),
    "experts_hidden_int": (experts, {"hidden_states": f(T, H, dtype=torch.int64)}, TYPE, ("hidden_states", "float32", "Long")),
    "experts_gate_up_wrong_h": (experts, {"gate_up_proj": f(E, 2 * I, H - 1)}, V, ("gate_up_proj", "[E, 2 * I, H]", "6", "[5, 8, 5]")),
    "experts_gate_up_odd": (experts, {"gate_up_proj": f(E, 2 * I + 1, H)}, V, ("gate_up_proj", "[E, 2 * I, H]", "8", "[5, 9, 6]")),
    "experts_gate_up_transposed": (experts, {"gate_up_proj": f(E, H, 2 * I)}, V, ("gate_up_proj", "[E, 2 * I, H]", "[5, 6, 8]")),
    "experts_ungated_shape": (experts, {"activation": "relu2"}, V, ("gate_up_proj", "[E, I, H]", "4", "[5, 8, 6]")),
    "experts_gate_up_2d": (experts, {"gate_up_proj": f(2 * I, H)}, V, ("gate_up_proj", "[E, 2 * I, H]", "[8, 6]")),
    "experts_down_wrong_e": (experts, {"down_proj": f(E - 1, H, I)}, V, ("down_proj", "[E, H, I]", "5", "[4, 6, 4]")),
    "experts_down_wrong_h": (experts, {"down_proj": f(E, H + 2, I)}, V, ("down_proj", "[E, H, I]", "6", "[5, 8, 4]")),
    "experts_weights_dtype": (experts, {"down_proj": f(E, H, I, dtype=torch.bfloat16)}, TYPE, ("down_proj", "Float", "autocast", "BFloat16")),
    "experts_weights_on_meta": (experts, {"gate_up_proj": f(E, 2 * I, H, device="meta")}, V, ("gate_up_proj", "cpu", "meta")),
    "experts_bias_shape": (experts, {"gate_up_bias": f(E, 2 * I - 1)}, V, ("gate_up_bias", "[E, 2 * I]", "8", "[5, 7]")),
    "experts_down_bias_shape": (experts, {"down_bias": f(E, I)}, V, ("down_bias", "[E, H]", "6", "[5, 4]")),
    "experts_bias_dtype": (experts, {"down_bias": f(E, H, dtype=torch.float64)}, TYPE, ("down_bias", "Float", "Double")),
    "experts_weights_rows": (experts, {"topk_weights": f(T + 1, K)}, V, ("topk_weights", "[T, K]", "7", "[8, 2]")),
    "experts_offsets_of_other_e": (experts, {"expert_offsets": f(E, dtype=torch.int32)}, V, ("expert_offsets", "[E + 1]", "6", "[5]")),
    "experts_plan_of_other_t": (experts, {"token_slot": f(T + 1, K, dtype=torch.int32)}, V, ("token_slot", "[T, K]", "7", "[8, 2]")),
    "experts_token_slot_int64": (experts, {"token_slot": f(T, K, dtype=torch.int64)}, TYPE, ("token_slot", "Int", "Long")),
    "experts_activation": (experts, {"activation": "swish"}, V, ("activation", "'swiglu'", "'swish'")),
    "experts_no_hidden": (experts, {"hidden_states": f(T, 0), "gate_up_proj": f(E, 2 * I, 0), "down_proj": f(E, 0, I)}, V, ("hidden size", "at least 1", "0")),
    "experts_no_intermediate": (experts, {"gate_up_proj": f(E, 0, H), "down_proj": f(E, H, 0)}, V, ("intermediate size", "at least 1", "0")),
    "experts_plan_strided": (experts, {"token_slot": f(T, 2 * K, dtype=torch.int32)[:, ::2]}, V, ("token_slot", "contiguous", "strides")),
    # grouped_linear
    "grouped_rows_1d": (grouped, {"rows": f(H)}, V, ("rows", "[S, in]", "[6]")),
    "grouped_weight_in": (grouped, {"weight": f(E, I, H + 1)}, V, ("weight", "[E, out, in]", "6", "[5, 4, 7]")),
    "grouped_weight_dtype": (grouped, {"weight": f(E, I, H, dtype=torch.float16)}, TYPE, ("weight", "Float", "Half")),
    "grouped_offsets_count": (grouped, {"expert_offsets": f(E, dtype=torch.int32)}, V, ("expert_offsets", "[E + 1]", "6", "[5]")),
    "grouped_offsets_int64": (grouped, {"expert_offsets": f(E + 1, dtype=torch.int64)}, TYPE, ("expert_offsets", "Int", "Long")),
    "grouped_bias": (grouped, {"bias": f(E, I + 1)}, V, ("bias", "[E, out]", "4", "[5, 5]")),
    # losses
    "counts_2d": (lambda b: ops.expert_counts(b["topk_ids"], E), {}, V, ("topk_ids", "[S, L, K]", "[7, 2]")),
    "counts_experts": (lambda b: ops.expert_counts(b["topk_ids"][None], 0), {}, V, ("num_experts", "1", "0")),
    "counts_padding": (lambda b: ops.expert_counts(b["topk_ids"][None], E, f(T, dtype=torch.bool)), {}, V, ("padding_mask", "[S, L]", "[7]")),
    "balance_scores_2d": (lambda b: ops.balance_loss(f(T, E), f(1, E), 1.0), {}, V, ("scores", "[S, L, E]", "[7, 5]")),
    "balance_counts": (lambda b: ops.balance_loss(f(2, T, E), f(1, E), 1.0), {}, V, ("tokens_per_expert", "[S, E]", "2", "[1, 5]")),
    "balance_counts_bool": (lambda b: ops.balance_loss(f(1, T, E), f(1, E, dtype=torch.bool), 1.0), {}, TYPE, ("tokens_per_expert", "int64", "Bool")),
    "z_loss_padding": (lambda b: ops.z_loss(f(T, E), 1.0, f(T, E, dtype=torch.bool)), {}, V, ("padding_mask", "[T]", "[7, 5]")),
    "z_loss_3d": (lambda b: ops.z_loss(f(1, T, E)), {}, V, ("logits", "[T, E]", "[1, 7, 5]")),
    "bias_update_bf16": (lambda b: ops.update_expert_bias(f(E, dtype=torch.bfloat16), f(E), 1.0), {}, TYPE, ("expert_bias", "float32", "BFloat16")),
    "bias_update_shape": (lambda b: ops.update_expert_bias(f(E), f(E + 1), 1.0), {}, V, ("tokens_per_expert", "[E]", "5", "[6]")),
}  # fmt: skip


def one_sentence(error, words):
    text = str(error)
    assert "\n" not in text and len(text) < 400, text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


@pytest.mark.parametrize("name", CASES)
def test_bad_argument(name):
    function, changed, kind, words = CASES[name]
    with pytest.raises(kind) as caught:
        function(base(), **changed)
    assert type(caught.value) is kind
    one_sentence(caught.value, words)


@pytest.mark.parametrize("name", CASES)
def test_bad_argument_on_meta_is_the_same_sentence(name):
    """What torch.compile sees while it traces. Cases about a mix of devices have no twin."""
    function, changed, kind, words = CASES[name]
    if name.endswith("_on_meta"):
        pytest.skip("already a mix of devices")
    if "lambda" in function.__qualname__:
        pytest.skip("makes its own tensors")
    b = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in base().items()}
    moved = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in changed.items()}
    if name == "experts_plan_strided":
        moved = {"token_slot": f(T, 2 * K, dtype=torch.int32, device="meta")[:, ::2]}
    if function is router_logits:
        b["hidden_states"] = moved.setdefault("hidden_states", b["hidden_states"])
        moved.setdefault("weight", f(E, H, device="meta"))
    with pytest.raises(kind) as caught:
        function(b, **moved)
    one_sentence(caught.value, words)


@pytest.mark.parametrize("bad", [E, E + 1, 2**31 - 1, -2, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_range(bad, dtype):
    """The CPU names the id and the token; -1 alone means dropped."""
    ids = torch.zeros(T, K, dtype=dtype)
    ids[3, 1] = bad
    logits = normal(T, E, dtype=torch.float32)
    for function in (
        lambda: ops.dispatch(ids, E),
        lambda: ops.expert_counts(ids[None], E),
        lambda: ops.route(logits, K, topk_ids=ids),
        lambda: ops.route_backward(f(T, K), None, logits, ids, "softmax", False, True, 0.0, 1.0),
    ):
        with pytest.raises(ValueError) as caught:
            function()
        one_sentence(caught.value, ("topk_ids", "-1", str(E - 1), str(bad)))


def test_ids_beyond_32_bits():
    ids = torch.zeros(T, K, dtype=torch.int64)
    ids[0, 0] = 2**32  # 0 where somebody narrows it first
    with pytest.raises(ValueError, match=f"^topk_ids .* {2**32}"):
        ops.dispatch(ids, E)


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - {"outside_backward"}))
def test_none_for_a_tensor(name):
    """None is not a value: the argument's own name says so, where torch gets as far as calling the operator."""
    call = calls(name)[0]
    for position, schema in enumerate(getattr(ops, name).default._schema.arguments[: len(call.args)]):
        if str(schema.type) != "Tensor":
            continue
        args = [*call.args]
        args[position] = None
        if not any(torch.is_tensor(a) for a in [*args, *call.kwargs.values()]):
            # no tensor is left to choose a kernel by: torch's dispatcher refuses, by the operator's name
            with pytest.raises(NotImplementedError, match=f"no tensor arguments to this function.*fastmoe_cpp::{name}"):
                getattr(ops, name)(*args, **call.kwargs)
            continue
        with pytest.raises(ValueError) as caught:
            getattr(ops, name)(*args, **call.kwargs)
        one_sentence(caught.value, (f"{schema.name} must be a tensor, got None",))


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_any_tensor_on_another_device(name):
    """Each tensor argument in turn on meta while the others are on the CPU: a sentence, never a crash or a result."""
    for call in calls(name):
        positions = [i for i, v in enumerate(call.args) if torch.is_tensor(v)]
        if len(positions) < 2:
            continue
        for i in positions[1:]:
            args = [*call.args]
            args[i] = args[i].to("meta")
            with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as caught:
                getattr(ops, name)(*args, **call.kwargs)
            assert "meta" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - {"outside_backward"}))
def test_any_argument_with_another_number_of_dimensions(name):
    """Each tensor with one axis too many and one too few."""
    for call in calls(name):
        for i, value in enumerate(call.args):
            if not torch.is_tensor(value):
                continue
            for wrong in (value[None], *([value[0]] if value.dim() else [])):
                args = [*call.args]
                args[i] = wrong
                with pytest.raises(ValueError) as caught:
                    getattr(ops, name)(*args, **call.kwargs)
                one_sentence(caught.value, (" must have shape ",))


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - {"outside_backward", "expert_counts", "dispatch", "sinkhorn"}))
def test_narrow_types_nobody_supports(name):
    for call in calls(name):
        for i, value in enumerate(call.args):
            if torch.is_tensor(value) and value.is_floating_point():
                args = [*call.args]
                args[i] = value.to(torch.float8_e4m3fn)
                # converted like any other floating type
                if name in ("route_backward", "router_logits_backward") and i < 2 or name == "experts" and i == 3:
                    continue
                with pytest.raises(TypeError) as caught:
                    getattr(ops, name)(*args, **call.kwargs)
                one_sentence(caught.value, ("Float8",))


@pytest.mark.parametrize("seed", range(40))
def test_garbage_plans_cannot_crash(seed):
    """A plan of random numbers: a sentence, or a result of the right shape; never memory that isn't ours."""
    g = torch.Generator().manual_seed(seed)
    b = base()

    def noise(t, low, high):
        out = t.clone()
        hit = torch.rand(t.shape, generator=g) < 0.2
        out[hit] = torch.randint(low, high, t.shape, generator=g, dtype=t.dtype)[hit]
        return out

    wild = seed % 2
    low, high = (-(2**31), 2**31 - 1) if wild else (-2, T * K + 2)
    which = seed % 5
    plan = [noise(t, low, high) if which in (i, 3) else t for i, t in enumerate(b["plan"])]
    if which == 4:
        plan[2] = plan[2].flip(0).contiguous()
    grad = normal(T, H, dtype=torch.float32)
    for shape, function in (
        ((T * K, H), lambda: ops.gather(b["hidden_states"], *plan)),
        ((T, H), lambda: ops.combine(b["rows"], b["topk_weights"], *plan)),
        ((T, H), lambda: ops.gather_backward(b["rows"], plan[1])),
        ((T * K, I), lambda: ops.grouped_linear(b["rows"], b["weight"], plan[2])),
        ((T * K, H), lambda: ops.grouped_linear_backward(b["rows"][:, :I], b["rows"], b["weight"], plan[2], [True] * 3)[0]),
        ((T * K, H), lambda: ops.combine_backward(grad, b["rows"], b["topk_weights"], *plan, [True, True])[0]),
        ((T, H), lambda: run_experts(b, plan)),
        (
            (T, H),
            lambda: ops.experts_backward(
                grad, b["hidden_states"], b["gate_up_proj"], b["down_proj"], b["topk_weights"], *plan, None, None, None,
                "swiglu", 1.7, 7.0, False, False, [True] * 6,
            )[0],
        ),
    ):  # fmt: skip
        try:
            assert function().shape == shape
        except ValueError as error:
            one_sentence(error, ("must",))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_with_a_strided_or_expanded_gradient(name, device):
    """sum() hands backward an expanded scalar of stride 0; .T hands it a transposed one."""
    for call in calls(name, device=device, dtype=torch.float64, grad=True):
        inputs = [t for t in (*call.args, *call.kwargs.values()) if torch.is_tensor(t) and t.requires_grad]
        result = run(name, call)
        out = result if torch.is_tensor(result) else result[0]
        dense = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True, allow_unused=True)
        expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True, allow_unused=True)
        for a, b in zip(dense, expanded, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        if out.dim() == 2:
            g = normal(*out.shape, seed=5, device=device)
            plain = torch.autograd.grad(out, inputs, g, retain_graph=True, allow_unused=True)
            turned = torch.autograd.grad(out, inputs, g.T.contiguous().T, allow_unused=True)
            for a, b in zip(plain, turned, strict=True):
                assert a is None or torch.equal(a, b)


def test_a_setting_is_refused_and_not_ignored():
    """interleaved means nothing without a gate; an unknown keyword is no argument."""
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        ops.route(f(T, E), 2, renormalise=True)
    s = Setting()
    with pytest.raises((RuntimeError, TypeError)):
        ops.dispatch(s.ids, E, capcity=3)
