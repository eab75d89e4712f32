// What the workspaces of symmetric memory hold, for hosts and devices. No torch here.
//
// A workspace is kControlBytes of control words and two halves. Operation number n (counted on the device, so that a CUDA
// graph can be replayed) uses half n % 2 of every rank: who writes for operation n has passed the barrier of n - 1, and
// before that barrier everyone had read what operation n - 2 left. So there is one barrier an operation.
// Control words, 32 bits: at 0 a flag a rank, where it writes the number of the operation whose barrier it has come to; at
// kEpochAt the number of operations of this rank whose barrier is over.
#pragma once
#include <cstdint>

namespace fastmoe_cpp::symmetric {

inline constexpr int64_t kControlBytes = 4096, kEpochAt = 2048, kHeaderBytes = 1024;
inline constexpr int kMaxRanks = 64;
// 32-bit words of a half's header in a pull: the sender's offsets [W + 1], its pairs for each rank [W], bytes of a row
inline constexpr int kPairsAt = kMaxRanks + 1, kRowBytesAt = 2 * kMaxRanks + 1;

constexpr int64_t aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// What the ranks of a group agreed on when the layer was set up, and who this one is. J = min(K, W) rows a token at most.
struct Space {
  int rank, ranks, top_k, each;  // each: experts a rank
  int64_t max_tokens, half_bytes, timeout_ms;
  constexpr int ranks_a_token() const { return top_k < ranks ? top_k : ranks; }

  // A half in a pull: header, slots [max_tokens * J] int32, ids [max_tokens, K] int32, weights [max_tokens, K], rows.
  constexpr int64_t slots_at() const { return kHeaderBytes; }
  constexpr int64_t ids_at() const { return slots_at() + aligned(max_tokens * ranks_a_token() * 4); }
  constexpr int64_t weights_at() const { return ids_at() + aligned(max_tokens * top_k * 4); }
  constexpr int64_t rows_at(int64_t weight_bytes) const {
    return weights_at() + aligned(max_tokens * top_k * weight_bytes);
  }
  constexpr int64_t pull_bytes(int64_t row_bytes, int64_t weight_bytes) const {
    return rows_at(weight_bytes) + max_tokens * row_bytes;
  }
  // A half in a push: rows [max_tokens * J, H], then weights [max_tokens * J, K].
  constexpr int64_t pushed_weights_at(int64_t row_bytes) const {
    return aligned(max_tokens * ranks_a_token() * row_bytes);
  }
  constexpr int64_t push_bytes(int64_t row_bytes, int64_t weight_bytes) const {
    return pushed_weights_at(row_bytes) + max_tokens * ranks_a_token() * top_k * weight_bytes;
  }
};

}  // namespace fastmoe_cpp::symmetric
