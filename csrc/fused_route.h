// The fused route: a tile of rows goes through the whole network on chip, one kernel per operator.
#pragma once

#include "matmul_route.h"
#include "problem.h"

namespace ilvae::fused {

using matmul::Values;

// As their namesakes of matmul_route.h. What is saved has another layout (cpu/fused.h): panels of the pre-activations
// (N rounded up to row_padding, S+1), biases included, and of the adjoints; A B.
Values potential_and_map(const Problem&, bool want_potential, bool want_map, bool save);
std::vector<at::Tensor> training_terms(const Problem&, const at::Tensor& v, const at::Tensor& u, at::TensorList saved,
                                       const std::vector<bool>& wanted);
std::pair<at::Tensor, at::Tensor> map_jvp(const Problem&, const at::Tensor& tangent);

}  // namespace ilvae::fused
