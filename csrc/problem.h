// One potential and its batch: the operands that all operators share, their checks, and the form the routes compute
// with.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <vector>

#include "core/activations.h"
#include "core/plan.h"

namespace ilvae {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using Floats = at::ArrayRef<double>;

// The order in which tensors travel through gradients and autograd; the weights follow.
enum Gradient : size_t { grad_x, grad_skip_weight, grad_bias, grad_inverse_lipschitz, grad_embedding, grad_weights };
// Two cotangents and all of these have bits in an integer.
inline constexpr int64_t max_layers = 55;

// Which gradients are wanted: bit i for gradient i.
struct Gradients {
  int64_t bits = 0;
  size_t count = 0;
  bool operator[](size_t i) const { return (bits >> i) & 1; }
};

// One element for each layer. Networks of usual depth need no allocation, of which a small call could make dozens.
template <class T>
using PerLayer = c10::SmallVector<T, 4>;

// The operands of a call, as the dispatcher passes them; they live as long as the call.
struct Operands {
  const at::Tensor& x;                  // (..., m)
  const at::Tensor& skip_weight;        // (S+1, d)
  const at::Tensor& bias;               // (S+1)
  at::TensorList weights;               // W_2 .. W_K, w
  const at::Tensor& inverse_lipschitz;  // (1), float32 or float64
  const OptionalTensor& embedding;      // B (d, m); none: the identity, padded where x is narrower than skip_weight
  at::IntArrayRef activations;          // ActivationKind of the K hidden layers and the output
  Floats activation_parameters;         // (K+1)
  OptionalType product_dtype;           // of the operands of matrix products, where not that of x (autocast)
  int64_t route;                        // a Route of core/plan.h

  // Raises ValueError, naming the argument, before any work. Works on symbolic shapes too.
  void check() const;
  // Checks that `t` has the leading dimensions of x and then, if given, `last`.
  void check_rows(const char* name, const at::Tensor& t, std::optional<c10::SymInt> last) const;
  // Checks the bits of `wanted`, one for each gradient.
  void check_wanted(int64_t wanted) const;

  int64_t width() const { return skip_weight.size(1); }
  bool dense() const { return embedding.has_value(); }
  at::ScalarType output_dtype() const { return product_dtype.value_or(x.scalar_type()); }
  size_t gradients() const { return grad_weights + weights.size(); }
  // The tensor that gradient i is of; undefined for an embedding that is not there.
  const at::Tensor& operator[](size_t i) const;
};

// As Tensor::to and at::empty, but past the dispatcher where it has nothing to decide: with small networks its calls,
// not the arithmetic, take the time.
inline at::Tensor in_dtype(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}
inline at::Tensor allocate(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  return like.is_cpu() ? at::Tensor(at::detail::empty_cpu(sizes, dtype))
                       : at::empty(sizes, like.options().dtype(dtype));
}

// The same operands as the routes compute with them: rows flattened, sizes counted, parameters converted.
struct Problem {
  explicit Problem(const Operands& operands);

  at::ScalarType operand;  // enters matrix products: float64, float32, bfloat16 or float16
  at::ScalarType real;     // all other arithmetic, and what products accumulate in: float64 or float32
  at::ScalarType output;
  int64_t rows, input, width, units;  // N, m, d, S
  PerLayer<int64_t> widths, offsets;  // n_k and its first column among the units, for the K hidden layers
  PerLayer<Activation> activations;   // K + 1
  at::Tensor x;                       // (N, m), as it came
  at::Tensor skip_weight;             // operand
  at::Tensor bias, output_weight;     // real, contiguous
  PerLayer<at::Tensor> weights;       // operand
  at::Tensor inverse_lipschitz;       // real
  at::Tensor embedding;               // as it came, or undefined

  size_t layers() const { return widths.size(); }
  bool padded() const { return !embedding.defined() && input < width; }
  at::TensorOptions options(at::ScalarType dtype) const { return x.options().dtype(dtype); }
  // The columns of hidden layer l, or of the output unit (l = K), of a matrix with a column per unit.
  at::Tensor columns(const at::Tensor& t, size_t l) const {
    return l < layers() ? t.narrow(1, offsets[l], widths[l]) : t.narrow(1, units, 1);
  }
};

}  // namespace ilvae
