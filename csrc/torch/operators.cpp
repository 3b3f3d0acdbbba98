// Schemas of the operators and their kernels for the keys CPU, CUDA, Meta and Autocast. Autograd is in autograd.cpp.
#include "torch/operators.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "route.h"

namespace ilvae::ops {

namespace {

thread_local const Settled* innermost = nullptr;

}  // namespace

Settled::Settled(const Operands& operands, const Choice& choice)
    : operands_(operands), choice_(choice), outer_(innermost) {
  innermost = this;
}
Settled::~Settled() { innermost = outer_; }

const Choice* Settled::find(const Operands& o) {
  if (!innermost) return nullptr;
  const auto& settled = innermost->operands_;
  bool same = o.route == int64_t(innermost->choice_.route) && o.weights.size() == settled.weights.size() &&
              o.activations.data() == settled.activations.data() &&
              o.activation_parameters.data() == settled.activation_parameters.data() &&
              o.product_dtype == settled.product_dtype && o.dense() == settled.dense();
  for (size_t i = 0; same && i < o.gradients(); ++i) same = o[i].is_same(settled[i]);
  return same ? &innermost->choice_ : nullptr;
}

namespace {

// What potential_and_map saves, and what training_terms reads through bare pointers

c10::SymInt rows_of(const Operands& o) {
  c10::SymInt rows = 1;
  for (const auto& size : o.x.sym_sizes().slice(0, o.x.dim() - 1)) rows = rows * size;
  return rows;
}
c10::SymInt saved_rows(const Operands& o, Route route) {
  return route == Route::fused ? padded_rows(rows_of(o)) : rows_of(o);
}
c10::SymInt saved_columns(const Operands& o, Route route) {
  const auto units = o.skip_weight.sym_size(0) - 1;
  return route == Route::fused ? units + 1 : padded_units(units);
}

void check_saved(const Operands& o, at::TensorList saved, Route route) {
  if (saved.empty()) return;
  TORCH_CHECK_VALUE(saved.size() == 3, "saved: got ", saved.size(), " tensors, wanted none or 3");
  const auto rows = saved_rows(o, route);
  const auto units = o.skip_weight.sym_size(0) - 1;
  const auto dtype = saved[0].scalar_type();
  TORCH_CHECK_VALUE(dtype == saved_dtype(o) || (!o.x.is_cpu() && dtype == o.output_dtype()), "saved[0]: got dtype ",
                    dtype, ", wanted ", saved_dtype(o));
  const auto check = [&](size_t i, const c10::SymInt& height, const c10::SymInt& width, at::ScalarType wanted) {
    const auto& t = saved[i];
    TORCH_CHECK_VALUE(t.dim() == 2 && t.sym_size(0) == height && t.sym_size(1) == width && t.scalar_type() == wanted &&
                          t.device() == o.x.device() && t.is_contiguous(),
                      "saved[", i, "]: got ", t.sym_sizes(), " in ", t.scalar_type(), ", wanted a contiguous (", height,
                      ", ", width, ") in ", wanted, ", as potential_and_map saved it");
  };
  check(0, rows, saved_columns(o, route), dtype);
  const auto none = [&](size_t i) { return saved[i].dim() == 1 && saved[i].sym_size(0) == 0; };
  if (!none(1)) check(1, rows, units - o.weights.back().sym_size(1), dtype);
  if (o.dense()) check(2, units + 1, o.x.sym_size(-1), o.output_dtype());
}

void check_cotangents(const Operands& o, const OptionalTensor& map_cotangent, const OptionalTensor& potential_cotangent,
                      at::TensorList saved, int64_t wanted, Route route) {
  TORCH_CHECK_VALUE(map_cotangent || potential_cotangent,
                    "map_cotangent and potential_cotangent: got neither, wanted at least one");
  if (map_cotangent) o.check_rows("map_cotangent", *map_cotangent, o.skip_weight.sym_size(1));
  if (potential_cotangent) o.check_rows("potential_cotangent", *potential_cotangent, std::nullopt);
  check_saved(o, saved, route);
  o.check_wanted(wanted);
}

// CPU and CUDA devices: checks, one choice, and the route's work on flattened rows

Tensor flat(const OptionalTensor& t, const Operands& o, int64_t columns) {
  if (!t) return {};
  if (o.x.dim() == 2) return *t;
  const int64_t rows = c10::multiply_integers(o.x.sizes().slice(0, o.x.dim() - 1));
  return columns > 0 ? t->reshape({rows, columns}) : t->reshape({rows});
}

Tensor shaped(const Tensor& t, at::IntArrayRef sizes) { return t.sizes() == sizes ? t : t.view(sizes); }

at::IntArrayRef leading(const Tensor& x) { return x.sizes().slice(0, x.dim() - 1); }

c10::DimVector with_last(at::IntArrayRef sizes, int64_t last) {
  c10::DimVector all(sizes.begin(), sizes.end());
  all.push_back(last);
  return all;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> run_potential_and_map(const Operands& o, bool want_potential,
                                                                      bool want_map, bool save,
                                                                      std::optional<bool> /*recompute: for autograd*/,
                                                                      OptionalType /*saved_dtype: for fake tensors*/) {
  const auto* const settled = Settled::find(o);
  if (!settled) o.check();
  const auto route = settled ? settled->route : (save ? choose(o, std::nullopt) : choose_for_map(o)).route;
  TORCH_CHECK_VALUE(!save || route == Route::matmul || registered_device(o.x).fused_saves,
                    "save: got True, wanted False on the fused route of a ", o.x.device().type(),
                    " device, whose training terms recompute; the matmul route (", int64_t(Route::matmul), ") saves");
  auto values = implementation(route, o.x).potential_and_map(o, {want_potential, want_map, save});
  const auto none = [&] { return allocate(o.x, {0}, o.output_dtype()); };
  return {want_potential ? shaped(values.potential, leading(o.x)) : none(),
          want_map ? shaped(values.map, with_last(leading(o.x), o.width())) : none(), std::move(values.saved)};
}

std::vector<Tensor> run_training_terms(const Operands& o, const OptionalTensor& map_cotangent,
                                       const OptionalTensor& potential_cotangent, at::TensorList saved,
                                       int64_t wanted) {
  o.check();
  const auto route = choose(o, std::nullopt).route;
  check_cotangents(o, map_cotangent, potential_cotangent, saved, wanted, route);
  const Cotangents cotangents{flat(map_cotangent, o, o.width()), flat(potential_cotangent, o, 0), saved};
  const Gradients flags{wanted, o.gradients()};
  auto gradients = implementation(route, o.x).training_terms(o, cotangents, flags);
  for (size_t i = 0; i < flags.count; ++i) {
    auto& gradient = gradients[i];
    gradient =
        flags[i] ? shaped(in_dtype(gradient, o[i].scalar_type()), o[i].sizes()) : allocate(o.x, {0}, o.output_dtype());
  }
  return gradients;
}

std::tuple<Tensor, Tensor> run_map_jvp(const Operands& o, const Tensor& tangent) {
  o.check();
  o.check_rows("tangent", tangent, o.x.sym_size(-1));
  auto route = choose(o, std::nullopt).route;
  if (!implementation(route, o.x).map_jvp) route = Route::matmul;
  auto [map, map_tangent] = implementation(route, o.x).map_jvp(o, flat(tangent, o, o.x.size(-1)));
  const auto sizes = with_last(leading(o.x), o.width());
  return {map.view(sizes), map_tangent.view(sizes)};
}

// On CUDA devices, of which a build may know nothing. Errors of their kernels name operator and shape.
template <class Op, auto function, class Signature = std::remove_pointer_t<decltype(function)>>
struct OnCuda;
template <class Op, auto function, class Result, class... Rest>
struct OnCuda<Op, function, Result(const Operands&, Rest...)> {
  static Result call(const Operands& o, Rest... rest) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        find_device(c10::DeviceType::CUDA), Op::name,
        ": x: got a CUDA tensor, but this build of ilvae_fast has no CUDA kernels. Move tensors and modules to the "
        "CPU, "
        "or run the plain autograd version on the GPU: with ilvae_fast.use_backend(\"reference\"): ...");
    const c10::DeviceGuard guard(o.x.device());
    try {
      return function(o, rest...);
    } catch (c10::ValueError&) {
      throw;
    } catch (c10::Error& error) {
      std::ostringstream where;
      where << Op::name << " in " << c10::toString(o.x.scalar_type()) << " with x " << o.x.sizes() << ", skip_weight "
            << o.skip_weight.sizes() << " on " << o.x.device();
      error.add_context(where.str());
      throw;
    }
  }
};

// Meta: the same checks, shapes without work

Tensor meta(const Operands& o, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return at::empty_symint(sizes, o.x.options().dtype(dtype));
}

Tensor meta_map(const Operands& o) {
  auto sizes = o.x.sym_sizes().vec();
  sizes.back() = o.skip_weight.sym_size(1);
  return meta(o, sizes, o.output_dtype());
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> meta_potential_and_map(const Operands& o, bool want_potential,
                                                                       bool want_map, bool save,
                                                                       std::optional<bool> /*recompute*/,
                                                                       OptionalType given) {
  o.check();
  const auto output = o.output_dtype();
  const auto dtype = given.value_or(saved_dtype(o));
  std::vector<Tensor> saved;
  if (save) {
    const auto route = choose(o, std::nullopt).route;
    const auto rows = saved_rows(o, route);
    const auto units = o.skip_weight.sym_size(0) - 1;
    saved.push_back(meta(o, {rows, saved_columns(o, route)}, dtype));
    saved.push_back(want_map ? meta(o, {rows, units - o.weights.back().sym_size(1)}, dtype) : meta(o, {0}, dtype));
    saved.push_back(o.dense() ? meta(o, {units + 1, o.x.sym_size(-1)}, output) : meta(o, {0}, dtype));
  }
  return {want_potential ? meta(o, o.x.sym_sizes().slice(0, o.x.dim() - 1), output) : meta(o, {0}, output),
          want_map ? meta_map(o) : meta(o, {0}, output), std::move(saved)};
}

std::vector<Tensor> meta_training_terms(const Operands& o, const OptionalTensor& map_cotangent,
                                        const OptionalTensor& potential_cotangent, at::TensorList saved,
                                        int64_t wanted) {
  o.check();
  check_cotangents(o, map_cotangent, potential_cotangent, saved, wanted, choose(o, std::nullopt).route);
  const Gradients flags{wanted, o.gradients()};
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < flags.count; ++i) {
    gradients.push_back(flags[i] ? meta(o, o[i].sym_sizes(), o[i].scalar_type()) : meta(o, {0}, o.output_dtype()));
  }
  return gradients;
}

std::tuple<Tensor, Tensor> meta_map_jvp(const Operands& o, const Tensor& tangent) {
  o.check();
  o.check_rows("tangent", tangent, o.x.sym_size(-1));
  choose(o, std::nullopt);
  return {meta_map(o), meta_map(o)};
}

// Autocast: products take operands in the autocast dtype, everything else is float32; float64 is left alone

template <c10::DeviceType device>
struct Autocast {
  static constexpr auto key =
      device == c10::DeviceType::CPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::Autocast;

