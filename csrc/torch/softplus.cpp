// Non-negative weights, softplus(raw), of all layers in one operator of the CPU: its schema, kernels and derivatives.
#include <ATen/ops/sigmoid.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "route.h"
#include "torch/batching.h"
#include "torch/operators.h"

namespace ilvae::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

void check(at::TensorList raw) {
  for (size_t k = 0; k < raw.size(); ++k) {
    const auto dtype = raw[k].scalar_type();
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble, "raw[", k, "]: got dtype ", dtype,
                      ", wanted float64 or float32");
  }
}

void check_cotangents(at::TensorList raw, at::TensorList cotangents) {
  check(raw);
  TORCH_CHECK_VALUE(cotangents.size() == raw.size(), "cotangents: got ", cotangents.size(), ", wanted ", raw.size(),
                    ", one for each tensor of raw");
  for (size_t k = 0; k < raw.size(); ++k) {
    TORCH_CHECK_VALUE(cotangents[k].sym_sizes() == raw[k].sym_sizes(), "cotangents[", k, "]: got shape ",
                      cotangents[k].sym_sizes(), ", wanted ", raw[k].sym_sizes(), ", that of raw[", k, "]");
    TORCH_CHECK_VALUE(cotangents[k].scalar_type() == raw[k].scalar_type(), "cotangents[", k, "]: got dtype ",
                      cotangents[k].scalar_type(), ", wanted ", raw[k].scalar_type(), ", that of raw[", k, "]");
  }
}

// Calls body(kernels, T()) with those of the device of `t` for its type T.
template <class Body>
void with_kernels(const Tensor& t, const Body& body) {
  const auto& device = registered_device(t);
  t.scalar_type() == at::kDouble ? body(device.weights_float64, double()) : body(device.weights_float32, float());
}

std::vector<Tensor> run_softplus(at::TensorList raw) {
  check(raw);
  std::vector<Tensor> weights;
  weights.reserve(raw.size());
  for (const auto& r : raw) {
    const auto from = r.contiguous();
    const auto& to = weights.emplace_back(allocate(r, r.sizes(), r.scalar_type()));
    with_kernels(r, [&]<class T>(const WeightKernels<T>& kernels, T) {
      kernels.softplus(to.data_ptr<T>(), from.data_ptr<T>(), r.numel());
    });
  }
  return weights;
}

std::vector<Tensor> run_softplus_backward(at::TensorList raw, at::TensorList cotangents) {
  check_cotangents(raw, cotangents);
  std::vector<Tensor> gradients;
  gradients.reserve(raw.size());
  for (size_t k = 0; k < raw.size(); ++k) {
    const auto from = raw[k].contiguous(), cotangent = cotangents[k].contiguous();
    const auto& to = gradients.emplace_back(allocate(from, from.sizes(), from.scalar_type()));
    with_kernels(from, [&]<class T>(const WeightKernels<T>& kernels, T) {
      kernels.softplus_backward(to.data_ptr<T>(), from.data_ptr<T>(), cotangent.data_ptr<T>(), from.numel());
    });
  }
  return gradients;
}

std::vector<Tensor> softplus_meta(at::TensorList raw) {
  check(raw);
  std::vector<Tensor> weights;
  for (const auto& r : raw) weights.push_back(at::empty_symint(r.sym_sizes(), r.options()));
  return weights;
}

std::vector<Tensor> softplus_backward_meta(at::TensorList raw, at::TensorList cotangents) {
  check_cotangents(raw, cotangents);
  return softplus_meta(raw);
}

struct SoftplusFunction : Function<SoftplusFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList raw) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(raw.vec());
    ctx->set_materialize_grads(false);
    return softplus().call(raw);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const auto raw = ctx->get_saved_variables();
    variable_list gradients(raw.size()), wanted, given;
    std::vector<size_t> needed;
    for (size_t k = 0; k < raw.size(); ++k) {
      if (!cotangents[k].defined() || !ctx->needs_input_grad(k)) continue;
      needed.push_back(k);
      wanted.push_back(raw[k]);
      given.push_back(cotangents[k]);
    }
    if (needed.empty()) return gradients;
    if (at::GradMode::is_enabled()) {  // by ATen, which is differentiable again
      for (const auto k : needed) gradients[k] = cotangents[k] * at::sigmoid(raw[k]);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      auto terms =
          for_each_cotangent(given, [&](const variable_list& c) { return softplus_backward().call(wanted, c); });
      for (size_t i = 0; i < needed.size(); ++i) gradients[needed[i]] = std::move(terms[i]);
    }
    return gradients;
  }
};

std::vector<Tensor> softplus_autograd(at::TensorList raw) {
  bool records = false;
  for (const auto& r : raw) {
    TORCH_CHECK_NOT_IMPLEMENTED(!r._fw_grad(0).defined(), "softplus: the operator itself has no forward-mode ",
                                "derivative; il.NonNegative has one");
    records = records || r.requires_grad();
  }
  if (records && at::GradMode::is_enabled()) return SoftplusFunction::apply(raw);
  at::AutoDispatchBelowADInplaceOrView guard;
  return softplus().call(raw);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ilvae_fast, m) {
  const std::vector<at::Tag> tags{at::Tag::flexible_layout, at::Tag::pt2_compliant_tag};
  m.def("softplus(Tensor[] raw) -> Tensor[]", tags);
  m.def("softplus_backward(Tensor[] raw, Tensor[] cotangents) -> Tensor[]", tags);
}

TORCH_LIBRARY_IMPL(ilvae_fast, CPU, m) {
  m.impl("softplus", run_softplus);
  m.impl("softplus_backward", run_softplus_backward);
}

TORCH_LIBRARY_IMPL(ilvae_fast, Meta, m) {
  m.impl("softplus", softplus_meta);
  m.impl("softplus_backward", softplus_backward_meta);
}

TORCH_LIBRARY_IMPL(ilvae_fast, Autograd, m) { m.impl("softplus", softplus_autograd); }

}  // namespace ilvae::ops
