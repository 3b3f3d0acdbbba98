// The fused route on CUDA devices, on tensors. Nothing is saved between forward and backward but the inputs.
#pragma once

#include "core/plan.h"
#include "matmul_route.h"
#include "problem.h"

namespace ilvae::cuda {

// How the fused kernels of a device meet a network with these hidden widths, `width` inputs and operands.
Fit fit(at::Device, const std::vector<int64_t>& widths, int64_t width, bool dense, at::ScalarType operand);

// As their namesakes of matmul_route.h, but the map saves nothing, and gradients come in the dtypes of their arguments.
matmul::Values fused_potential_and_map(const Arguments&, bool want_potential, bool want_map);
std::vector<at::Tensor> fused_training_terms(const Arguments&, const at::Tensor& v, const at::Tensor& u,
                                             const std::vector<bool>& wanted);

}  // namespace ilvae::cuda