  static Tensor float32(const Tensor& t) {
    return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf ? t.to(at::kFloat) : t;
  }

  // Calls function(operands) with those of an autocast region.
  template <class Function>
  static auto within(const Operands& o, const Function& function) {
    c10::impl::ExcludeDispatchKeyGuard off(key);
    const auto x = float32(o.x), skip_weight = float32(o.skip_weight), bias = float32(o.bias);
    std::vector<Tensor> weights;
    for (const auto& w : o.weights) weights.push_back(float32(w));
    const auto embedding = o.embedding ? OptionalTensor(float32(*o.embedding)) : std::nullopt;
    const auto dtype = o.product_dtype || o.x.scalar_type() == at::kDouble
                           ? o.product_dtype
                           : OptionalType(at::autocast::get_autocast_dtype(device));
    return function(Operands{x, skip_weight, bias, weights, o.inverse_lipschitz, embedding, o.activations,
                             o.activation_parameters, dtype, o.route});
  }

  static std::tuple<Tensor, Tensor, std::vector<Tensor>> potential_and_map(const Operands& operands,
                                                                           bool want_potential, bool want_map,
                                                                           bool save, std::optional<bool> recompute,
                                                                           OptionalType saved_dtype) {
    return within(operands, [&](const Operands& o) {
      return call<PotentialAndMap>(o, want_potential, want_map, save, recompute, saved_dtype);
    });
  }

