// First and second order autograd: each operator's backward calls the operator of the next order. The last,
// *_backward, differentiate the plain Python version and so hold to any order.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "route.h"
#include "torch/batching.h"
#include "torch/operators.h"

namespace ilvae::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What a node keeps besides tensors. It travels as one value, because every entry of saved_data costs a microsecond,
// and as numbers, because compiled autograd hashes what it finds there.
struct Static {
  PerLayer<int64_t> activations;
  PerLayer<double> parameters;
  OptionalType product_dtype;
  int64_t route = 0;
  int64_t wanted = 0;  // gradients by bits, or: bit 0 the potential, bit 1 the map

  Static(const Operands& o, int64_t route, int64_t wanted)
      : activations(o.activations.begin(), o.activations.end()),
        parameters(o.activation_parameters.begin(), o.activation_parameters.end()),
        product_dtype(o.product_dtype),
        route(route),
        wanted(wanted) {}

  explicit Static(AutogradContext* ctx) {
    const auto& packed = ctx->saved_data["static"].toTupleRef().elements();
    const auto type = packed[0].toInt();
    if (type >= 0) product_dtype = static_cast<at::ScalarType>(type);
    route = packed[1].toInt();
    wanted = packed[2].toInt();
    for (size_t i = 3; i < packed.size(); i += 2) {
      activations.push_back(packed[i].toInt());
      parameters.push_back(packed[i + 1].toDouble());
    }
  }

  void keep(AutogradContext* ctx) const {
    std::vector<c10::IValue> packed;
    packed.reserve(3 + 2 * activations.size());
    packed.emplace_back(product_dtype ? int64_t(*product_dtype) : int64_t(-1));
    packed.emplace_back(route);
    packed.emplace_back(wanted);
    for (size_t k = 0; k < activations.size(); ++k) {
      packed.emplace_back(activations[k]);
      packed.emplace_back(parameters[k]);
    }
    ctx->saved_data["static"] = c10::ivalue::Tuple::create(std::move(packed));
  }
};

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// The operands among the saved tensors of a node, from place `first` on in the order of `Gradient`.
class Kept {
 public:
  Kept(const variable_list& tensors, size_t first, const Static& s)
      : embedding_(optional(tensors[first + grad_embedding])),
        operands{tensors[first + grad_x],
                 tensors[first + grad_skip_weight],
                 tensors[first + grad_bias],
                 at::TensorList(tensors).slice(first + grad_weights, s.activations.size() - 1),
                 tensors[first + grad_inverse_lipschitz],
                 embedding_,
                 s.activations,
                 s.parameters,
                 s.product_dtype,
                 s.route} {}
  Kept(const Kept&) = delete;

 private:
  OptionalTensor embedding_;

 public:
  const Operands operands;
};

// `own` tensors of an operator, and then the operands in the order of `Gradient`.
variable_list in_order(variable_list own, const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                       const Tensor& constant, const OptionalTensor& embedding, at::TensorList weights) {
  own.reserve(own.size() + grad_weights + weights.size() + 3);  // and what potential_and_map saves
  for (const auto* const t : {&x, &skip_weight, &bias, &constant}) own.push_back(*t);
  own.push_back(embedding ? *embedding : Tensor());
  own.insert(own.end(), weights.begin(), weights.end());
  return own;
}

// Bit i says whether autograd asks for the gradient of tensor i, of the first `count` that a node has saved.
int64_t needed_of(AutogradContext* ctx, const variable_list& tensors, size_t count) {
  int64_t needed = 0;
  size_t edge = 0;  // counted over the defined tensors
  for (size_t i = 0; i < count; ++i) needed |= int64_t(tensors[i].defined() && ctx->needs_input_grad(edge++)) << i;
  return needed;
}

// The gradients that were needed, of `count` tensors and the Static behind them.
variable_list spread(variable_list terms, int64_t needed, size_t count) {
  variable_list gradients(count + 1);
  for (size_t i = 0; i < count; ++i) {
    if ((needed >> i) & 1) gradients[i] = std::move(terms[i]);
  }
  return gradients;
}

// Whether autograd has to see a call. Forward mode never can: that is what the Python functions are for.
template <class... Own>
bool records(const char* name, const Operands& o, const Own&... own) {
  bool requires_grad = false;
  const auto look = [&](const Tensor& t) {
    if (!t.defined()) return;
    TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(0).defined(), name,
                                ": the operator itself has no forward-mode derivative; call it through "
                                "ilvae_fast.functional or a layer, which have one");
    requires_grad = requires_grad || t.requires_grad();
  };
  for (size_t i = 0; i < o.gradients(); ++i) look(o[i]);
  (look(own), ...);
  return requires_grad && at::GradMode::is_enabled();
}

