#include "symmetric.h"

#include <torch/library.h>

#include "checking.h"

namespace fastmoe_cpp::symmetric {
using namespace checking;

int64_t weight_bytes(at::ScalarType type) { return type == at::kDouble ? 8 : 4; }

Space space_of(const Tensor& peers, at::IntArrayRef space) {
  TORCH_CHECK_VALUE(peers.dim() == 1 && peers.scalar_type() == at::kLong && peers.is_contiguous() &&
                        peers.size(0) >= 1 && peers.size(0) <= kMaxRanks,
                    "peers must be [W] int64, contiguous, with W between 1 and ", kMaxRanks, ", got ",
                    peers.scalar_type(), " ", peers.sizes());
  TORCH_CHECK_VALUE(space.size() == 6, "space must hold 6 integers, got ", space.size());
  const Space s{static_cast<int>(space[0]),
                static_cast<int>(peers.size(0)),
                static_cast<int>(space[1]),
                static_cast<int>(space[2]),
                space[3],
                space[4],
                space[5]};
  TORCH_CHECK_VALUE(0 <= s.rank && s.rank < s.ranks && s.top_k >= 1 && s.each >= 1 && s.max_tokens >= 0 &&
                        s.half_bytes >= 0 && s.half_bytes % 128 == 0 && s.timeout_ms > 0,
                    "space must be rank, K, experts a rank, tokens, bytes (a multiple of 128), milliseconds, got ",
                    space);
  return s;
}

namespace {

void ints(const Arg& a, int64_t n, const char* contract, const Arg& like) {
  dims(a, n, contract);
  dtype_is(a, at::kInt, "as dispatch returns it");
  same_device(a, like);
  TORCH_CHECK_VALUE(a.t.is_contiguous(), a.name, " must be contiguous, got strides ", a.t.strides());
}

void choices(const OptionalTensor& weights, int64_t rows, const Space& space, const Arg& x) {
  if (!has(weights)) return;
  const Arg w{*weights, "weights"};
  dims(w, 2, "[rows, K]");
  size_is(w, 0, rows, "[rows, K]");
  size_is(w, 1, space.top_k, "[rows, K]");
  dtype_is(w, accumulate_type(x.t.scalar_type()), "what sums are kept in");
  same_device(w, x);
}

void fits(int64_t bytes, const Space& space, const Arg& x) {
  TORCH_CHECK_VALUE(bytes <= space.half_bytes, x.name, " must fit the workspace, which was made for rows of ",
                    "fewer bytes: ", bytes, " are needed, there are ", space.half_bytes);
}

}  // namespace

void check_pull(const Space& space, const Tensor& x_, const OptionalTensor& weights, const OptionalTensor& ids,
                const Tensor& slot_index, const Tensor& offsets, const Tensor& pairs, const Tensor& peers) {
  const Arg x{x_, "x"};
  dims(x, 2, "[T, H]");
  floating(x);
  same_device({peers, "peers"}, x);
  TORCH_CHECK_VALUE(x_.size(0) <= space.max_tokens, "a call must have at most max_tokens = ", space.max_tokens,
                    " tokens on every rank, got ", x_.size(0));
  TORCH_CHECK_VALUE(has(weights) == has(ids), "weights and ids must be given together");
  choices(weights, x_.size(0), space, x);
  if (has(ids)) {
    ints({*ids, "ids"}, 2, "[T, K]", x);
    size_is({*ids, "ids"}, 0, x_.size(0), "[T, K]");
    size_is({*ids, "ids"}, 1, space.top_k, "[T, K]");
  }
  ints({slot_index, "slot_index"}, 1, "[S]", x);
  TORCH_CHECK_VALUE(slot_index.size(0) <= x_.size(0) * space.ranks_a_token(),
                    "slot_index must have at most T * J = ", x_.size(0) * space.ranks_a_token(), " slots, got ",
                    slot_index.size(0));
  for (const Arg& a : {Arg{offsets, "offsets"}, Arg{pairs, "pairs"}}) ints(a, 1, "[W + 1] and [W]", x);
  size_is({offsets, "offsets"}, 0, space.ranks + 1, "[W + 1]");
  size_is({pairs, "pairs"}, 0, space.ranks, "[W]");
  fits(space.pull_bytes(x_.size(1) * x_.element_size(), weight_bytes(x_.scalar_type())), space, x);
}

void check_push(const Space& space, const Tensor& rows, const OptionalTensor& weights, const Tensor& layout,
                const Tensor& token_slot, const Tensor& peers) {
  const Arg r{rows, "rows"};
  dims(r, 2, "[R, H]");
  floating(r);
  same_device({peers, "peers"}, r);
  choices(weights, rows.size(0), space, r);
  ints({layout, "layout"}, 1, "[2 * W + 2]", r);
  size_is({layout, "layout"}, 0, layout_size(space.ranks), "[2 * W + 2]");
  ints({token_slot, "token_slot"}, 2, "[T, J]", r);
  size_is({token_slot, "token_slot"}, 1, space.ranks_a_token(), "[T, J]");
  TORCH_CHECK_VALUE(token_slot.size(0) <= space.max_tokens, "token_slot must have at most ", space.max_tokens,
                    " tokens, got ", token_slot.size(0));
  fits(space.push_bytes(rows.size(1) * rows.element_size(), weight_bytes(rows.scalar_type())), space, r);
}

void check_token_ranks(const Tensor& token_slot, const Tensor& expert_offsets, int64_t each, int64_t ranks) {
  const Arg slots{token_slot, "token_slot"};
  ints(slots, 2, "[T, K]", slots);
  ints({expert_offsets, "expert_offsets"}, 1, "[E + 1]", slots);
  TORCH_CHECK_VALUE(each >= 1 && 1 <= ranks && ranks <= kMaxExperts, "ranks must be between 1 and ", kMaxExperts,
                    ", got ", ranks);
  size_is({expert_offsets, "expert_offsets"}, 0, each * ranks + 1, "[E + 1] for `ranks` ranks of `each` experts");
}

}  // namespace fastmoe_cpp::symmetric

