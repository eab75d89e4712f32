// Which tiles a product runs with: a pure function of its shape, for the launches, the tests and whoever asks why.
#pragma once
#include <string>

#include "../experts.h"

namespace fastmoe_cpp::cuda::sm90 {

enum class Product : int { up, down, act_grad, input_grad, gate_up_weight_grad, down_weight_grad };

enum class Tiling : int {
  narrow,       // 64 x 64 a warpgroup, ping-pong: few rows an expert, bound by reading weights
  cooperative,  // 128 x 256 a pair of warpgroups, in clusters of two that share B: least traffic
};

struct Configuration {
  Tiling tiling;
  int tile_rows, tile_columns;  // of the product: slots (weight gradients: columns of H) by columns that come from B
  int cluster;                  // blocks that share B
};

Configuration configure(Product, const ExpertShape&);

// Blocks of gate_up_weight_grad's kernel, one a multiprocessor, that sum the slots' input gradients into tokens beside
// its tiles; 0: the sum is better off alone.
int sum_blocks(const ExpertShape&, int multiprocessors);

std::string explain(Product, const ExpertShape&, int multiprocessors);  // one line

}  // namespace fastmoe_cpp::cuda::sm90