// Runs `body` with autocast off: a backward pass computes in the dtypes of its forward pass.
template <class Body>
auto without_autocast(const Body& body) {
  c10::impl::ExcludeDispatchKeyGuard off(c10::autocast_dispatch_keyset);
  return body();
}

// Runs `body` so that autograd sees it only under create_graph.
template <class Body>
auto at_next_order(const Body& body) {
  return without_autocast([&] {
    if (at::GradMode::is_enabled()) return body();
    at::AutoDispatchBelowADInplaceOrView guard;
    return body();
  });
}

struct PotentialAndMapFunction : Function<PotentialAndMapFunction> {
  // `whole`: all results of the call, of which autograd sees only what is wanted: it wraps every output.
  using Whole = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                               const Tensor& constant, const OptionalTensor& embedding, at::TensorList weights,
                               const Static& s, const Choice& choice, Whole& whole) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Operands o{x,         skip_weight,   bias,         weights,         constant,
                     embedding, s.activations, s.parameters, s.product_dtype, s.route};
    const Settled settled(o, choice);
    const bool want_potential = s.wanted & 1, want_map = s.wanted & 2;
    whole = call<PotentialAndMap>(o, want_potential, want_map, /*save=*/!choice.recompute,
                                  std::optional<bool>(choice.recompute), OptionalType(saved_dtype(o)));
    auto& [potential, map, saved] = whole;
    auto kept = in_order({}, x, skip_weight, bias, constant, embedding, weights);
    kept.insert(kept.end(), saved.begin(), saved.end());
    ctx->save_for_backward(std::move(kept));
    ctx->set_materialize_grads(false);
    s.keep(ctx);
    if (want_potential && want_map) return {potential, map};
    return {want_map ? map : potential};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Static s(ctx);
    const auto tensors = ctx->get_saved_variables();
    const Kept kept(tensors, 0, s);
    const auto count = kept.operands.gradients();
    if (std::none_of(cotangents.begin(), cotangents.end(), [](const Tensor& c) { return c.defined(); })) {
      return variable_list(count + 3);
    }
    if (!(s.wanted & 1)) cotangents.insert(cotangents.begin(), Tensor());
    if (!(s.wanted & 2)) cotangents.push_back(Tensor());
    const auto needed = needed_of(ctx, tensors, count);
    const auto saved = at::TensorList(tensors).slice(count);
    auto gradients =
        spread(at_next_order([&] {
                 return for_each_cotangent(cotangents, [&](const variable_list& c) {
                   return call<TrainingTerms>(kept.operands, optional(c[1]), optional(c[0]), saved, needed);
                 });
               }),
               needed, count);
    gradients.resize(count + 3);  // Static, Choice, Whole
    return gradients;
  }
};

// Saved tensors on their way past autograd, which would take a list for inputs.
struct Unseen {
  at::TensorList saved;
};

struct TrainingTermsFunction : Function<TrainingTermsFunction> {
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& map_cotangent,
                               const OptionalTensor& potential_cotangent, const Tensor& x, const Tensor& skip_weight,
                               const Tensor& bias, const Tensor& constant, const OptionalTensor& embedding,
                               at::TensorList weights, const Static& s, const Unseen& unseen) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Operands o{x,         skip_weight,   bias,         weights,         constant,
                     embedding, s.activations, s.parameters, s.product_dtype, s.route};
    auto terms = call<TrainingTerms>(o, map_cotangent, potential_cotangent, unseen.saved, s.wanted);
    // not what was saved: the next order cannot use it
    ctx->save_for_backward(in_order({map_cotangent.value_or(Tensor()), potential_cotangent.value_or(Tensor())}, x,
                                    skip_weight, bias, constant, embedding, weights));
    s.keep(ctx);
    const Gradients wanted{s.wanted, terms.size()};
    variable_list unwanted;
    for (size_t i = 0; i < terms.size(); ++i) {
      if (!wanted[i]) unwanted.push_back(terms[i]);
    }
    ctx->mark_non_differentiable(unwanted);
    return terms;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Static s(ctx);
    const auto tensors = ctx->get_saved_variables();
    const Kept kept(tensors, 2, s);
    const auto needed = needed_of(ctx, tensors, tensors.size());
    const Gradients wanted{s.wanted, cotangents.size()};
    variable_list given;
    for (size_t i = 0; i < cotangents.size(); ++i) {
      if (wanted[i]) given.push_back(cotangents[i]);
    }
    auto gradients =
        spread(without_autocast([&] {
                 return for_each_cotangent(given, [&](const variable_list& c) {
                   return call<TrainingTermsBackward>(kept.operands, at::TensorList(c), optional(tensors[0]),
                                                      optional(tensors[1]), s.wanted, needed);
                 });
               }),
               needed, tensors.size());
    gradients.emplace_back();  // what was saved
    return gradients;
  }
};

