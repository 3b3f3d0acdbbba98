// The pointwise kernels on a range of rows or of weights, written once and compiled for each instruction set:
// pointwise_*.cpp define ILVAE_ISA and set the flags. Loops run along a row, where memory is contiguous.
//
// This file must not leave an inline function with external linkage in the object file, and therefore uses no standard
// containers: the linker could take a copy that needs AVX-512 for every other file.
#include <cstdint>

#include "core/bfloat16.h"
#include "cpu/pointwise.h"
#include "cpu/vectors.h"

namespace ilvae::cpu::ILVAE_ISA {

template <class Real, class Operand>
static inline __attribute__((always_inline)) Operand as_operand(Real value) {
  return static_cast<Operand>(value);
}

template <bool tangent, class Real, class Operand, class F>
static void up_rows(const HiddenLayer<Real, Operand>& layer, const F& s, int64_t begin, int64_t end) {
  const int64_t n = layer.width;
  const Real* const bias = layer.bias;
  for (int64_t i = begin; i < end; ++i) {
    const Real* const a = layer.a.row(i);
    Operand* const h = layer.h ? layer.h.row(i) : nullptr;
    if constexpr (tangent) {
      const Real* const a_tangent = layer.a_tangent.row(i);
      Operand* const h_tangent = layer.h_tangent.row(i);
      if (h) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const auto [value, first, second] = s(a[j] + bias[j]);
          h[j] = as_operand<Real, Operand>(value);
          h_tangent[j] = as_operand<Real, Operand>(first * a_tangent[j]);
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          h_tangent[j] = as_operand<Real, Operand>(s(a[j] + bias[j]).first * a_tangent[j]);
        }
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) h[j] = as_operand<Real, Operand>(s(a[j] + bias[j]).value);
    }
  }
}

template <bool tangent, class Real, class Operand, class F>
static void down_rows(const HiddenLayer<Real, Operand>& layer, const F& s, int64_t begin, int64_t end) {
  const int64_t n = layer.width;
  const Real* const bias = layer.bias;
  for (int64_t i = begin; i < end; ++i) {
    const Real* const a = layer.a.row(i);
    const Real* const g = layer.g.row(i);
    Operand* const d = layer.d.row(i);
    if constexpr (tangent) {
      const Real* const a_tangent = layer.a_tangent.row(i);
      const Real* const g_tangent = layer.g_tangent.row(i);
      Operand* const d_tangent = layer.d_tangent.row(i);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const auto [value, first, second] = s(a[j] + bias[j]);
        d_tangent[j] = as_operand<Real, Operand>(g_tangent[j] * first + g[j] * second * a_tangent[j]);
        d[j] = as_operand<Real, Operand>(g[j] * first);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) d[j] = as_operand<Real, Operand>(g[j] * s(a[j] + bias[j]).first);
    }
  }
}

template <class Real>
static Derivatives<Real> evaluate(Activation activation, Real a) {
  Derivatives<Real> result{};
  for_activation<Real>(activation, [&](const auto& s) { result = s(a); });
  return result;
}

