// Symmetric memory of processes on one host: the same steps as on GPUs, over memory that the processes share.
#include "../ops/symmetric.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "combine.h"
#include "memory.h"
#include "types.h"

namespace fastmoe_cpp::cpu {
namespace {

using namespace symmetric;

// The workspaces of one operation of the group.
struct Group {
  Space space;
  const int64_t* peers;
  std::string_view name;
  uint32_t epoch;  // of the operation that is under way

  Group(const Tensor& peers, at::IntArrayRef space, std::string_view name)
      : space(space_of(peers, space)), peers(peers.const_data_ptr<int64_t>()), name(name), epoch(*counter() + 1) {}
  // NOLINTNEXTLINE(performance-no-int-to-ptr): an address is all that is known of another process's memory here
  char* base(int rank) const { return reinterpret_cast<char*>(peers[rank]); }
  uint32_t* counter() const { return reinterpret_cast<uint32_t*>(base(space.rank) + kEpochAt); }
  char* half(int rank) const { return base(rank) + kControlBytes + (epoch & 1) * space.half_bytes; }

  // Everyone's writes before it are seen by everyone after it.
  void barrier() const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(space.timeout_ms);
    for (int r = 0; r < space.ranks; ++r)
      __atomic_store_n(reinterpret_cast<uint32_t*>(base(r)) + space.rank, epoch, __ATOMIC_RELEASE);
    const auto* flags = reinterpret_cast<const uint32_t*>(base(space.rank));
    for (int r = 0; r < space.ranks; ++r)
      while (static_cast<int32_t>(__atomic_load_n(flags + r, __ATOMIC_ACQUIRE) - epoch) < 0) {
        if (std::chrono::steady_clock::now() > end)
          C10_THROW_ERROR(DistBackendError, c10::str(name, " failed on rank ", space.rank, " of ", space.ranks,
                                                     ": rank ", r, " did not come within ", space.timeout_ms, " ms"));
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    *counter() = epoch;
  }
};

void put(char* to, const Tensor& t) {
  if (t.defined()) std::memcpy(to, t.const_data_ptr(), t.nbytes());
}

// The rank that row `row` came from, by the first rows of all ranks' parts.
int source_of(const int32_t* first, int64_t row) {
  int rank = 0;
  while (row >= first[rank + 1]) ++rank;
  return rank;
}

std::tuple<Tensor, Tensor, Tensor> token_ranks(const Tensor& token_slot, const Tensor& expert_offsets, int64_t each,
                                               int64_t ranks) {
  check_token_ranks(token_slot, expert_offsets, each, ranks);
  const int64_t tokens = token_slot.size(0), top_k = token_slot.size(1), most = std::min(top_k, ranks);
  const Tensor ids = at::empty_like(token_slot), to = at::empty({tokens, most}, token_slot.options());
  const Tensor pairs = at::zeros({ranks}, token_slot.options());
  const auto *slots = token_slot.const_data_ptr<int32_t>(), *offsets = expert_offsets.const_data_ptr<int32_t>();
  auto *id = ids.mutable_data_ptr<int32_t>(), *out = to.mutable_data_ptr<int32_t>();
  auto* count = pairs.mutable_data_ptr<int32_t>();
  const int64_t experts = expert_offsets.size(0) - 1;
  for (int64_t t = 0; t < tokens; ++t) {
    int32_t* const first = out + t * most;
    int32_t* last = first;
    for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
      id[i] = -1;
      if (slots[i] < 0) continue;
      TORCH_CHECK_VALUE(slots[i] < offsets[experts], "token_slot must be below ", offsets[experts], ", got ", slots[i]);
      id[i] = static_cast<int32_t>(std::upper_bound(offsets, offsets + experts + 1, slots[i]) - offsets) - 1;
      const auto rank = static_cast<int32_t>(id[i] / each);
      ++count[rank];
      int32_t* const at = std::lower_bound(first, last, rank);
      if (at < last && *at == rank) continue;
      std::copy_backward(at, last, last + 1);
      *at = rank, ++last;
    }
    std::fill(last, first + most, -1);
  }
  return {ids, to, pairs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pull(const Tensor& x_, const OptionalTensor& weights_,
                                                        const OptionalTensor& ids, const Tensor& slot_index,
                                                        const Tensor& offsets, const Tensor& pairs, const Tensor& peers,
                                                        at::IntArrayRef space, std::string_view name,
                                                        int64_t max_rows) {
  const Group g(peers, space, name);
  const Space& s = g.space;
  check_pull(s, x_, weights_, ids, slot_index, offsets, pairs, peers);
  const Tensor x = x_.contiguous(), weights = has(weights_) ? weights_->contiguous() : Tensor();
  const int64_t row_bytes = x.size(1) * x.element_size(), wide = weight_bytes(x.scalar_type());
  char* mine = g.half(s.rank);
  put(mine, offsets);
  put(mine + 4 * kPairsAt, pairs);
  reinterpret_cast<int32_t*>(mine)[kRowBytesAt] = static_cast<int32_t>(row_bytes);
  put(mine + s.slots_at(), slot_index);
  if (has(ids)) put(mine + s.ids_at(), *ids);
  put(mine + s.weights_at(), weights);
  put(mine + s.rows_at(wide), x);
  g.barrier();

  const Tensor layout = at::empty({layout_size(s.ranks)}, offsets.options());
  auto* first = layout.mutable_data_ptr<int32_t>();
  auto* start = first + s.ranks + 1;
  int32_t* here = start + s.ranks;
  first[0] = *here = 0;
  for (int r = 0; r < s.ranks; ++r) {
    const auto* header = reinterpret_cast<const int32_t*>(g.half(r));
    TORCH_CHECK_VALUE(header[kRowBytesAt] == row_bytes, name, ": rows of rank ", r, " have ", header[kRowBytesAt],
                      " bytes, those of rank ", s.rank, " ", row_bytes);
    start[r] = header[s.rank];
    first[r + 1] = first[r] + header[s.rank + 1] - header[s.rank];
    *here += header[kPairsAt + s.rank];
  }
  const int64_t received = first[s.ranks], rows = max_rows < 0 ? received : max_rows;
  TORCH_CHECK_VALUE(received <= rows, name, ": rank ", s.rank, " of ", s.ranks, " gets ", received,
                    " rows, which is more than max_rows = ", rows);
  const bool chosen = weights.defined();
  Tensor out = empty({rows, x.size(1)}, x.options());
  Tensor out_weights = at::zeros({chosen ? rows : 0, s.top_k}, x.options().dtype(accumulate_type(x.scalar_type())));
  Tensor out_ids = at::full({chosen ? rows : 0, s.top_k}, -1, offsets.options());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t r = 0; r < received; ++r) {
    const int source = source_of(first, r);
    const char* from = g.half(source);
    const int64_t slot = start[source] + r - first[source];
    const int64_t token = reinterpret_cast<const int32_t*>(from + s.slots_at())[slot] / s.ranks_a_token();
    std::memcpy(to + r * row_bytes, from + s.rows_at(wide) + token * row_bytes, row_bytes);
    if (!chosen) continue;
    const auto* theirs = reinterpret_cast<const int32_t*>(from + s.ids_at()) + token * s.top_k;
    auto* id = out_ids.mutable_data_ptr<int32_t>() + r * s.top_k;
    auto* weight = static_cast<char*>(out_weights.mutable_data_ptr()) + r * s.top_k * wide;
    for (int k = 0; k < s.top_k; ++k) id[k] = theirs[k] / s.each == s.rank && theirs[k] >= 0 ? theirs[k] % s.each : -1;
    std::memcpy(weight, from + s.weights_at() + token * s.top_k * wide, s.top_k * wide);
  }
  std::memset(to + received * row_bytes, 0, (rows - received) * row_bytes);
  const Tensor on_host = max_rows < 0 ? at::tensor({received, int64_t{*here}}, at::kLong) : at::empty({0}, at::kLong);
  return {out, out_weights, out_ids, layout, on_host};
}

std::tuple<Tensor, Tensor> push(const Tensor& rows_, const OptionalTensor& weights_, const Tensor& layout,
                                const Tensor& token_slot, const Tensor& peers, at::IntArrayRef space,
                                std::string_view name) {
  const Group g(peers, space, name);
  const Space& s = g.space;
  check_push(s, rows_, weights_, layout, token_slot, peers);
  const Tensor rows = rows_.contiguous(), weights = has(weights_) ? weights_->contiguous() : Tensor();
  const int64_t row_bytes = rows.size(1) * rows.element_size(), wide = weight_bytes(rows.scalar_type());
  const int64_t weights_at = s.pushed_weights_at(row_bytes), weights_bytes = s.top_k * wide;
  const auto *first = layout.const_data_ptr<int32_t>(), *start = first + s.ranks + 1;
  TORCH_CHECK_VALUE(first[s.ranks] <= rows.size(0), "layout must have at most ", rows.size(0), " rows, got ",
                    first[s.ranks]);
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  for (int64_t r = 0; r < first[s.ranks]; ++r) {
    const int home = source_of(first, r);
    const int64_t slot = start[home] + r - first[home];
    std::memcpy(g.half(home) + slot * row_bytes, from + r * row_bytes, row_bytes);
    if (weights.defined())
      std::memcpy(g.half(home) + weights_at + slot * weights_bytes,
                  static_cast<const char*>(weights.const_data_ptr()) + r * weights_bytes, weights_bytes);
  }
  g.barrier();
  const int64_t tokens = token_slot.size(0), most = token_slot.size(1);
  Tensor sums = empty({tokens, rows.size(1)}, rows.options());
  Tensor out_weights =
      at::empty({weights.defined() ? tokens : 0, s.top_k}, rows.options().dtype(accumulate_type(rows.scalar_type())));
  const auto* slots = token_slot.const_data_ptr<int32_t>();
  with_floating(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    combine_rows<T>(tokens, most, rows.size(1), reinterpret_cast<const T*>(g.half(s.rank)), slots,
                    static_cast<const A*>(nullptr), sums.mutable_data_ptr<T>());
    if (weights.defined())
      combine_rows<A>(tokens, most, s.top_k, reinterpret_cast<const A*>(g.half(s.rank) + weights_at), slots,
                      static_cast<const A*>(nullptr), out_weights.mutable_data_ptr<A>());
  });
  return {sums, out_weights};
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp_symmetric, CPU, m) {
  m.impl("token_ranks", fastmoe_cpp::cpu::token_ranks);
  m.impl("pull", fastmoe_cpp::cpu::pull);
  m.impl("push", fastmoe_cpp::cpu::push);
}
