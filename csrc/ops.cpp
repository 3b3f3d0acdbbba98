// Schemas of the operators and their kernels for the keys CPU, CUDA, Meta and Autocast. Autograd is in autograd.cpp.
#include "ops.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "core/plan.h"
#include "cpu/fused.h"
#if defined(ILVAE_CUDA)
#include "cuda/fused_route.h"
#endif
#include "fused_route.h"
#include "matmul_route.h"
#include "problem.h"

namespace ilvae::ops {

namespace {

Arguments bundle(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                 const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
                 Floats activation_parameters, OptionalType product_dtype) {
  Arguments arguments{
      x,           skip_weight,           bias,         weights.vec(), inverse_lipschitz, embedding.value_or(Tensor()),
      activations, activation_parameters, product_dtype};
  arguments.check();
  return arguments;
}

// The route of a call; what it saves depends on it.
Route route_of(const Arguments& c, int64_t route) {
  return choice_of(c.x, c.skip_weight, c.weights, c.embedding.defined(), c.output_dtype(), route, std::nullopt).route;
}

c10::SymInt saved_rows(const Arguments& c, Route route) {
  c10::SymInt rows = 1;
  for (const auto& size : c.x.sym_sizes().slice(0, c.x.dim() - 1)) rows = rows * size;
  return route == Route::fused ? (rows + (cpu::row_padding - 1)) / cpu::row_padding * cpu::row_padding : rows;
}

c10::SymInt saved_columns(const Arguments& c, Route route) {
  const auto units = c.skip_weight.sym_size(0) - 1;
  return route == Route::fused ? units + 1 : matmul::padded_units(units);
}

// In which pre-activations and adjoints are saved, unless a call says otherwise.
at::ScalarType saved_dtype(const Arguments& c) {
  const auto operand = c.output_dtype();
  return operand == at::kBFloat16 && !c.x.is_cuda() ? at::kFloat : operand;
}

// The kernels read what was saved through bare pointers.
void check_saved(const Arguments& c, at::TensorList saved, Route route) {
  if (saved.empty()) return;
  TORCH_CHECK_VALUE(saved.size() == 3, "saved: got ", saved.size(), " tensors, wanted none or 3");
  const auto rows = saved_rows(c, route);
  const auto units = c.skip_weight.sym_size(0) - 1;
  const auto real = saved[0].scalar_type();
  const auto floating = c.output_dtype();
  TORCH_CHECK_VALUE(real == saved_dtype(c) || (!c.x.is_cpu() && real == floating), "saved[0]: got dtype ", real,
                    ", wanted ", saved_dtype(c));
  const auto check = [&](size_t i, c10::SymInt height, c10::SymInt width, at::ScalarType dtype) {
    const auto& t = saved[i];
    TORCH_CHECK_VALUE(t.dim() == 2 && t.sym_size(0) == height && t.sym_size(1) == width && t.scalar_type() == dtype &&
                          t.device() == c.x.device() && t.is_contiguous(),
                      "saved[", i, "]: got ", t.sym_sizes(), " in ", t.scalar_type(), ", wanted a contiguous (", height,
                      ", ", width, ") in ", dtype, ", as potential_and_map saved it");
  };
  check(0, rows, saved_columns(c, route), real);
  const auto none = [&](size_t i) { return saved[i].dim() == 1 && saved[i].sym_size(0) == 0; };
  if (!none(1)) check(1, rows, units - c.weights.back().sym_size(1), real);
  if (c.embedding.defined()) check(2, units + 1, c.x.sym_size(-1), c.output_dtype());
}

void check_cotangents(const Arguments& c, const OptionalTensor& map_cotangent,
                      const OptionalTensor& potential_cotangent, at::TensorList saved, int64_t wanted, Route route) {
  TORCH_CHECK_VALUE(map_cotangent || potential_cotangent,
                    "map_cotangent and potential_cotangent: got neither, wanted at least one");
  if (map_cotangent) c.check_rows("map_cotangent", *map_cotangent, c.skip_weight.sym_size(1));
  if (potential_cotangent) c.check_rows("potential_cotangent", *potential_cotangent, std::nullopt);
  check_saved(c, saved, route);
  const auto count = grad_weights + c.weights.size();
  TORCH_CHECK_VALUE(count < 63 && wanted >= 0 && wanted < (int64_t(1) << count), "wanted: got ", wanted,
                    ", wanted a bit for each of ", count, " gradients");
  TORCH_CHECK_VALUE(c.embedding.defined() || !((wanted >> grad_embedding) & 1),
                    "wanted: got the gradient of an embedding, wanted none: there is no embedding");
}

Tensor flat(const OptionalTensor& t, const Arguments& c, int64_t columns) {
  if (!t) return {};
  if (c.x.dim() == 2) return *t;
  const int64_t rows = c10::multiply_integers(c.x.sizes().slice(0, c.x.dim() - 1));
  return columns > 0 ? t->reshape({rows, columns}) : t->reshape({rows});
}

c10::DimVector leading(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

c10::DimVector with_last(c10::DimVector sizes, int64_t last) {
  sizes.push_back(last);
  return sizes;
}

// What the gradient of a tensor looks like; also the shape function of training_terms.
const Tensor& like(const Arguments& c, size_t gradient) {
  switch (gradient) {
    case grad_x:
      return c.x;
    case grad_skip_weight:
      return c.skip_weight;
    case grad_bias:
      return c.bias;
    case grad_inverse_lipschitz:
      return c.inverse_lipschitz;
    case grad_embedding:
      return c.embedding;
    default:
      return c.weights[gradient - grad_weights];
  }
}

// Each route, on the device of x

matmul::Values run_potential_and_map(const Arguments& c, Route route, bool want_potential, bool want_map, bool save) {
#if defined(ILVAE_CUDA)
  if (c.x.is_cuda() && route == Route::fused) return cuda::fused_potential_and_map(c, want_potential, want_map);
#endif
  const auto run = route == Route::fused ? fused::potential_and_map : matmul::potential_and_map;
  return run(Problem(c), want_potential, want_map, save);
}

std::vector<Tensor> run_training_terms(const Arguments& c, Route route, const Tensor& v, const Tensor& u,
                                       at::TensorList saved, const std::vector<bool>& wanted) {
#if defined(ILVAE_CUDA)
  if (c.x.is_cuda() && route == Route::fused) return cuda::fused_training_terms(c, v, u, wanted);
#endif
  const auto run = route == Route::fused ? fused::training_terms : matmul::training_terms;
  return run(Problem(c), v, u, saved, wanted);
}

// CPU, and CUDA devices

std::tuple<Tensor, Tensor, std::vector<Tensor>> potential_and_map_cpu(
    const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
    const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
    Floats activation_parameters, bool want_potential, bool want_map, bool save, OptionalType product_dtype,
    int64_t route, std::optional<bool> /*recompute: for autograd*/, OptionalType /*saved_dtype: for fake tensors*/) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations, activation_parameters,
                        product_dtype);
  auto taken = route_of(c, route);
  if (route == int64_t(Route::automatic) && !save && x.is_cpu()) {
    int64_t parameters = skip_weight.numel();
    for (const auto& w : weights) parameters += w.numel();
    if (few_rows(x.numel() / x.size(-1), parameters)) taken = Route::matmul;
  }
  TORCH_CHECK_VALUE(
      !(save && x.is_cuda() && taken == Route::fused), "save: got True, wanted False on the fused route of ",
      "a CUDA device, whose training terms recompute; the matmul route (", int64_t(Route::matmul), ") saves");
  auto values = run_potential_and_map(c, taken, want_potential, want_map, save);
  const auto none = [&] { return allocate(x, {0}, c.output_dtype()); };
  const auto shaped = [&](const Tensor& t, at::IntArrayRef sizes) { return t.sizes() == sizes ? t : t.view(sizes); };
  return {want_potential ? shaped(values.potential, leading(x)) : none(),
          want_map ? shaped(values.map, with_last(leading(x), c.width())) : none(), std::move(values.saved)};
}

std::vector<Tensor> training_terms_cpu(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                       at::TensorList weights, const Tensor& inverse_lipschitz,
                                       const OptionalTensor& embedding, const OptionalTensor& map_cotangent,
                                       const OptionalTensor& potential_cotangent, at::TensorList saved,
                                       at::IntArrayRef activations, Floats activation_parameters, int64_t wanted,
                                       OptionalType product_dtype, int64_t route) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations, activation_parameters,
                        product_dtype);
  const auto taken = route_of(c, route);
  check_cotangents(c, map_cotangent, potential_cotangent, saved, wanted, taken);
  std::vector<bool> flags(grad_weights + c.weights.size());
  for (size_t i = 0; i < flags.size(); ++i) flags[i] = (wanted >> i) & 1;
  auto gradients =
      run_training_terms(c, taken, flat(map_cotangent, c, c.width()), flat(potential_cotangent, c, 0), saved, flags);
  for (size_t i = 0; i < flags.size(); ++i) {
    auto& gradient = gradients[i];
    if (!flags[i]) {
      gradient = allocate(x, {0}, c.output_dtype());
    } else {
      gradient = in_dtype(gradient, like(c, i).scalar_type());
      if (gradient.sizes() != like(c, i).sizes()) gradient = gradient.view(like(c, i).sizes());
    }
  }
  return gradients;
}

