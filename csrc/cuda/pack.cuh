// Parameters that cannot be streamed as they are (FusedCall::streamed), converted to 16-bit operands.
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/rows.cuh"

namespace ilvae::cuda {

// A warp copies a row.
template <Operands kind>
__global__ void __launch_bounds__(pack_threads) pack_kernel(const __grid_constant__ Packing p) {
  int64_t row = int64_t(blockIdx.x) * (pack_threads / 32) + threadIdx.x / 32;
  for (int i = 0; i < p.matrices; ++i) {
    const auto& m = p.matrix[i];
    if (row < m.rows) {
      auto* const to = static_cast<Element<kind>*>(m.to) + row * m.stride;
      for (int c = 4 * (threadIdx.x % 32); c < m.columns; c += 128) {
        const float4 four = load_four(m.from, row, c, m.columns);
        store_pair<kind>(to + c, four.x, four.y);
        store_pair<kind>(to + c + 2, four.z, four.w);
      }
      return;
    }
    row -= m.rows;
  }
}

}  // namespace ilvae::cuda
