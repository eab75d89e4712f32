// Mixture-of-Experts layers for C++ programs on LibTorch: the operators by stage, and the layer as a torch::nn::Module.
#pragma once
#include "nn/moe.h"
#include "nn/state_dict.h"
#include "ops/combine.h"
#include "ops/dispatch.h"
#include "ops/exchange.h"
#include "ops/experts.h"
#include "ops/losses.h"
#include "ops/router.h"