std::tuple<Tensor, Tensor> map_jvp_cpu(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                       at::TensorList weights, const Tensor& inverse_lipschitz,
                                       const OptionalTensor& embedding, const Tensor& tangent,
                                       at::IntArrayRef activations, Floats activation_parameters,
                                       OptionalType product_dtype, int64_t route) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations, activation_parameters,
                        product_dtype);
  c.check_rows("tangent", tangent, x.sym_size(-1));
  const Problem p(c);
  const auto run = !x.is_cuda() && route_of(c, route) == Route::fused ? fused::map_jvp : matmul::map_jvp;
  auto [map, map_tangent] = run(p, tangent.reshape({p.rows, p.input}));
  const auto sizes = with_last(leading(x), p.width);
  return {map.view(sizes), map_tangent.view(sizes)};
}

// Meta: the same checks, shapes without work

Tensor meta(const Arguments& c, c10::SymDimVector sizes, at::ScalarType dtype) {
  return at::empty_symint(sizes, c.x.options().dtype(dtype));
}

c10::SymDimVector rows_of(const Arguments& c) {
  const auto sizes = c.x.sym_sizes();
  return {sizes.begin(), sizes.end() - 1};
}

Tensor meta_map(const Arguments& c) {
  auto sizes = rows_of(c);
  sizes.push_back(c.skip_weight.sym_size(1));
  return meta(c, sizes, c.output_dtype());
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> potential_and_map_meta(
    const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
    const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
    Floats activation_parameters, bool want_potential, bool want_map, bool save, OptionalType product_dtype,
    int64_t route, std::optional<bool> /*recompute: for autograd*/, OptionalType saved_dtype) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations, activation_parameters,
                        product_dtype);
  const auto output = c.output_dtype();
  const auto real = saved_dtype.value_or(ops::saved_dtype(c));
  std::vector<Tensor> saved;
  if (save) {
    const auto taken = route_of(c, route);
    const auto rows = saved_rows(c, taken);
    const auto units = skip_weight.sym_size(0) - 1;
    saved.push_back(meta(c, {rows, saved_columns(c, taken)}, real));
    saved.push_back(want_map ? meta(c, {rows, units - weights.back().sym_size(1)}, real) : meta(c, {0}, real));
    saved.push_back(c.embedding.defined() ? meta(c, {units + 1, x.sym_size(-1)}, output) : meta(c, {0}, real));
  }
  return {want_potential ? meta(c, rows_of(c), output) : meta(c, {0}, output),
          want_map ? meta_map(c) : meta(c, {0}, output), std::move(saved)};
}

