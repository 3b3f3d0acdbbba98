// The pointwise kernels of CUDA devices as the matmul route calls them; they run on the current stream.
#pragma once

#include "route.h"

namespace ilvae::cuda {

template <class Real, class Operand>
const PointwiseKernels<Real, Operand, Operand>& pointwise_kernels();

void add_quadratic(const ilvae::QuadraticTerm&);

}  // namespace ilvae::cuda
