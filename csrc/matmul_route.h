// The matmul route: matrix products by ATen on packed operands, fused pointwise kernels (core/pointwise.h) between.
// Any size, any device that has the pointwise kernels.
#pragma once

#include <utility>
#include <vector>

#include "problem.h"

namespace ilvae::matmul {

// Columns of a matrix with a column for each of S hidden units and the output's: rows start at 16-byte boundaries.
template <class Int>
Int padded_units(const Int& units) {
  return (units + 8) / 8 * 8;
}

struct Values {
  at::Tensor potential, map;      // (N), (N, d), undefined where not wanted
  std::vector<at::Tensor> saved;  // what training_terms can start from
};

// With `save`: pre-activations (N, padded_units(S)), adjoints g_1 .. g_{K-1} (N, S - n_K) (empty without the map), A B
// (S+1, m) (empty without a dense embedding). Else nothing.
Values potential_and_map(const Problem&, bool want_potential, bool want_map, bool save);

// Gradients of sum <v, T> + sum u phi in the order of `Gradient`; undefined where not wanted. v (N, d) and u (N) may be
// undefined; `saved` empty: everything is recomputed.
std::vector<at::Tensor> training_terms(const Problem&, const at::Tensor& v, const at::Tensor& u, at::TensorList saved,
                                       const std::vector<bool>& wanted);

// T and its derivative along the tangent (N, m) of x.
std::pair<at::Tensor, at::Tensor> map_jvp(const Problem&, const at::Tensor& tangent);

}  // namespace ilvae::matmul
