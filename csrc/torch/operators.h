// The operators of the torch library `ilvae_fast`: their signatures, and typed calls through the dispatcher.
//
// All that work on a potential take its operands first, in the order of `operand_schema`. C++ sees them as one
// `Operands`: pack and unpack below are the only places that list them one by one.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace ilvae::ops {

using at::Tensor;

inline constexpr auto operand_schema =
    "Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, Tensor inverse_lipschitz, Tensor? embedding, "
    "int[] activations, float[] activation_parameters, ScalarType? product_dtype, int route";

// Order 0 and 1: potential (...), map (..., d), saved; the first two empty where not wanted.
struct PotentialAndMap {
  static constexpr auto name = "potential_and_map";
  static constexpr auto own_schema =
      "bool want_potential, bool want_map, bool save=False, bool? recompute=None, ScalarType? saved_dtype=None";
  static constexpr auto result_schema = "(Tensor potential, Tensor map, Tensor[] saved)";
  // recompute: whether the backward pass recomputes what it needs (by default the plan decides). Without autograd
  // nothing is saved unless `save` asks for it. saved_dtype: in which dtype the device saves, for fake tensors.
  using Signature = std::tuple<Tensor, Tensor, std::vector<Tensor>>(const Operands&, bool want_potential, bool want_map,
                                                                    bool save, std::optional<bool> recompute,
                                                                    OptionalType saved_dtype);
};

// The gradients of sum <map_cotangent, T> + sum potential_cotangent phi in the order of `Gradient`. wanted: bit i for
// gradient i, the others come back empty. saved: of potential_and_map, or nothing.
struct TrainingTerms {
  static constexpr auto name = "training_terms";
  static constexpr auto own_schema = "Tensor? map_cotangent, Tensor? potential_cotangent, Tensor[] saved, int wanted";
  static constexpr auto result_schema = "Tensor[]";
  using Signature = std::vector<Tensor>(const Operands&, const OptionalTensor& map_cotangent,
                                        const OptionalTensor& potential_cotangent, at::TensorList saved,
                                        int64_t wanted);
};

// The map (..., d) and its derivative along the tangent (..., m) of x.
struct MapJvp {
  static constexpr auto name = "map_jvp";
  static constexpr auto own_schema = "Tensor tangent";
  static constexpr auto result_schema = "(Tensor map, Tensor map_tangent)";
  using Signature = std::tuple<Tensor, Tensor>(const Operands&, const Tensor& tangent);
};

// Second derivatives of the two above, implemented in Python for all devices. needed: bit i for tensor i of
// (map_cotangent, potential_cotangent | tangent), and then the operands in the order of `Gradient`.
struct TrainingTermsBackward {
  static constexpr auto name = "training_terms_backward";
  static constexpr auto own_schema =
      "Tensor[] cotangents, Tensor? map_cotangent, Tensor? potential_cotangent, int wanted, int needed";
  static constexpr auto result_schema = "Tensor[]";
  using Signature = std::vector<Tensor>(const Operands&, at::TensorList cotangents, const OptionalTensor& map_cotangent,
                                        const OptionalTensor& potential_cotangent, int64_t wanted, int64_t needed);
};
struct MapJvpBackward {
  static constexpr auto name = "map_jvp_backward";
  static constexpr auto own_schema = "Tensor[] cotangents, Tensor tangent, int needed";
  static constexpr auto result_schema = "Tensor[]";
  using Signature = std::vector<Tensor>(const Operands&, at::TensorList cotangents, const Tensor& tangent,
                                        int64_t needed);
};

// The two ways between the operands one by one, as the dispatcher and Python have them, and `Operands`.
template <class Signature>
struct Unpacked;
template <class Result, class... Rest>
struct Unpacked<Result(const Operands&, Rest...)> {
  using type = Result(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                      const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
                      Floats activation_parameters, OptionalType product_dtype, int64_t route, Rest... rest);

  // `function`, which takes Operands, with the operands one by one.
  template <auto function>
  static Result pack(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                     const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
                     Floats activation_parameters, OptionalType product_dtype, int64_t route, Rest... rest) {
    return function({x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations, activation_parameters,
                     product_dtype, route},
                    rest...);
  }

  static Result unpack(const c10::TypedOperatorHandle<type>& op, const Operands& o, Rest... rest) {
    return op.call(o.x, o.skip_weight, o.bias, o.weights, o.inverse_lipschitz, o.embedding, o.activations,
                   o.activation_parameters, o.product_dtype, o.route, rest...);
  }
};

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("ilvae_fast::") + name).c_str(), "")
      .typed<Signature>();
}

template <class Op>
const auto& handle() {
  static const auto op = find<typename Unpacked<typename Op::Signature>::type>(Op::name);
  return op;
}

// Makes `function`, which takes Operands, the kernel of an operator at a dispatch key.
template <class Op, auto function>
void implement(torch::Library& m) {
  m.impl(Op::name, Unpacked<typename Op::Signature>::template pack<function>);
}

// Calls an operator through the dispatcher.
template <class Op, class... Rest>
auto call(const Operands& operands, Rest&&... rest) {
  return Unpacked<typename Op::Signature>::unpack(handle<Op>(), operands, std::forward<Rest>(rest)...);
}

// Non-negative weights, softplus(raw), and gradients of raw: softplus.cpp.
using Softplus = std::vector<Tensor>(at::TensorList raw);
using SoftplusBackward = std::vector<Tensor>(at::TensorList raw, at::TensorList cotangents);
inline const auto& softplus() {
  static const auto op = find<Softplus>("softplus");
  return op;
}
inline const auto& softplus_backward() {
  static const auto op = find<SoftplusBackward>("softplus_backward");
  return op;
}

// Operands that were checked, and whose route was chosen, a moment ago: autograd says so around its own call. Tensors
// that some other dispatch key has replaced in between are checked again.
class Settled {
 public:
  Settled(const Operands& operands, const Choice& choice);
  ~Settled();
  Settled(const Settled&) = delete;
  // The choice for these very tensors, or null.
  static const Choice* find(const Operands& operands);

 private:
  const Operands& operands_;
  const Choice& choice_;
  const Settled* const outer_;
};

}  // namespace ilvae::ops
