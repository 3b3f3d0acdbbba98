// Activations and sums as device code uses them.
#pragma once

#include "core/activations.h"

namespace ilvae::cuda {

// s, s', s'' of V pre-activations. One switch for all V: a branch per element would serialise their exponentials.
template <int V, class Real>
__device__ __forceinline__ void evaluate(ActivationKind kind, Parameter<Real> parameter, const Real (&a)[V],
                                         Derivatives<Real> (&result)[V]) {
  for_activation<Real>(kind, parameter, [&](const auto& s) {
#pragma unroll
    for (int i = 0; i < V; ++i) result[i] = s(a[i]);
  });
}

// The sum over lanes that differ in the bits of `lanes`, the same in all of them.
template <int lanes = 31, class Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    if (mask & lanes) value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

}  // namespace ilvae::cuda
