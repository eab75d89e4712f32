// Exchange: rows between the ranks of a torch.distributed group, the one collective of expert parallelism.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <string_view>

namespace fastmoe_cpp {

// rows [N, H] -> [sum(recv_counts), H]: send_counts[r] consecutive rows go to rank r of the group registered under
// group_name (one count a rank, with sum N), recv_counts[r] come from it, in rank order. Every rank of the group calls it,
// with no row at all too; the gradient goes the other way in a second collective. `operation` and `caller` are what an
// error calls this exchange and this rank; a failed or timed out collective throws c10::DistBackendError.
at::Tensor exchange(const at::Tensor& rows, c10::SymIntArrayRef send_counts, c10::SymIntArrayRef recv_counts,
                    std::string_view group_name, std::string_view operation = "exchange",
                    std::string_view caller = "this rank");

void check_exchange(const at::Tensor& rows, c10::SymIntArrayRef send_counts, c10::SymIntArrayRef recv_counts);

}  // namespace fastmoe_cpp