std::vector<Tensor> training_terms_meta(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                        at::TensorList weights, const Tensor& inverse_lipschitz,
                                        const OptionalTensor& embedding, const OptionalTensor& map_cotangent,
                                        const OptionalTensor& potential_cotangent, at::TensorList saved,
                                        at::IntArrayRef activations, Floats activation_parameters, int64_t wanted,
                                        OptionalType product_dtype, int64_t route) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations, activation_parameters,
                        product_dtype);
  check_cotangents(c, map_cotangent, potential_cotangent, saved, wanted, route_of(c, route));
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < grad_weights + weights.size(); ++i) {
    if ((wanted >> i) & 1) {
      const auto& t = like(c, i);
      gradients.push_back(meta(c, {t.sym_sizes().begin(), t.sym_sizes().end()}, t.scalar_type()));
    } else {
      gradients.push_back(meta(c, {0}, c.output_dtype()));
    }
  }
  return gradients;
}

std::tuple<Tensor, Tensor> map_jvp_meta(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                        at::TensorList weights, const Tensor& inverse_lipschitz,
                                        const OptionalTensor& embedding, const Tensor& tangent,
                                        at::IntArrayRef activations, Floats activation_parameters,
                                        OptionalType product_dtype, int64_t route) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, embedding, activations, activation_parameters,
                        product_dtype);
  c.check_rows("tangent", tangent, x.sym_size(-1));
  route_of(c, route);
  return {meta_map(c), meta_map(c)};
}

