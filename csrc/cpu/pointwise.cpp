#include "cpu/pointwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/tuning.h"

namespace ilvae::cpu {

namespace {

const AllKernels& all_kernels() {
#if defined(ILVAE_X86)
  if (isa() == Isa::avx512) return avx512::kernels;
  if (isa() == Isa::avx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

template <class T>
const WeightKernels<T>& weight_kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return all_kernels().weights_float64;
  } else {
    return all_kernels().weights_float32;
  }
}

// Splits n elements among torch's threads, between blocks.
template <class Body>
void for_element_ranges(int64_t n, const Body& body) {
  constexpr int64_t block = weight_block_elements;
  at::parallel_for(0, (n + block - 1) / block, weight_grain_elements / block,
                   [&](int64_t begin, int64_t end) { body(begin * block, std::min(n, end * block)); });
}

template <class Real, class Operand>
const RowKernels<Real, Operand>& select() {
  if constexpr (std::is_same_v<Real, double>) {
    return all_kernels().float64;
  } else if constexpr (std::is_same_v<Operand, float>) {
    return all_kernels().float32;
  } else {
    return all_kernels().bfloat16_operands;
  }
}

// Splits the rows among torch's threads.
template <class Body>
void for_row_ranges(int64_t rows, int64_t width, const Body& body) {
  at::parallel_for(0, rows, std::max<int64_t>(1, row_grain_elements / width), body);
}

template <class Real, class Operand>
struct Threaded {
  static void up(const HiddenLayer<Real, Operand>& layer) {
    const auto rows = select<Real, Operand>().up;
    for_row_ranges(layer.rows, layer.width, [&](int64_t begin, int64_t end) { rows(layer, begin, end); });
  }
  static void turn(const HiddenLayer<Real, Operand>& layer, const OutputUnit<Real, Operand>& out) {
    const auto rows = select<Real, Operand>().turn;
    for_row_ranges(layer.rows, layer.width, [&](int64_t begin, int64_t end) {
      std::vector<Real> scratch(2 * layer.width);
      rows(layer, out, scratch.data(), begin, end);
    });
  }
  static void down(const HiddenLayer<Real, Operand>& layer) {
    const auto rows = select<Real, Operand>().down;
    for_row_ranges(layer.rows, layer.width, [&](int64_t begin, int64_t end) { rows(layer, begin, end); });
  }
};

}  // namespace

template <class Real, class Operand>
const PointwiseKernels<Real, Operand>& pointwise_kernels() {
  using T = Threaded<Real, Operand>;
  static constexpr PointwiseKernels<Real, Operand> kernels{T::up, T::turn, T::down};
  return kernels;
}

template <class T>
void softplus(T* weight, const T* raw, int64_t n) {
  for_element_ranges(
      n, [&](int64_t begin, int64_t end) { weight_kernels<T>().softplus(weight + begin, raw + begin, end - begin); });
}

template <class T>
void softplus_backward(T* gradient, const T* raw, const T* cotangent, int64_t n) {
  for_element_ranges(n, [&](int64_t begin, int64_t end) {
    weight_kernels<T>().softplus_backward(gradient + begin, raw + begin, cotangent + begin, end - begin);
  });
}

template const PointwiseKernels<double, double>& pointwise_kernels();
template const PointwiseKernels<float, float>& pointwise_kernels();
template const PointwiseKernels<float, bfloat16>& pointwise_kernels();
template void softplus(double*, const double*, int64_t);
template void softplus(float*, const float*, int64_t);
template void softplus_backward(double*, const double*, const double*, int64_t);
template void softplus_backward(float*, const float*, const float*, int64_t);

}  // namespace ilvae::cpu
