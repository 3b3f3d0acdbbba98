// First and second order autograd: each operator's backward calls the operator of the next order. The last,
// *_backward, differentiate the plain Python version and so hold to any order (ilvae_fast/ops.py).
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "batched.h"
#include "ops.h"
#include "problem.h"

namespace ilvae::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Arguments of a call that autograd does not see; one object, because every entry of saved_data costs a microsecond.
struct Static : torch::CustomClassHolder {
  std::vector<int64_t> activations;
  std::vector<double> parameters;
  OptionalType product_dtype;
  int64_t route = 0;
  bool want_potential = false, want_map = false, recompute = false;
  OptionalType saved_dtype;
  int64_t wanted = 0;
  std::vector<Tensor> saved;
  Tensor unwanted;  // potential or map as it comes back where not wanted

  Static(at::IntArrayRef activations, Floats parameters, OptionalType product_dtype, int64_t route)
      : activations(activations.vec()), parameters(parameters.vec()), product_dtype(product_dtype), route(route) {}
};
using StaticPointer = c10::intrusive_ptr<Static>;

void store(AutogradContext* ctx, const StaticPointer& s) { ctx->saved_data["static"] = c10::IValue::make_capsule(s); }
const Static& load(AutogradContext* ctx) { return *static_cast<Static*>(ctx->saved_data["static"].toCapsule().get()); }

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Whether autograd has to see a call. Forward mode never can: that is what the Python functions are for.
template <class... Tensors>
bool records(const char* name, at::TensorList weights, const Tensors&... tensors) {
  bool requires_grad = false;
  const auto look = [&](const Tensor& t) {
    if (!t.defined()) return;
    TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(0).defined(), name,
                                ": the operator itself has no forward-mode derivative; call it through "
                                "ilvae_fast.functional or a layer, which have one");
    requires_grad = requires_grad || t.requires_grad();
  };
  for (const auto& w : weights) look(w);
  (look(tensors), ...);
  return requires_grad && at::GradMode::is_enabled();
}

// Runs `call` with autocast off: a backward pass computes in the dtypes of its forward pass.
template <class Call>
auto without_autocast(const Call& call) {
  c10::impl::ExcludeDispatchKeyGuard off(c10::autocast_dispatch_keyset);
  return call();
}

// Runs `call` so that autograd sees it only under create_graph.
template <class Call>
auto at_next_order(const Call& call) {
  return without_autocast([&] {
    if (at::GradMode::is_enabled()) return call();
    at::AutoDispatchBelowADInplaceOrView guard;
    return call();
  });
}

// Bit i says whether edge i of a node, counted over its defined tensor arguments, is asked for.
class Edges {
 public:
  explicit Edges(AutogradContext* ctx) : ctx_(ctx) {}
  bool next(bool defined) { return defined && ctx_->needs_input_grad(edge_++); }

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

struct PotentialAndMapFunction : Function<PotentialAndMapFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                               const Tensor& constant, const OptionalTensor& embedding, at::TensorList weights,
                               const StaticPointer& s) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [potential, map, saved] =
        potential_and_map().call(x, skip_weight, bias, weights, constant, embedding, s->activations, s->parameters,
                                 s->want_potential, s->want_map,
                                 /*save=*/!s->recompute, s->product_dtype, s->route, s->recompute, s->saved_dtype);
    variable_list kept{x, skip_weight, bias, constant, embedding.value_or(Tensor())};
    kept.insert(kept.end(), weights.begin(), weights.end());
    kept.insert(kept.end(), saved.begin(), saved.end());
    ctx->save_for_backward(kept);
    ctx->set_materialize_grads(false);
    store(ctx, s);
    // only what is wanted: autograd wraps every output
    if (s->want_potential && s->want_map) return {potential, map};
    s->unwanted = s->want_map ? potential : map;
    return {s->want_map ? map : potential};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Static& s = load(ctx);
    const auto layers = s.activations.size() - 1;
    const auto kept = ctx->get_saved_variables();
    const at::TensorList weights(kept.data() + grad_weights, layers);
    const at::TensorList saved(kept.data() + grad_weights + layers, kept.size() - grad_weights - layers);
    variable_list gradients(grad_weights + layers + 1);  // and Static
    if (std::none_of(cotangents.begin(), cotangents.end(), [](const Tensor& c) { return c.defined(); })) {
      return gradients;
    }
    if (!s.want_potential) cotangents.insert(cotangents.begin(), Tensor());
    if (!s.want_map) cotangents.push_back(Tensor());
    Edges edges(ctx);
    int64_t wanted = 0;
    for (size_t i = 0; i < grad_weights + layers; ++i) wanted |= int64_t(edges.next(kept[i].defined())) << i;
    auto terms = at_next_order([&] {
      return for_each_cotangent(cotangents, [&](const variable_list& c) {
        return training_terms().call(kept[grad_x], kept[grad_skip_weight], kept[grad_bias], weights,
                                     kept[grad_inverse_lipschitz], optional(kept[grad_embedding]), optional(c[1]),
                                     optional(c[0]), saved, s.activations, s.parameters, wanted, s.product_dtype,
                                     s.route);
      });
    });
    for (size_t i = 0; i < terms.size(); ++i) {
      if ((wanted >> i) & 1) gradients[i] = std::move(terms[i]);
    }
    return gradients;
  }
};

