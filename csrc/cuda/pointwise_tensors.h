// The pointwise kernels of CUDA devices as matmul_route.cpp calls them; they run on the current stream.
#pragma once

#include <ATen/ATen.h>

#include "core/bfloat16.h"
#include "core/float16.h"
#include "core/pointwise.h"

namespace ilvae::cuda {

template <class Real, class Operand>
const PointwiseKernels<Real, Operand, Operand>& pointwise_kernels();

// QuadraticTerm (cuda/pointwise.h) on tensors; any but x and constant may be undefined.
struct QuadraticTensors {
  at::Tensor x, y, v;         // (N, m): in any floating dtype; y in place
  at::Tensor u;               // (N)
  bool map = false;           // y += L x; else y += L (v + u x)
  at::Tensor potential, phi;  // (N): G in the type of `constant`, G + L/2 |x|^2 in any
  at::Tensor constant;        // L (1), float32 or float64, the type of the arithmetic
  at::Tensor gradient;        // grad_L (1), the same type
};
void add_quadratic(const QuadraticTensors&);

}  // namespace ilvae::cuda
