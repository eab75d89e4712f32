// Which tiles a product runs with: a pure function of its description, for the launches, the tests and whoever asks why.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "../experts.h"

namespace fastmoe_cpp::cuda::portable {

// The five shapes of product. Rows are slots' rows, found through the plan, in all but weight_grad.
//   up, linear              [n_e, k] @ [columns, k].T      with and without an activation behind it
//   act_grad, linear_grad   [n_e, k] @ [k, columns]        with and without an activation's gradient behind it
//   weight_grad             [n_e, rows].T @ [n_e, columns]
enum class Kind : int { up, linear, act_grad, linear_grad, weight_grad };

enum class Tiling : int {
  small,   //  16 x 64:  few rows an expert, bound by reading the weights
  medium,  //  64 x 128: some rows an expert; every product of float32, float64 or sizes that are no multiple of 8
  pair,    // 128 x 128, two CTAs an SM: one computes while the other stores
  large,   // 128 x 256, one CTA an SM: the least traffic
};

struct Product {
  Kind kind;
  DType dtype;
  int64_t slots;
  int experts;
  int64_t rows, columns, contraction;  // rows: weight_grad's; contraction: the others'
  bool gated;                          // up: a column is a pair of weight rows
  bool vectorised;                     // every row starts at a multiple of 16 bytes, and sizes are multiples of 8
};

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // what one CTA may ask for
};

struct Configuration {
  Tiling tiling;
  int tile_rows, tile_columns;  // tile_columns in rows of the weight: a gated tile makes half as many columns
  int threads, ctas_per_sm, stages;
  int64_t shared_bytes;
  int64_t tiles;  // at most
  int64_t grid;
};

Configuration configure(const Product&, const Device&);
std::string explain(const Product&, const Device&);  // one line

// forced: a Tiling, or -1 for the choice by shape. For benchmarks that compare tilings, and tests that cover them.
Configuration configure(const Product&, const Device&, int forced);

}  // namespace fastmoe_cpp::cuda::portable
