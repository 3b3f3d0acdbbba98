// Launchers of the pointwise kernels (pointwise.cuh). No torch headers; `stream` is a cudaStream_t.
#pragma once

#include "core/pointwise.h"
#include "cuda/dtype.h"
#include "cuda/status.h"

namespace ilvae::cuda {

template <class Real, class Operand>
struct PointwiseLaunchers {
  using Layer = HiddenLayer<Real, Operand, Operand>;
  using Output = OutputUnit<Real, Operand, Operand>;

  static Status up(const Layer&, void* stream);
  static Status turn(const Layer&, const Output&, void* stream);
  static Status down(const Layer&, void* stream);
};

// A matrix of a type known at run time, or null.
struct Any {
  void* data = nullptr;
  int64_t stride = 0;  // of its rows, in elements
  DType type = DType::float32;

  ILVAE_HD explicit operator bool() const { return data != nullptr; }
};

// The quadratic term where B is the padded identity, on rows of x (rows, width):
//
//   y += L (v + u x)      v absent: 0; u absent: `unit`, which is 1 for the map and 0 for its gradients
//   phi = G + L/2 |x|^2
//   grad_L = sum <v, x> + u/2 |x|^2, in a fixed order
template <class Real>
struct QuadraticTerm {
  int64_t rows = 0, width = 0;
  const Real* constant = nullptr;  // L (1)
  Any x, y, v;                     // (rows, width)
  Any u;                           // (rows, 1)
  Real unit = 0;
  const Real* potential = nullptr;  // G (rows)
  Any phi;                          // (rows, 1)
  Real* gradient = nullptr;         // grad_L (1)
  Real* partial = nullptr;          // scratch for it (quadratic_blocks)
};
inline constexpr int quadratic_blocks = 1024;

// One launch, and a second for grad_L.
template <class Real>
Status launch_quadratic(const QuadraticTerm<Real>&, void* stream);

}  // namespace ilvae::cuda
