// The matmul route: matrix products by ATen on packed operands, fused pointwise kernels (core/pointwise.h) between.
// Any size, any device that has the pointwise kernels.
//
// What it saves: pre-activations (N, padded_units(S)), adjoints g_1 .. g_{K-1} (N, S - n_K) (empty without the map), A
// B (S+1, m) (empty without a dense embedding).
#pragma once

#include "route.h"

namespace ilvae::matmul {

extern const Implementation implementation;

}  // namespace ilvae::matmul