struct MapJvpFunction : Function<MapJvpFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& tangent, const Tensor& x, const Tensor& skip_weight,
                               const Tensor& bias, const Tensor& constant, const OptionalTensor& embedding,
                               at::TensorList weights, const Static& s) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Operands o{x,         skip_weight,   bias,         weights,         constant,
                     embedding, s.activations, s.parameters, s.product_dtype, s.route};
    auto [map, map_tangent] = call<MapJvp>(o, tangent);
    ctx->save_for_backward(in_order({tangent}, x, skip_weight, bias, constant, embedding, weights));
    s.keep(ctx);
    return {map, map_tangent};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Static s(ctx);
    const auto tensors = ctx->get_saved_variables();
    const Kept kept(tensors, 1, s);
    const auto needed = needed_of(ctx, tensors, tensors.size());
    return spread(without_autocast([&] {
                    return for_each_cotangent(cotangents, [&](const variable_list& c) {
                      return call<MapJvpBackward>(kept.operands, at::TensorList(c), tensors[0], needed);
                    });
                  }),
                  needed, tensors.size());
  }
};

// The kernels at the Autograd key

std::tuple<Tensor, Tensor, std::vector<Tensor>> potential_and_map(const Operands& o, bool want_potential, bool want_map,
                                                                  bool save, std::optional<bool> recompute,
                                                                  OptionalType saved_dtype) {
  if (!records(PotentialAndMap::name, o) || !(want_potential || want_map)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call<PotentialAndMap>(o, want_potential, want_map, save, recompute, saved_dtype);
  }
  TORCH_CHECK_VALUE(!save, "save: got True, wanted False: autograd saves what it needs itself");
  o.check();
  const auto choice = choose(o, recompute);  // here, where even a fake tensor knows its device
  const Static s(o, int64_t(choice.route), int64_t(want_potential) | int64_t(want_map) << 1);
  PotentialAndMapFunction::Whole whole;
  auto values = PotentialAndMapFunction::apply(o.x, o.skip_weight, o.bias, o.inverse_lipschitz, o.embedding, o.weights,
                                               s, choice, whole);
  auto& [potential, map, saved] = whole;
  if (want_potential && want_map) return {values[0], values[1], {}};
  if (want_map) return {std::move(potential), values[0], {}};
  return {values[0], std::move(map), {}};
}

std::vector<Tensor> training_terms(const Operands& o, const OptionalTensor& map_cotangent,
                                   const OptionalTensor& potential_cotangent, at::TensorList saved, int64_t wanted) {
  if (!records(TrainingTerms::name, o, map_cotangent.value_or(Tensor()), potential_cotangent.value_or(Tensor()))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call<TrainingTerms>(o, map_cotangent, potential_cotangent, saved, wanted);
  }
  return TrainingTermsFunction::apply(map_cotangent, potential_cotangent, o.x, o.skip_weight, o.bias,
                                      o.inverse_lipschitz, o.embedding, o.weights, Static(o, o.route, wanted),
                                      Unseen{saved});
}

std::tuple<Tensor, Tensor> map_jvp(const Operands& o, const Tensor& tangent) {
  if (!records(MapJvp::name, o, tangent)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call<MapJvp>(o, tangent);
  }
  auto values = MapJvpFunction::apply(tangent, o.x, o.skip_weight, o.bias, o.inverse_lipschitz, o.embedding, o.weights,
                                      Static(o, o.route, 0));
  return {values[0], values[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(ilvae_fast, Autograd, m) {
  implement<PotentialAndMap, potential_and_map>(m);
  implement<TrainingTerms, training_terms>(m);
  implement<MapJvp, map_jvp>(m);
}

}  // namespace ilvae::ops
