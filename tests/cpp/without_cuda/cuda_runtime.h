// The names that declarations of the launches mention. The logic under test calls nothing of CUDA, so it is compiled and
// tested where no CUDA toolkit is.
#pragma once
enum cudaError_t : int;
using cudaStream_t = struct CUstream_st*;
