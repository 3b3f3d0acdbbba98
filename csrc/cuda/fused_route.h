// The fused route on CUDA devices, on tensors. Nothing is saved between forward and backward but the inputs.
#pragma once

#include <string>

#include "matmul_route.h"
#include "problem.h"

namespace ilvae::cuda {

// Why the fused kernels do not take a call on the device of x; empty: they do. Depends on the layers, the dtypes and
// the device, not on the batch.
std::string refusal(const Arguments&);

// As their namesakes of matmul_route.h, but the map saves nothing, and gradients come in the dtypes of their arguments.
matmul::Values fused_potential_and_map(const Arguments&, bool want_potential, bool want_map);
std::vector<at::Tensor> fused_training_terms(const Arguments&, const at::Tensor& v, const at::Tensor& u,
                                             const std::vector<bool>& wanted);

}  // namespace ilvae::cuda
