// The pointwise steps of the matmul route: the contract between the route, which owns the matrix products, and the
// kernels of a device.
//
// Every matrix is row-major; element (i, j) of a matrix X with leading dimension X.stride lies at X.data[i * X.stride +
// j], counted in elements. A null `data` says that the matrix is absent. Symbols are those of docs/mathematics.md: a
// dash
// (`_tangent`) is the derivative along the cotangent v. `Real` is the type of all arithmetic (double or float),
// `Operand` the type that enters matrix products (Real itself, bfloat16 or float16), `Stored` the type in which matrix
// products leave pre-activations and adjoints (Real on the CPU, Operand on CUDA devices).
#pragma once

#include <cstdint>

#include "activations.h"

namespace ilvae {

template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t stride = 0;

  ILVAE_HD explicit operator bool() const { return data != nullptr; }
  ILVAE_HD T* row(int64_t i) const { return data + i * stride; }
};

// One hidden layer, k < K on the way up, any k on the way down.
template <class Real, class Operand, class Stored = Real>
struct HiddenLayer {
  int64_t rows = 0, width = 0;
  Activation activation;
  const Real* bias = nullptr;         // b_k (width); the matrices below hold a_k - b_k
  Matrix<const Stored> a, a_tangent;  // (rows, width)
  Matrix<Operand> h, h_tangent;       // (rows, width), written by up()
  Matrix<const Stored> g, g_tangent;  // (rows, width), read by down()
  Matrix<Operand> d, d_tangent;       // (rows, width), written by down() and turn(); absent: not wanted
};

// Layer K and the scalar output unit, where the sweep turns around.
template <class Real, class Operand, class Stored = Real>
struct OutputUnit {
  Activation activation;                   // s_out
  const Real* weight = nullptr;            // w (n_K)
  const Real* bias = nullptr;              // b_out (1)
  bool complete = false;                   // o holds o; else P_out, and turn() completes it in place
  Matrix<Stored> o, o_tangent;             // (rows, 1)
  Matrix<const Real> potential_cotangent;  // u (rows, 1), or absent
  Matrix<Real> potential;                  // G (rows, 1), or absent
  Matrix<Operand> d, d_tangent;            // D_out, D'_out (rows, 1), or absent
};

// The kernels. Tangent matrices are used where layer.a_tangent is present.
//
//   up    h = s(a) ; h' = s'(a) a'
//   turn  o += h_K w^T + b_out ; o' += h'_K w^T ; G = s_out(o)
//         D_out = s_out'(o) ; D'_out = s_out''(o) o' + u s_out'(o)
//         D_K = D_out w s'(a_K) ; D'_K = D'_out w s'(a_K) + D_out w s''(a_K) a'_K
//         without tangents and with u: D_out = u s_out'(o), so that the sweep yields D' = u D
//   down  D = g s'(a) ; D' = g' s'(a) + g s''(a) a'
template <class Real, class Operand, class Stored = Real>
struct PointwiseKernels {
  void (*up)(const HiddenLayer<Real, Operand, Stored>&);
  void (*turn)(const HiddenLayer<Real, Operand, Stored>&, const OutputUnit<Real, Operand, Stored>&);
  void (*down)(const HiddenLayer<Real, Operand, Stored>&);
};

// Non-negative weights from n raw ones, and gradients of the raw ones.
template <class T>
struct WeightKernels {
  void (*softplus)(T* weight, const T* raw, int64_t n);
  void (*softplus_backward)(T* gradient, const T* raw, const T* cotangent, int64_t n);
};

}  // namespace ilvae