TORCH_LIBRARY(fastmoe_cpp_symmetric, m) {
  // a plan's pairs to their experts ids [T, K] (-1: dropped), each token's distinct ranks [T, J], ascending, then -1, and
  // the pairs of each rank [W]; all int32
  m.def("token_ranks(Tensor token_slot, Tensor expert_offsets, int each, int ranks) -> (Tensor, Tensor, Tensor)");
  // raw: one operation of the group, without a gradient. max_rows is the rows' first size; -1 reads the counts on the
  // host and returns on_host [2] int64: rows, pairs. More than max_rows rows end the program with one sentence.
  m.def(
      "pull(Tensor x, Tensor? weights, Tensor? ids, Tensor slot_index, Tensor offsets, Tensor pairs, Tensor peers, "
      "int[] space, str name, int max_rows) -> (Tensor rows, Tensor weights, Tensor ids, Tensor layout, Tensor on_host)");
  m.def(
      "push(Tensor rows, Tensor? weights, Tensor layout, Tensor token_slot, Tensor peers, int[] space, str name) "
      "-> (Tensor sums, Tensor weights)");
  // each the other's gradient: rows of tokens to the ranks that have their experts, and the sum of what comes back
  m.def(
      "dispatch(Tensor x, Tensor weights, Tensor ids, Tensor slot_index, Tensor token_slot, Tensor offsets, Tensor pairs, "
      "Tensor peers, int[] space, str name, int max_rows) "
      "-> (Tensor rows, Tensor weights, Tensor ids, Tensor layout, Tensor on_host)");
  m.def(
      "combine(Tensor rows, Tensor layout, Tensor slot_index, Tensor token_slot, Tensor offsets, Tensor pairs, "
      "Tensor peers, int[] space, str name) -> Tensor");
}