// Autocast: products take operands in the autocast dtype, everything else is float32; float64 is left alone

template <c10::DeviceType device>
struct Autocast {
  static constexpr auto key =
      device == c10::DeviceType::CPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::Autocast;

  static Tensor float32(const Tensor& t) {
    return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf ? t.to(at::kFloat) : t;
  }
  static OptionalTensor float32(const OptionalTensor& t) { return t ? OptionalTensor(float32(*t)) : t; }
  static std::vector<Tensor> float32(at::TensorList list) {
    std::vector<Tensor> result;
    for (const auto& t : list) result.push_back(float32(t));
    return result;
  }
  static OptionalType product_dtype(const Tensor& x, OptionalType given) {
    if (given || x.scalar_type() == at::kDouble) return given;
    return at::autocast::get_autocast_dtype(device);
  }

  static std::tuple<Tensor, Tensor, std::vector<Tensor>> potential_and_map(
      const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
      const Tensor& inverse_lipschitz, const OptionalTensor& embedding, at::IntArrayRef activations,
      Floats activation_parameters, bool want_potential, bool want_map, bool save, OptionalType given, int64_t route,
      std::optional<bool> recompute, OptionalType saved_dtype) {
    c10::impl::ExcludeDispatchKeyGuard off(key);
    return ops::potential_and_map().call(float32(x), float32(skip_weight), float32(bias), float32(weights),
                                         inverse_lipschitz, float32(embedding), activations, activation_parameters,
                                         want_potential, want_map, save, product_dtype(x, given), route, recompute,
                                         saved_dtype);
  }

  static std::vector<Tensor> training_terms(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                            at::TensorList weights, const Tensor& inverse_lipschitz,
                                            const OptionalTensor& embedding, const OptionalTensor& map_cotangent,
                                            const OptionalTensor& potential_cotangent, at::TensorList saved,
                                            at::IntArrayRef activations, Floats activation_parameters, int64_t wanted,
                                            OptionalType given, int64_t route) {
    c10::impl::ExcludeDispatchKeyGuard off(key);
    auto terms =
        ops::training_terms().call(float32(x), float32(skip_weight), float32(bias), float32(weights), inverse_lipschitz,
                                   float32(embedding), map_cotangent, potential_cotangent, saved, activations,
                                   activation_parameters, wanted, product_dtype(x, given), route);
    const auto as = [&](size_t i, const Tensor& argument) {  // gradients have the dtypes of the arguments given
      if (i < terms.size() && ((wanted >> i) & 1)) terms[i] = in_dtype(terms[i], argument.scalar_type());
    };
    as(grad_x, x);
    as(grad_skip_weight, skip_weight);
    as(grad_bias, bias);
    if (embedding) as(grad_embedding, *embedding);
    for (size_t k = 0; k < weights.size(); ++k) as(grad_weights + k, weights[k]);
    return terms;
  }

  static std::tuple<Tensor, Tensor> map_jvp(const Tensor& x, const Tensor& skip_weight, const Tensor& bias,
                                            at::TensorList weights, const Tensor& inverse_lipschitz,
                                            const OptionalTensor& embedding, const Tensor& tangent,
                                            at::IntArrayRef activations, Floats activation_parameters,
                                            OptionalType given, int64_t route) {
    c10::impl::ExcludeDispatchKeyGuard off(key);
    return ops::map_jvp().call(float32(x), float32(skip_weight), float32(bias), float32(weights), inverse_lipschitz,
                               float32(embedding), float32(tangent), activations, activation_parameters,
                               product_dtype(x, given), route);
  }

  static void implement(torch::Library& m) {
    m.impl("potential_and_map", potential_and_map);
    m.impl("training_terms", training_terms);
    m.impl("map_jvp", map_jvp);
  }
};

#if defined(ILVAE_CUDA)

// CUDA: the same functions on the device of x; errors of kernels name operator and shape
constexpr char potential_and_map_name[] = "potential_and_map", training_terms_name[] = "training_terms",
               map_jvp_name[] = "map_jvp";