  static std::vector<Tensor> training_terms(const Operands& operands, const OptionalTensor& map_cotangent,
                                            const OptionalTensor& potential_cotangent, at::TensorList saved,
                                            int64_t wanted) {
    return within(operands, [&](const Operands& o) {
      auto terms = call<TrainingTerms>(o, map_cotangent, potential_cotangent, saved, wanted);
      // gradients have the dtypes of the arguments given
      const Gradients flags{wanted, operands.gradients()};
      for (size_t i = 0; i < terms.size(); ++i) {
        if (flags[i]) terms[i] = in_dtype(terms[i], operands[i].scalar_type());
      }
      return terms;
    });
  }

  static std::tuple<Tensor, Tensor> map_jvp(const Operands& operands, const Tensor& tangent) {
    return within(operands, [&](const Operands& o) { return call<MapJvp>(o, float32(tangent)); });
  }

  static void implement(torch::Library& m);
};

// Registration

template <class Op>
void define(torch::Library& m, const std::vector<at::Tag>& tags) {
  const auto schema =
      std::string(Op::name) + "(" + operand_schema + ", " + Op::own_schema + ") -> " + Op::result_schema;
  m.def(schema.c_str(), tags);
}

template <c10::DeviceType device>
void Autocast<device>::implement(torch::Library& m) {
  ops::implement<PotentialAndMap, potential_and_map>(m);
  ops::implement<TrainingTerms, training_terms>(m);
  ops::implement<MapJvp, map_jvp>(m);
}

}  // namespace

