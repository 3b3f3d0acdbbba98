// The CPU kernels of core/pointwise.h: what each instruction set provides, and the choice among them.
#pragma once

#include "core/bfloat16.h"
#include "core/pointwise.h"

namespace ilvae::cpu {

// The kernels of core/pointwise.h on rows [begin, end).
template <class Real, class Operand>
struct RowKernels {
  void (*up)(const HiddenLayer<Real, Operand>&, int64_t begin, int64_t end);
  void (*turn)(const HiddenLayer<Real, Operand>&, const OutputUnit<Real, Operand>&, Real* scratch,  // 2 * width
               int64_t begin, int64_t end);
  void (*down)(const HiddenLayer<Real, Operand>&, int64_t begin, int64_t end);
};

struct AllKernels {
  RowKernels<double, double> float64;
  RowKernels<float, float> float32;
  RowKernels<float, bfloat16> bfloat16_operands;
  WeightKernels<double> weights_float64;
  WeightKernels<float> weights_float32;
};

namespace baseline {
extern const AllKernels kernels;
}
#if defined(ILVAE_X86)
namespace avx2 {
extern const AllKernels kernels;
}
namespace avx512 {
extern const AllKernels kernels;
}
#endif

// The kernels of the instruction set in use, on all of torch's threads.
template <class Real, class Operand>
const PointwiseKernels<Real, Operand>& pointwise_kernels();

template <class T>
void softplus(T* weight, const T* raw, int64_t n);
template <class T>
void softplus_backward(T* gradient, const T* raw, const T* cotangent, int64_t n);

}  // namespace ilvae::cpu
