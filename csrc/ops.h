// The operators of the torch library `ilvae_fast` as typed calls through the dispatcher.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ilvae::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using Floats = at::ArrayRef<double>;

// -> potential (...), map (..., d), saved; the first two empty where not wanted. route: a Route of core/plan.h.
// recompute: whether the backward pass recomputes what it needs (by default the plan decides); without autograd nothing
// is saved unless `save` asks for it; saved_dtype: in which dtype the device saves, for fake tensors.
using PotentialAndMap = std::tuple<Tensor, Tensor, std::vector<Tensor>>(
    const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
    const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
    Floats activation_parameters, bool want_potential, bool want_map, bool save, OptionalType product_dtype,
    int64_t route, std::optional<bool> recompute, OptionalType saved_dtype);

// -> gradients in the order of `Gradient`; wanted: bit i for gradient i, the others come back empty
using TrainingTerms = std::vector<Tensor>(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                          at::TensorList weights, const Tensor& inverse_lipschitz,
                                          const OptionalTensor& embedding, const OptionalTensor& map_cotangent,
                                          const OptionalTensor& potential_cotangent, at::TensorList saved,
                                          at::IntArrayRef activations, Floats activation_parameters, int64_t wanted,
                                          OptionalType product_dtype, int64_t route);

// -> map (..., d), its derivative along the tangent (..., m) of x
using MapJvp = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                          at::TensorList weights, const Tensor& inverse_lipschitz,
                                          const OptionalTensor& embedding, const Tensor& tangent,
                                          at::IntArrayRef activations, Floats activation_parameters,
                                          OptionalType product_dtype, int64_t route);

// Second derivatives of the two above, implemented in ilvae_fast/ops.py. needed: bit i for tensor i of
// (map_cotangent, potential_cotangent | tangent), x, skip_weight, bias, inverse_lipschitz, embedding, weights...
using TrainingTermsBackward = std::vector<Tensor>(at::TensorList cotangents, const Tensor& x, const Tensor& skip_weight,
                                                  const Tensor& bias, at::TensorList weights,
                                                  const Tensor& inverse_lipschitz, const OptionalTensor& embedding,
                                                  const OptionalTensor& map_cotangent,
                                                  const OptionalTensor& potential_cotangent,
                                                  at::IntArrayRef activations, Floats activation_parameters,
                                                  int64_t wanted, int64_t needed);
using MapJvpBackward = std::vector<Tensor>(at::TensorList cotangents, const Tensor& x, const Tensor& skip_weight,
                                           const Tensor& bias, at::TensorList weights, const Tensor& inverse_lipschitz,
                                           const OptionalTensor& embedding, const Tensor& tangent,
                                           at::IntArrayRef activations, Floats activation_parameters, int64_t needed);

// -> non-negative weights, softplus(raw); -> gradients of raw. Both in softplus.cpp.
using Softplus = std::vector<Tensor>(at::TensorList raw);
using SoftplusBackward = std::vector<Tensor>(at::TensorList raw, at::TensorList cotangents);

template <class Signature>
const c10::TypedOperatorHandle<Signature>& handle(const char* name) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op;
}
inline const auto& potential_and_map() { return handle<PotentialAndMap>("ilvae_fast::potential_and_map"); }
inline const auto& training_terms() { return handle<TrainingTerms>("ilvae_fast::training_terms"); }
inline const auto& map_jvp() { return handle<MapJvp>("ilvae_fast::map_jvp"); }
inline const auto& training_terms_backward() {
  return handle<TrainingTermsBackward>("ilvae_fast::training_terms_backward");
}
inline const auto& map_jvp_backward() { return handle<MapJvpBackward>("ilvae_fast::map_jvp_backward"); }
inline const auto& softplus() { return handle<Softplus>("ilvae_fast::softplus"); }
inline const auto& softplus_backward() { return handle<SoftplusBackward>("ilvae_fast::softplus_backward"); }

}  // namespace ilvae::ops