template <bool tangent, class Real, class Operand, class F>
static void turn_rows(const HiddenLayer<Real, Operand>& layer, const OutputUnit<Real, Operand>& out, const F& s,
                      Real* scratch, int64_t begin, int64_t end) {
  const int64_t n = layer.width;
  const Real* const bias = layer.bias;
  const Real* const w = out.weight;
  Real* const first_w = scratch;       // w s'(a_K) of one row
  Real* const second_w = scratch + n;  // w s''(a_K) a'_K of the same row
  for (int64_t i = begin; i < end; ++i) {
    const Real* const a = layer.a.row(i);
    Operand* const h = layer.h ? layer.h.row(i) : nullptr;
    Real sum = 0, sum_tangent = 0;
    if constexpr (tangent) {
      const Real* const a_tangent = layer.a_tangent.row(i);
#pragma omp simd reduction(+ : sum, sum_tangent)
      for (int64_t j = 0; j < n; ++j) {
        const auto [value, first, second] = s(a[j] + bias[j]);
        sum += value * w[j];
        sum_tangent += first * a_tangent[j] * w[j];
        first_w[j] = first * w[j];
        second_w[j] = second * a_tangent[j] * w[j];
      }
      if (h) {
        Operand* const h_tangent = layer.h_tangent.row(i);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const auto [value, first, second] = s(a[j] + bias[j]);
          h[j] = as_operand<Real, Operand>(value);
          h_tangent[j] = as_operand<Real, Operand>(first * a_tangent[j]);
        }
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) {
        const auto [value, first, second] = s(a[j] + bias[j]);
        sum += value * w[j];
        first_w[j] = first * w[j];
      }
      if (h) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) h[j] = as_operand<Real, Operand>(s(a[j] + bias[j]).value);
      }
    }
    Real& o = *out.o.row(i);
    if (!out.complete) o += sum + *out.bias;
    const auto [value, first, second] = evaluate<Real>(out.activation, o);
    if (out.potential) *out.potential.row(i) = value;
    if (!layer.d) continue;
    const Real u = out.potential_cotangent ? *out.potential_cotangent.row(i) : Real(tangent ? 0 : 1);
    Operand* const d = layer.d.row(i);
    if constexpr (tangent) {
      Real& o_tangent = *out.o_tangent.row(i);
      o_tangent += sum_tangent;
      const Real d_out = first, d_out_tangent = second * o_tangent + u * first;
      Operand* const d_tangent = layer.d_tangent.row(i);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        d[j] = as_operand<Real, Operand>(d_out * first_w[j]);
        d_tangent[j] = as_operand<Real, Operand>(d_out_tangent * first_w[j] + d_out * second_w[j]);
      }
      *out.d.row(i) = as_operand<Real, Operand>(d_out);
      *out.d_tangent.row(i) = as_operand<Real, Operand>(d_out_tangent);
    } else {
      const Real d_out = u * first;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) d[j] = as_operand<Real, Operand>(d_out * first_w[j]);
      *out.d.row(i) = as_operand<Real, Operand>(d_out);
    }
  }
}

template <class Real, class Operand>
struct Rows {
  static void up(const HiddenLayer<Real, Operand>& layer, int64_t begin, int64_t end) {
    for_activation<Real>(layer.activation, [&](const auto& s) {
      layer.a_tangent ? up_rows<true>(layer, s, begin, end) : up_rows<false>(layer, s, begin, end);
    });
  }
  static void turn(const HiddenLayer<Real, Operand>& layer, const OutputUnit<Real, Operand>& out, Real* scratch,
                   int64_t begin, int64_t end) {
    for_activation<Real>(layer.activation, [&](const auto& s) {
      layer.a_tangent ? turn_rows<true>(layer, out, s, scratch, begin, end)
                      : turn_rows<false>(layer, out, s, scratch, begin, end);
    });
  }
  static void down(const HiddenLayer<Real, Operand>& layer, int64_t begin, int64_t end) {
    for_activation<Real>(layer.activation, [&](const auto& s) {
      layer.a_tangent ? down_rows<true>(layer, s, begin, end) : down_rows<false>(layer, s, begin, end);
    });
  }
  static constexpr RowKernels<Real, Operand> kernels{up, turn, down};
};

template <class T>
struct Weights {
  static void softplus(T* weight, const T* raw, int64_t n) {
    const Function<ActivationKind::softplus, T> s(1.0);
    const int64_t whole = n - n % lanes_of<T>;
    activate(s, raw, whole, [&](int64_t i, const auto& at) { at.value.store(weight + i); });
    for (int64_t i = whole; i < n; ++i) weight[i] = s(raw[i]).value;
  }
  static void softplus_backward(T* gradient, const T* raw, const T* cotangent, int64_t n) {
    const Function<ActivationKind::softplus, T> s(1.0);
    const int64_t whole = n - n % lanes_of<T>;
    activate(s, raw, whole, [&]<class V>(int64_t i, const Derivatives<V>& at) {
      (V::load(cotangent + i) * at.first).store(gradient + i);
    });
    for (int64_t i = whole; i < n; ++i) gradient[i] = cotangent[i] * s(raw[i]).first;
  }
  static constexpr WeightKernels<T> kernels{softplus, softplus_backward};
};

extern const AllKernels kernels{Rows<double, double>::kernels, Rows<float, float>::kernels,
                                Rows<float, bfloat16>::kernels, Weights<double>::kernels, Weights<float>::kernels};

}  // namespace ilvae::cpu::ILVAE_ISA
