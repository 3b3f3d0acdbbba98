#include "cpu/pointwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/instruction_set.h"

namespace ilvae::cpu {

namespace {

const AllRowKernels& row_kernels() {
#if defined(ILVAE_X86)
  if (isa() == Isa::avx512) return avx512::kernels;
  if (isa() == Isa::avx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

template <class Real, class Operand>
const RowKernels<Real, Operand>& select() {
  if constexpr (std::is_same_v<Real, double>) {
    return row_kernels().float64;
  } else if constexpr (std::is_same_v<Operand, float>) {
    return row_kernels().float32;
  } else {
    return row_kernels().bfloat16_operands;
  }
}

// Splits the rows among torch's threads, at least this many elements each.
template <class Body>
void for_row_ranges(int64_t rows, int64_t width, const Body& body) {
  constexpr int64_t grain_elements = 8192;
  at::parallel_for(0, rows, std::max<int64_t>(1, grain_elements / width), body);
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

template const PointwiseKernels<double, double>& pointwise_kernels();
template const PointwiseKernels<float, float>& pointwise_kernels();
template const PointwiseKernels<float, bfloat16>& pointwise_kernels();

}  // namespace ilvae::cpu
