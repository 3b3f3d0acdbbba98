// The fused route on CUDA devices, on tensors. Nothing is saved between forward and backward but the inputs.
#pragma once

#include "route.h"

namespace ilvae::cuda {

// Its map saves nothing, and gradients come in the dtypes of their arguments. It has no map_jvp.
extern const Implementation fused;

// How the fused kernels of a device meet a network with these hidden widths, `width` inputs and operands.
Fit fit(at::Device, const std::vector<int64_t>& widths, int64_t width, bool dense, at::ScalarType operand);

// With streamed weights, the rows of a batch are taken at a time, so that the operands of the products that end the
// training terms stay within this. Tests lower it.
extern int64_t most_stacked_bytes;

}  // namespace ilvae::cuda
