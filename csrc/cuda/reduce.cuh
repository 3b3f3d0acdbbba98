// The second stage of the training terms: sums over the blocks of the first, in a fixed order.
#pragma once

#include "cuda/fused.h"
#include "cuda/operand.cuh"

namespace ilvae::cuda {

// A block sums 32 neighbouring numbers: warp w takes the parts w, w + 8, .. in ascending order, then the eight are
// added in order.
static __global__ void __launch_bounds__(reduction_threads) reduce_kernel(const __grid_constant__ Reduction r) {
  constexpr int warps = reduction_threads / 32;
  float* const shared = reinterpret_cast<float*>(ptx::dynamic_shared());  // (warps, 32)
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t i = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (i < r.size) {
#pragma unroll 4
    for (int part = warp; part < r.parts; part += warps) sum += r.partial[part * r.size + i];
  }
  shared[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= r.size) return;
  for (int other = 1; other < warps; ++other) sum += shared[other * 32 + lane];
  int64_t start = 0;
  for (int s = 0; s < r.segments; ++s) {
    const auto& to = r.segment[s];
    if (i < to.end) {
      if (to.data) store_any(to.data, to.type, i - start, sum);
      return;
    }
    start = to.end;
  }
}

}  // namespace ilvae::cuda