struct TrainingTermsFunction : Function<TrainingTermsFunction> {
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& map_cotangent,
                               const OptionalTensor& potential_cotangent, const Tensor& x, const Tensor& skip_weight,
                               const Tensor& bias, const Tensor& constant, const OptionalTensor& embedding,
                               at::TensorList weights, const StaticPointer& s) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = std::move(s->saved);  // not for the next order
    auto terms =
        training_terms().call(x, skip_weight, bias, weights, constant, embedding, map_cotangent, potential_cotangent,
                              saved, s->activations, s->parameters, s->wanted, s->product_dtype, s->route);
    variable_list kept{
        map_cotangent.value_or(Tensor()), potential_cotangent.value_or(Tensor()), x, skip_weight, bias, constant,
        embedding.value_or(Tensor())};
    kept.insert(kept.end(), weights.begin(), weights.end());
    ctx->save_for_backward(kept);
    store(ctx, s);
    variable_list unwanted;
    for (size_t i = 0; i < terms.size(); ++i) {
      if (!((s->wanted >> i) & 1)) unwanted.push_back(terms[i]);
    }
    ctx->mark_non_differentiable(unwanted);
    return terms;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Static& s = load(ctx);
    const auto kept = ctx->get_saved_variables();
    constexpr size_t first = 2;  // x
    Edges edges(ctx);
    int64_t needed = 0;
    for (size_t i = 0; i < kept.size(); ++i) needed |= int64_t(edges.next(kept[i].defined())) << i;
    variable_list given;
    for (size_t i = 0; i < cotangents.size(); ++i) {
      if ((s.wanted >> i) & 1) given.push_back(cotangents[i]);
    }
    auto terms = without_autocast([&] {
      return for_each_cotangent(given, [&](const variable_list& c) {
        return training_terms_backward().call(c, kept[first + grad_x], kept[first + grad_skip_weight],
                                              kept[first + grad_bias], at::TensorList(kept).slice(first + grad_weights),
                                              kept[first + grad_inverse_lipschitz],
                                              optional(kept[first + grad_embedding]), optional(kept[0]),
                                              optional(kept[1]), s.activations, s.parameters, s.wanted, needed);
      });
    });
    variable_list gradients(kept.size() + 1);
    for (size_t i = 0; i < kept.size(); ++i) {
      if ((needed >> i) & 1) gradients[i] = std::move(terms[i]);
    }
    return gradients;
  }
};

struct MapJvpFunction : Function<MapJvpFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& tangent, const Tensor& x, const Tensor& skip_weight,
                               const Tensor& bias, const Tensor& constant, const OptionalTensor& embedding,
                               at::TensorList weights, const StaticPointer& s) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [map, map_tangent] = map_jvp().call(x, skip_weight, bias, weights, constant, embedding, tangent,
                                             s->activations, s->parameters, s->product_dtype, s->route);
    variable_list kept{tangent, x, skip_weight, bias, constant, embedding.value_or(Tensor())};
    kept.insert(kept.end(), weights.begin(), weights.end());
    ctx->save_for_backward(kept);
    store(ctx, s);
    return {map, map_tangent};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Static& s = load(ctx);
    const auto kept = ctx->get_saved_variables();
    constexpr size_t first = 1;  // x
    Edges edges(ctx);
    int64_t needed = 0;
    for (size_t i = 0; i < kept.size(); ++i) needed |= int64_t(edges.next(kept[i].defined())) << i;
    auto terms = without_autocast([&] {
      return for_each_cotangent(cotangents, [&](const variable_list& c) {
        return map_jvp_backward().call(c, kept[first + grad_x], kept[first + grad_skip_weight], kept[first + grad_bias],
                                       at::TensorList(kept).slice(first + grad_weights),
                                       kept[first + grad_inverse_lipschitz], optional(kept[first + grad_embedding]),
                                       kept[0], s.activations, s.parameters, needed);
      });
    });
    variable_list gradients(kept.size() + 1);
    for (size_t i = 0; i < kept.size(); ++i) {
      if ((needed >> i) & 1) gradients[i] = std::move(terms[i]);
    }
    return gradients;
  }
};