template <const char* name, auto function, class Signature = std::remove_pointer_t<decltype(function)>>
struct OnDevice;
template <const char* name, auto function, class Result, class... Rest>
struct OnDevice<name, function, Result(const Tensor&, const Tensor&, Rest...)> {
  static Result call(const Tensor& x, const Tensor& skip_weight, Rest... rest) {
    const c10::DeviceGuard guard(x.device());
    try {
      return function(x, skip_weight, rest...);
    } catch (c10::ValueError&) {
      throw;
    } catch (c10::Error& error) {
      std::ostringstream where;
      where << name << " in " << c10::toString(x.scalar_type()) << " with x " << x.sizes() << ", skip_weight "
            << skip_weight.sizes() << " on " << x.device();
      error.add_context(where.str());
      throw;
    }
  }
};

#else

// CUDA: a build without CUDA kernels has the same functions, which say so

constexpr auto no_cuda =
    "x: got a CUDA tensor, but this build of ilvae_fast has no CUDA kernels. Move tensors and modules to the CPU, or "
    "run the plain autograd version on the GPU: with ilvae_fast.use_backend(\"reference\"): ...";

void raise_on_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().operator_name().name, ": ", no_cuda);
}

#endif

}  // namespace

TORCH_LIBRARY(ilvae_fast, m) {
  // any strides will do, and transformations are right: without the first, compiled regions fail on expanded inputs
  const std::vector<at::Tag> tags{at::Tag::flexible_layout, at::Tag::pt2_compliant_tag};
  m.def(
      "potential_and_map(Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, Tensor inverse_lipschitz, "
      "Tensor? embedding, int[] activations, float[] activation_parameters, bool want_potential, bool want_map, "
      "bool save=False, ScalarType? product_dtype=None, int route=0, bool? recompute=None, ScalarType? "
      "saved_dtype=None) -> (Tensor potential, Tensor map, Tensor[] saved)",
      tags);
  m.def(
      "training_terms(Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, Tensor inverse_lipschitz, "
      "Tensor? embedding, Tensor? map_cotangent, Tensor? potential_cotangent, Tensor[] saved, int[] activations, "
      "float[] activation_parameters, int wanted, ScalarType? product_dtype=None, int route=0) -> Tensor[]",
      tags);
  m.def(
      "map_jvp(Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, Tensor inverse_lipschitz, "
      "Tensor? embedding, Tensor tangent, int[] activations, float[] activation_parameters, "
      "ScalarType? product_dtype=None, int route=0) -> (Tensor map, Tensor map_tangent)",
      tags);
  m.def(
      "training_terms_backward(Tensor[] cotangents, Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, "
      "Tensor inverse_lipschitz, Tensor? embedding, Tensor? map_cotangent, Tensor? potential_cotangent, "
      "int[] activations, float[] activation_parameters, int wanted, int needed) -> Tensor[]");
  m.def(
      "map_jvp_backward(Tensor[] cotangents, Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, "
      "Tensor inverse_lipschitz, Tensor? embedding, Tensor tangent, int[] activations, "
      "float[] activation_parameters, int needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(ilvae_fast, CPU, m) {
  m.impl("potential_and_map", potential_and_map_cpu);
  m.impl("training_terms", training_terms_cpu);
  m.impl("map_jvp", map_jvp_cpu);
}

TORCH_LIBRARY_IMPL(ilvae_fast, Meta, m) {
  m.impl("potential_and_map", potential_and_map_meta);
  m.impl("training_terms", training_terms_meta);
  m.impl("map_jvp", map_jvp_meta);
}

TORCH_LIBRARY_IMPL(ilvae_fast, AutocastCPU, m) { Autocast<c10::DeviceType::CPU>::implement(m); }
TORCH_LIBRARY_IMPL(ilvae_fast, AutocastCUDA, m) { Autocast<c10::DeviceType::CUDA>::implement(m); }

TORCH_LIBRARY_IMPL(ilvae_fast, CUDA, m) {
#if defined(ILVAE_CUDA)
  m.impl("potential_and_map", OnDevice<potential_and_map_name, potential_and_map_cpu>::call);
  m.impl("training_terms", OnDevice<training_terms_name, training_terms_cpu>::call);
  m.impl("map_jvp", OnDevice<map_jvp_name, map_jvp_cpu>::call);
#else
  for (const auto name : {"potential_and_map", "training_terms", "map_jvp"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<raise_on_cuda>());
  }
#endif
}

}  // namespace ilvae::ops
