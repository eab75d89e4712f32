"""The breaks: (file, exact text, text that replaces it) and the tests that should notice. The text must occur exactly
once."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


EXPERTS = "tests/ops/test_experts.py"
ROUTER = "tests/ops/test_router.py"
DECODING = "tests/modules/test_decoding.py"
DISPATCH = "tests/ops/test_dispatch.py"
COMBINE = "tests/ops/test_combine.py"
LOSSES = "tests/ops/test_losses.py"
GROUPED = "tests/ops/test_grouped_linear.py"
GRADCHECK = "tests/ops/test_gradcheck.py"
POISON = "tests/ops/test_poison.py"
FRAMEWORKS = "tests/ops/test_frameworks.py"
OVERWRITING = "tests/ops/test_overwriting.py"

CPU = "csrc/cpu/"

MUTANTS = (
    # experts
    Mutant(
        "columns_past_a_vector_are_zero",
        CPU + "combine.cpp",
        "      k.weighted_sum(hidden, count, sources.data(), scales.data(), out + t * hidden);",
        "      k.weighted_sum(hidden, count, sources.data(), scales.data(), out + t * hidden);\n"
        "      if (hidden > 16) std::fill(out + t * hidden + hidden / 16 * 16, out + (t + 1) * hidden, T(0));",
        f"{EXPERTS} -k against_oracle",
    ),
    Mutant(
        "gate_and_up_swapped",
        CPU + "experts.h",
        "      multiply<T, A>(scratch, rows, columns, hidden, a, w.at(0, c0), gate);\n"
        "      if (gated) multiply<T, A>(scratch, rows, columns, hidden, a, w.at(0, inner + c0), up);",
        "      multiply<T, A>(scratch, rows, columns, hidden, a, w.at(0, gated ? inner + c0 : c0), gate);\n"
        "      if (gated) multiply<T, A>(scratch, rows, columns, hidden, a, w.at(0, c0), up);",
        f"{EXPERTS} -k 'forward_op or clamped'",
    ),
    Mutant(
        "last_of_k_experts_dropped",
        CPU + "combine.cpp",
        "      for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {",
        "      for (int64_t i = t * top_k; i < (t + 1) * top_k - (top_k > 1); ++i) {",
        COMBINE,
    ),
    Mutant(
        "an_interleaved_gradient_over_what_is_still_read",
        CPU + "experts_backward.cpp",
        "has(workspace) && !e.interleaved;",
        "has(workspace);",
        OVERWRITING,
    ),
    Mutant(
        "overwrites_in_a_graph_that_is_kept",
        "csrc/autograd/function.cpp",
        "  return !torch::autograd::get_current_graph_task_keep_graph() && !at::isTensorSubclassLike(saved) &&",
        "  return !at::isTensorSubclassLike(saved) &&",
        OVERWRITING,
    ),
    Mutant(
        "overwrites_for_each_of_a_batch_of_gradients",
        "csrc/autograd/experts.cpp",
        "last_use(saved[9], grads[0]);",
        "last_use(saved[9], saved[9]);",
        OVERWRITING,
    ),
    Mutant(
        "overwrites_what_a_hook_saw",
        "csrc/autograd/experts.cpp",
        '    data["own"] = !recompute && saves_for_itself();',
        '    data["own"] = !recompute;',
        OVERWRITING,
    ),
    Mutant(
        "a_failed_backward_is_repeated",
        "csrc/autograd/experts.cpp",
        '    if (overwrites) data["overwritten"] = true;',
        "",
        OVERWRITING,
    ),
    Mutant(
        "weight_gradient_skips_the_last_expert",
        CPU + "experts_backward.cpp",
        "  if (first == last) {",
        "  if (first == last || (expert > 0 && expert == e.plan.experts - 1)) {",
        f"{GRADCHECK} -k experts",
    ),
    Mutant(
        "gradient_of_an_idle_expert_unwritten",
        CPU + "experts_backward.cpp",
        "    if (adds) return;\n"
        "    for (int64_t r = 0; r < m; ++r) std::fill_n(out + r * stride, n, T(0));\n    return;",
        "    return;",
        f"{POISON} -k forward_and_backward",
    ),
    Mutant(
        "long_experts_keep_their_last_rows_only",
        CPU + "experts_backward.cpp",
        "      multiply<T, A>(scratch, m, n, block.rows(), gathered.t(), by_slot, sum, adds || s > first);",
        "      multiply<T, A>(scratch, m, n, block.rows(), gathered.t(), by_slot, sum, false);",
        f"{EXPERTS} -k 'against_oracle or many_rows'",
    ),
    Mutant(
        "buffer_of_the_gate_and_up_gradient_overwritten",
        CPU + "experts_backward.cpp",
        "by_slot, sum.t(), adds || s > first);",
        "by_slot, sum.t(), s > first);",
        "tests/modules/test_main_grad.py -k micro_batches",
    ),
    Mutant(
        "routing_gradient_of_the_last_columns_only",
        CPU + "experts_backward.cpp",
        "          sum = c0 == columns.begin(range) ? product : sum + product;",
        "          sum = product;",
        f"{EXPERTS} -k against_oracle",
    ),
    Mutant(
        "routing_gradient_without_the_down_bias",
        CPU + "experts_backward.cpp",
        "          if (e.down_bias_tensor.defined()) {",
        "          if (false && e.down_bias_tensor.defined()) {",
        f"{GRADCHECK} -k experts",
    ),
    Mutant(
        "down_bias_gradient_without_the_weight",
        CPU + "experts_backward.cpp",
        "e.pack({expert, s, s + 1}, grad_output, 0, e.hidden, !e.weight_on_input, row);",
        "e.pack({expert, s, s + 1}, grad_output, 0, e.hidden, false, row);",
        f"{GRADCHECK} -k experts",
    ),
    Mutant(
        "interleaved_gradients_swapped",
        CPU + "experts_backward.cpp",
        "both[2 * c] = gate[c], both[2 * c + 1] = up[c];",
        "both[2 * c] = up[c], both[2 * c + 1] = gate[c];",
        f"{GRADCHECK} -k experts",
    ),
    Mutant(
        "input_gradient_without_the_weight_on_input",
        CPU + "experts_backward.cpp",
        "                      weight_on_input ? e.routing_weights.template const_data_ptr<A>() : nullptr,",
        "                      static_cast<const A*>(nullptr),",
        f"{GRADCHECK} -k experts",
    ),
    Mutant(
        "recomputed_pre_activation_not_rounded",
        CPU + "experts_backward.cpp",
        "            e.loops.store(2 * width, g, kept);\n"
        "            e.loops.load(width, kept, A(1), gate);\n"
        "            e.loops.load(width, kept + width, A(1), up);\n"
        "            g = gate, u = up;",
        "            (void)kept;",
        f"{EXPERTS} -k recompute",
    ),
    Mutant(
        "clamped_entries_still_get_a_gradient",
        CPU + "vector/kernels_impl.h",
        "gate_clamped ? zero : grad * shifted * c.slope",
        "grad * shifted * c.slope",
        f"{EXPERTS} {GRADCHECK} -k 'corners or clamped'",
    ),
    Mutant(
        "no_gradient_exactly_at_the_limit",
        CPU + "vector/kernels_impl.h",
        "gate_clamped = gate > limit, up_high = up > limit",
        "gate_clamped = gate >= limit, up_high = up >= limit",
        f"{EXPERTS} -k corners",
    ),
    Mutant(
        "relu2_slope_halved",
        CPU + "vector/kernels_impl.h",
        "    return {r * r, A(2) * r};",
        "    return {r * r, r};",
        f"{GRADCHECK} -k relu2",
    ),
    Mutant(
        "gelu_by_tanh",
        CPU + "vector/kernels_impl.h",
        "    return {x * cdf, cdf + A(0.39894228040143267794) * x * e};",
        "    const V<A> s = sigmoid<A>(A(1.702) * x);\n    return {x * s, cdf + A(0.39894228040143267794) * x * e};",
        f"{EXPERTS} -k corners",
    ),
    Mutant(
        "bfloat16_rounds_toward_zero",
        CPU + "vector/kernels_impl.h",
        "    const VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;",
        "    const VU rounded = u >> 16;",
        f"{COMBINE} {EXPERTS} -k bfloat16",
    ),
    # router
    Mutant(
        "renormalisation_ignores_epsilon",
        CPU + "router.cpp",
        "          if (any) divisor = sum + static_cast<A>(renormalize_epsilon);",
        "          if (any) divisor = sum;",
        f"{ROUTER} -k test_route",
    ),
    Mutant(
        "ties_to_the_higher_id",
        CPU + "router.cpp",
        "      for (; at > 0 && ranks_[order_[at - 1]] < rank; --at)",
        "      for (; at > 0 && ranks_[order_[at - 1]] <= rank; --at)",
        "tests/regressions/test_router_and_indices.py -k ties",
    ),
    Mutant(
        "nan_ranks_first",
        CPU + "router.cpp",
        "  if (key != key) return std::numeric_limits<I>::min();",
        "  if (key != key) return std::numeric_limits<I>::max();",
        f"{ROUTER} -k nan",
    ),
    Mutant(
        "expert_bias_leaks_into_the_weights",
        CPU + "router.cpp",
        "        else\n          for (int64_t k = 0; k < top_k; ++k)"
        " w[k] = id[k] >= 0 ? y[id[k]] : A(0);\n        A divisor",
        "        else\n          for (int64_t k = 0; k < top_k; ++k)\n"
        "            w[k] = id[k] >= 0 ? y[id[k]] + (b ? b[id[k]] : A(0)) : A(0);\n        A divisor",
        f"{ROUTER} -k test_route",
    ),
    Mutant(
        "scaling_lost_in_backward",
        CPU + "router.cpp",
        "static_cast<A>(scaling_factor) * (gw[t * top_k + k] - inner) / total",
        "(gw[t * top_k + k] - inner) / total",
        f"{GRADCHECK} -k route",
    ),
    Mutant(
        "group_worth_is_its_best_expert_only",
        CPU + "router.cpp",
        "group_score_ == GroupScore::Max || size == 1 ? best : best + second;",
        "best;",
        f"{ROUTER} -k 'test_route or groups'",
    ),
    Mutant(
        "replayed_minus_one_counts_in_the_softmax",
        CPU + "router.cpp",
        "    if (ids[k] >= 0) kept[n++] = logits[ids[k]];\n  score(f, n, kept, kept);",
        "    kept[n++] = logits[ids[k] >= 0 ? ids[k] : 0];\n  score(f, n, kept, kept);",
        f"{ROUTER} {GRADCHECK} -k route",
    ),
    Mutant(
        "sinkhorn_scales_rows_by_the_wrong_count",
        CPU + "router.cpp",
        "          row_scale[t] = A(1) / (A(tokens) *",
        "          row_scale[t] = A(1) / (A(experts) *",
        f"{ROUTER} -k sinkhorn",
    ),
    Mutant(
        "a_patched_router_is_passed_by",
        "fastmoe_cpp/router.py",
        '            and not ("forward" in own or "jitter" in own)',
        '            and "jitter" not in own',
        DECODING,
    ),
    Mutant(
        "a_patched_class_is_passed_by",
        "fastmoe_cpp/router.py",
        "            and (Router.__call__, Router.forward, Router.jitter) == _AS_WRITTEN\n",
        "",
        DECODING,
    ),
    Mutant(
        "routing_without_gradients_is_not_saved",
        "fastmoe_cpp/recompute.py",
        "        torch.ops.fastmoe_cpp.route_and_dispatch.default,\n",
        "",
        DECODING,
    ),
    # dispatch and combine
    Mutant(
        "capacity_off_by_one",
        CPU + "dispatch.cpp",
        "      const int64_t kept = std::min(asked[e], *capacity);",
        "      const int64_t kept = std::min(asked[e], *capacity + 1);",
        f"{DISPATCH} -k test_dispatch",
    ),
    Mutant(
        "probs_policy_keeps_the_lightest",
        CPU + "dispatch.cpp",
        "    return x > y || (!(x < y) && a < b);",
        "    return x < y || (!(x > y) && a < b);",
        f"{DISPATCH} -k test_dispatch",
    ),
    Mutant(
        "probs_policy_breaks_ties_to_the_later_pair",
        CPU + "dispatch.cpp",
        "    return x > y || (!(x < y) && a < b);",
        "    return x > y || (!(x < y) && a > b);",
        f"{DISPATCH} -k test_dispatch",
    ),
    Mutant(
        "gather_leaves_the_tail_unwritten",
        CPU + "dispatch.cpp",
        "      else\n        std::memset(to + s * bytes, 0, bytes);",
        "",
        f"{POISON} -k every_operator",
    ),
    Mutant(
        "combine_takes_the_first_weight_for_all",
        CPU + "combine.cpp",
        "        scales[count++] = weights ? weights[i] : A(1);",
        "        scales[count++] = weights ? weights[t * top_k] : A(1);",
        COMBINE,
    ),
    Mutant(
        "gradient_of_combined_rows_without_the_weight",
        CPU + "combine.cpp",
        "const A scale = served && w ? w[plan.slot_index[s]] : A(1);",
        "const A scale = A(1);",
        f"{COMBINE} {GRADCHECK} -k combine",
    ),
    Mutant(
        "weight_gradient_of_a_dropped_pair_unwritten",
        CPU + "combine.cpp",
        "          out[i] = slot < 0 ? A(0) : k.dot(",
        "          if (slot >= 0) out[i] = k.dot(",
        f"{POISON} -k every_operator",
    ),
    Mutant(
        "grouped_linear_leaves_the_tail_unwritten",
        CPU + "grouped_linear.cpp",
        "  zero_tail<T>(out, groups.served);",
        "",
        f"{GROUPED} {POISON} -k 'every_operator or against_oracle'",
    ),
    # losses
    Mutant(
        "padding_counted",
        CPU + "losses.cpp",
        "        if (skip && skip[t]) continue;\n        for (int64_t i = t * top_k;",
        "        for (int64_t i = t * top_k;",
        f"{LOSSES} -k counts",
    ),
    Mutant(
        "z_loss_gradient_halved",
        CPU + "losses.cpp",
        "count ? 2 * scale * number(grad_loss) / count : 0;",
        "count ? scale * number(grad_loss) / count : 0;",
        f"{GRADCHECK} -k losses",
    ),
    Mutant(
        "expert_bias_moves_with_the_load",
        CPU + "losses.cpp",
        "((mean > count[e]) - (mean < count[e]))",
        "((mean < count[e]) - (mean > count[e]))",
        f"{LOSSES} -k bias",
    ),
    # the op layer
    Mutant(
        "balance_loss_detached",
        "csrc/autograd/losses.cpp",
        "  if (recording({&scores})) return BalanceLoss::apply(",
        "  if (false && recording({&scores})) return BalanceLoss::apply(",
        f"{GRADCHECK} -k losses",
    ),
    Mutant(
        "bias_gradients_asked_for_by_the_wrong_number",
        "csrc/autograd/experts.cpp",
        "{wanted(0), wanted(1), wanted(2), wanted(3), wanted(7), wanted(8)}, to...);",
        "{wanted(0), wanted(1), wanted(2), wanted(3), wanted(8), wanted(7)}, to...);",
        f"{FRAMEWORKS} -k frozen",
    ),
    Mutant(
        "recompute_keeps_the_pre_activation",
        "csrc/autograd/experts.cpp",
        "recompute ? Tensor() : pre_activation",
        "pre_activation",
        f"{FRAMEWORKS} -k keeps",
    ),
    Mutant(
        "meta_shape_of_combine_wrong",
        "csrc/meta/combine.cpp",
        "  return at::empty_symint({token_slot.sym_size(0), rows.sym_size(1)}, rows.options());",
        "  return at::empty_symint(rows.sym_sizes(), rows.options());",
        "tests/ops/test_opcheck.py -k combine",
    ),
    Mutant(
        "top_k_may_exceed_the_experts",
        "csrc/ops/router.cpp",
        "TORCH_CHECK_VALUE(1 <= top_k && top_k <= *e,",
        "TORCH_CHECK_VALUE(1 <= top_k && top_k <= *e + 1,",
        "tests/ops/test_bad_input.py -k route_k",
    ),
    Mutant(
        "autocast_keeps_the_weights_wide",
        "csrc/autocast/autocast.cpp",
        "cast(hidden_states), cast(gate_up_proj), cast(down_proj), topk_weights,",
        "cast(hidden_states), gate_up_proj, down_proj, topk_weights,",
        f"{FRAMEWORKS} -k autocast",
    ),
    # several ranks
    Mutant(
        "exchanged_gradients_go_on_instead_of_back",
        "csrc/autograd/exchange.cpp",
        'data["recv_counts"].toSymIntVector(), data["send_counts"].toSymIntVector(),',
        'data["send_counts"].toSymIntVector(), data["recv_counts"].toSymIntVector(),',
        "tests/distributed/test_exchange.py -k gradients",
    ),
    Mutant(
        "every_part_adds_the_down_bias",
        "fastmoe_cpp/parallel/tensor.py",
        "        return tensor.view_as(tensor) if first else torch.zeros_like(tensor)",
        "        return tensor.view_as(tensor)",
        "tests/distributed/test_tensor_parallel.py -k one_step",
    ),
    Mutant(
        "routing_gradients_of_one_part_alone",
        "fastmoe_cpp/parallel/tensor.py",
        "        return *sums, None\n",
        "        return sums[0], grads[1], None\n",
        "tests/distributed/test_tensor_parallel.py -k one_step",
    ),
    Mutant(
        "up_rows_of_a_part_stored_where_the_next_gate_rows_go",
        "fastmoe_cpp/parallel/stored.py",
        "(half + i) * inner + first, *rest",
        "(half + i) * rows.shape[1] + first, *rest",
        "tests/distributed/test_tensor_checkpoints.py",
    ),
    Mutant(
        "norm_without_the_other_ranks_experts",
        "fastmoe_cpp/parallel/gradients.py",
        "        for group in groups:\n            _all_reduce(part,",
        "        for group in groups[:0]:\n            _all_reduce(part,",
        "tests/distributed/test_expert_parallel.py",
    ),
    Mutant(
        "gradients_summed_not_averaged",
        "fastmoe_cpp/parallel/gradients.py",
        "            flat.div_(group.size())\n",
        "",
        "tests/distributed/test_expert_parallel.py",
    ),
    # FastMoE's interface, checkpoints, Megatron-LM
    Mutant(
        "one_token_above_the_capacity_of_a_gate",
        "fastmoe_cpp/fmoe/gates/utils.py",
        "(place < allowed[expert])",
        "(place <= allowed[expert])",
        "tests/fmoe/test_fmoe_gates.py",
    ),
    Mutant(
        "gshard_loss_counts_second_choices",
        "fastmoe_cpp/fmoe/gates/utils.py",
        "ops.expert_counts(ids[None, :, :1], experts)",
        "ops.expert_counts(ids[None], experts)",
        "tests/fmoe/test_fmoe_gates.py",
    ),
    Mutant(
        "gate_and_up_swapped_in_torchtitan_s_files",
        "fastmoe_cpp/checkpoint/layouts/torchtitan.py",
        '{"gate": "moe.experts.w1", "up": "moe.experts.w3",',
        '{"gate": "moe.experts.w3", "up": "moe.experts.w1",',
        "tests/checkpoint/test_layouts.py -k torchtitan",
    ),
    Mutant(
        "balance_loss_scaled_by_no_micro_batches",
        "megatron_adapters/megatron_lm/schedule.py",
        " / host.num_microbatches()",
        "",
        "tests/adapters/test_megatron_lm.py -k 'stand-in and 2.5'",
    ),
    # the modules
    Mutant(
        "aux_loss_never_reaches_the_router",
        "fastmoe_cpp/losses.py",
        "torch.ones((), dtype=dtype, device=device) * ctx.scale",
        "torch.zeros((), dtype=dtype, device=device) * ctx.scale",
        "tests/regressions/test_gradients_and_losses.py -k aux_loss_alone",
    ),
    Mutant(
        "padding_mask_forgotten_by_the_layer",
        "fastmoe_cpp/moe.py",
        "            padding_mask=padding_mask,\n        )\n        return routing, plan",
        "            padding_mask=None,\n        )\n        return routing, plan",
        "tests/regressions/test_empty_skewed_odd.py -k padding",
    ),
    Mutant(
        "gpt_oss_has_one_limit",
        "fastmoe_cpp/hosts.py",
        'getattr(c, "swiglu_limit", 7.0)',
        "7.0",
        "tests/modules/test_hosts.py -k curve",
    ),
    Mutant(
        "any_choice_is_a_near_tie",
        "examples/text_training.py",
        "        return self.moved <= self.near_ties",
        "        return True",
        "tests/examples/test_train_text.py -k 'differ or near'",
    ),
    Mutant(
        "several_tokens_combined_by_down",
        "csrc/cuda/experts/gemv/config.cpp",
        "shape.tokens == 1 && ",
        "",
        "tests/cpp/test_cpp.py -k gemv",
    ),
    Mutant(
        "matrix_vector_kernels_for_crowded_experts",
        "csrc/cuda/experts/path.cpp",
        "2 * shape.slots() > 3 * int64_t{shape.experts}",
        "shape.slots() > 3 * int64_t{shape.experts}",
        "tests/cpp/test_cpp.py -k gemv",
    ),
)


def check_applies(mutant: Mutant, text: str) -> None:
    """Raises unless the mutant's text occurs exactly once."""
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"mutant {mutant.name}: its text must occur once in {mutant.file}, found {found} times")
    if mutant.old == mutant.new:
        raise ValueError(f"mutant {mutant.name} changes nothing")