// The kernels at the Autograd key

std::tuple<Tensor, Tensor, std::vector<Tensor>> potential_and_map_autograd(
    const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
    const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
    Floats activation_parameters, bool want_potential, bool want_map, bool save, OptionalType product_dtype,
    int64_t route, std::optional<bool> recompute, OptionalType saved_dtype) {
  const bool recorded =
      records("potential_and_map", weights, x, skip_weight, bias, inverse_lipschitz, embedding.value_or(Tensor()));
  if (!recorded || !(want_potential || want_map)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return potential_and_map().call(x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations,
                                    activation_parameters, want_potential, want_map, save, product_dtype, route,
                                    recompute, saved_dtype);
  }
  TORCH_CHECK_VALUE(!save, "save: got True, wanted False: autograd saves what it needs itself");
  // settled here, where even a fake tensor knows its device
  const auto operand = product_dtype.value_or(x.scalar_type());
  const auto choice = choice_of(x, skip_weight, weights, embedding.has_value(), operand, route, recompute);
  const auto s = c10::make_intrusive<Static>(activations, activation_parameters, product_dtype, int64_t(choice.route));
  s->want_potential = want_potential;
  s->want_map = want_map;
  s->recompute = choice.recompute;
  s->saved_dtype = operand == at::kBFloat16 && !x.is_cuda() ? at::kFloat : operand;
  auto values = PotentialAndMapFunction::apply(x, skip_weight, bias, inverse_lipschitz, embedding, weights, s);
  if (want_potential && want_map) return {values[0], values[1], {}};
  if (want_map) return {std::move(s->unwanted), values[0], {}};
  return {values[0], std::move(s->unwanted), {}};
}

std::vector<Tensor> training_terms_autograd(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                            at::TensorList weights, const Tensor& inverse_lipschitz,
                                            const OptionalTensor& embedding, const OptionalTensor& map_cotangent,
                                            const OptionalTensor& potential_cotangent, at::TensorList saved,
                                            at::IntArrayRef activations, Floats activation_parameters, int64_t wanted,
                                            OptionalType product_dtype, int64_t route) {
  if (!records("training_terms", weights, x, skip_weight, bias, inverse_lipschitz, embedding.value_or(Tensor()),
               map_cotangent.value_or(Tensor()), potential_cotangent.value_or(Tensor()))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return training_terms().call(x, skip_weight, bias, weights, inverse_lipschitz, embedding, map_cotangent,
                                 potential_cotangent, saved, activations, activation_parameters, wanted, product_dtype,
                                 route);
  }
  const auto s = c10::make_intrusive<Static>(activations, activation_parameters, product_dtype, route);
  s->wanted = wanted;
  s->saved = saved.vec();
  return TrainingTermsFunction::apply(map_cotangent, potential_cotangent, x, skip_weight, bias, inverse_lipschitz,
                                      embedding, weights, s);
}

std::tuple<Tensor, Tensor> map_jvp_autograd(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                            at::TensorList weights, const Tensor& inverse_lipschitz,
                                            const OptionalTensor& embedding, const Tensor& tangent,
                                            at::IntArrayRef activations, Floats activation_parameters,
                                            OptionalType product_dtype, int64_t route) {
  if (!records("map_jvp", weights, x, skip_weight, bias, inverse_lipschitz, embedding.value_or(Tensor()), tangent)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return map_jvp().call(x, skip_weight, bias, weights, inverse_lipschitz, embedding, tangent, activations,
                          activation_parameters, product_dtype, route);
  }
  const auto s = c10::make_intrusive<Static>(activations, activation_parameters, product_dtype, route);
  auto values = MapJvpFunction::apply(tangent, x, skip_weight, bias, inverse_lipschitz, embedding, weights, s);
  return {values[0], values[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(ilvae_fast, Autograd, m) {
  m.impl("potential_and_map", potential_and_map_autograd);
  m.impl("training_terms", training_terms_autograd);
  m.impl("map_jvp", map_jvp_autograd);
}

}  // namespace ilvae::ops
