// The launchers of pointwise.h for one pair of types; pointwise_*.cu instantiate them.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/launch.cuh"
#include "cuda/pointwise.cuh"

namespace ilvae::cuda {

inline constexpr int64_t most_blocks = 132 * 32;  // a few waves; beyond, blocks walk on

// Whether rows of all matrices present start at multiples of 16 bytes.
template <class T>
bool aligned(const Matrix<T>& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * sizeof(T) % 16 == 0;
}

template <class Real, class Operand>
constexpr int vector_width = 16 / sizeof(Operand);

template <class Real, class Operand>
bool vectorises(const HiddenLayer<Real, Operand, Operand>& l) {
  return l.width % vector_width<Real, Operand> == 0 && aligned(l.a) && aligned(l.a_tangent) && aligned(l.h) &&
         aligned(l.h_tangent) && aligned(l.g) && aligned(l.g_tangent) && aligned(l.d) && aligned(l.d_tangent);
}

// log2 of the threads of a block that stand beside each other.
inline int across(int64_t chunks) {
  int log = 0;
  while (log < 8 && (int64_t(1) << log) < chunks) ++log;
  return log;
}

template <class Real, class Operand, class Kernel>
Status launch_elementwise(const char* what, Kernel vector, Kernel scalar,
                          const HiddenLayer<Real, Operand, Operand>& layer, void* stream) {
  const bool wide = vectorises(layer);
  const int beside = across(wide ? layer.width / vector_width<Real, Operand> : layer.width);
  const int64_t rows_per_block = pointwise_threads >> beside;
  const int64_t blocks = std::min((layer.rows + rows_per_block - 1) / rows_per_block, most_blocks);
  return launch(what, wide ? vector : scalar, blocks, pointwise_threads, 0, stream, layer,
                Parameter<Real>(layer.activation.parameter), beside);
}

template <class Real, class Operand>
Status PointwiseLaunchers<Real, Operand>::up(const Layer& layer, void* stream) {
  return launch_elementwise<Real, Operand>("up", up_kernel<vector_width<Real, Operand>, Real, Operand, Operand>,
                                           up_kernel<1, Real, Operand, Operand>, layer, stream);
}

template <class Real, class Operand>
Status PointwiseLaunchers<Real, Operand>::down(const Layer& layer, void* stream) {
  return launch_elementwise<Real, Operand>("down", down_kernel<vector_width<Real, Operand>, Real, Operand, Operand>,
                                           down_kernel<1, Real, Operand, Operand>, layer, stream);
}

template <class Real, class Operand>
Status PointwiseLaunchers<Real, Operand>::turn(const Layer& layer, const Output& out, void* stream) {
  constexpr int rows_per_block = pointwise_threads / 32;
  const int64_t blocks = std::min((layer.rows + rows_per_block - 1) / rows_per_block, most_blocks);
  return launch("turn",
                vectorises(layer) ? turn_kernel<vector_width<Real, Operand>, Real, Operand, Operand>
                                  : turn_kernel<1, Real, Operand, Operand>,
                blocks, pointwise_threads, 0, stream, layer, Parameter<Real>(layer.activation.parameter), out,
                Parameter<Real>(out.activation.parameter));
}

template <class Real>
Status launch_quadratic(const QuadraticTerm<Real>& q, void* stream) {
  constexpr int rows_per_block = pointwise_threads / 32;
  const int64_t wanted = (q.rows + rows_per_block - 1) / rows_per_block;
  const int64_t blocks = std::min<int64_t>(wanted, q.gradient ? quadratic_blocks : most_blocks);
  const auto status =
      launch("quadratic", quadratic_kernel<Real>, blocks, pointwise_threads, rows_per_block * sizeof(Real), stream, q);
  if (status || !q.gradient) return status;
  return launch("sum of grad_L", sum_kernel<Real>, 1, 32, 0, stream, static_cast<const Real*>(q.partial),
                static_cast<int>(blocks), q.gradient);
}

}  // namespace ilvae::cuda