TORCH_LIBRARY(ilvae_fast, m) {
  // any strides will do, and transformations are right: without the first, compiled regions fail on expanded inputs
  const std::vector<at::Tag> tags{at::Tag::flexible_layout, at::Tag::pt2_compliant_tag};
  define<PotentialAndMap>(m, tags);
  define<TrainingTerms>(m, tags);
  define<MapJvp>(m, tags);
  define<TrainingTermsBackward>(m, {});
  define<MapJvpBackward>(m, {});
}

TORCH_LIBRARY_IMPL(ilvae_fast, CPU, m) {
  implement<PotentialAndMap, run_potential_and_map>(m);
  implement<TrainingTerms, run_training_terms>(m);
  implement<MapJvp, run_map_jvp>(m);
}

// also in a build without CUDA kernels, which says so
TORCH_LIBRARY_IMPL(ilvae_fast, CUDA, m) {
  implement<PotentialAndMap, OnCuda<PotentialAndMap, run_potential_and_map>::call>(m);
  implement<TrainingTerms, OnCuda<TrainingTerms, run_training_terms>::call>(m);
  implement<MapJvp, OnCuda<MapJvp, run_map_jvp>::call>(m);
}

TORCH_LIBRARY_IMPL(ilvae_fast, Meta, m) {
  implement<PotentialAndMap, meta_potential_and_map>(m);
  implement<TrainingTerms, meta_training_terms>(m);
  implement<MapJvp, meta_map_jvp>(m);
}

TORCH_LIBRARY_IMPL(ilvae_fast, AutocastCPU, m) { Autocast<c10::DeviceType::CPU>::implement(m); }
TORCH_LIBRARY_IMPL(ilvae_fast, AutocastCUDA, m) { Autocast<c10::DeviceType::CUDA>::implement(m); }

}  // namespace ilvae::ops
