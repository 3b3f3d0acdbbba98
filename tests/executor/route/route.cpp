// The host side of the fused CUDA route as operators on CPU tensors: tests/test_cuda_route.py.
#include <torch/library.h>

#include "cuda/fused_route.cpp"

namespace {

using namespace ilvae;
using at::Tensor;

std::vector<Tensor> defined(std::vector<Tensor> tensors) {
  for (auto& t : tensors) {
    if (!t.defined()) t = at::empty({0});
  }
  return tensors;
}

std::vector<Tensor> map(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                        const Tensor& inverse_lipschitz, at::IntArrayRef activations, Floats parameters,
                        OptionalType type, bool want_potential, bool want_map) {
  const ilvae::Operands o{x,           skip_weight, bias, weights, inverse_lipschitz, std::nullopt,
                          activations, parameters,  type, 0};
  const auto values = cuda::fused.potential_and_map(o, {want_potential, want_map, /*save=*/false});
  return defined({values.potential, values.map});
}

std::vector<Tensor> terms(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                          const Tensor& inverse_lipschitz, at::IntArrayRef activations, Floats parameters,
                          OptionalType type, const OptionalTensor& v, const OptionalTensor& u, int64_t wanted) {
  const ilvae::Operands o{x,           skip_weight, bias, weights, inverse_lipschitz, std::nullopt,
                          activations, parameters,  type, 0};
  const Cotangents cotangents{v.value_or(Tensor()), u.value_or(Tensor()), {}};
  return defined(cuda::fused.training_terms(o, cotangents, {wanted, o.gradients()}));
}

void stack_at_most(int64_t bytes) { cuda::most_stacked_bytes = bytes; }

}  // namespace

TORCH_LIBRARY(ilvae_route, m) {
  m.def(
      "map(Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, Tensor inverse_lipschitz, int[] activations, "
      "float[] parameters, ScalarType? type, bool want_potential, bool want_map) -> Tensor[]",
      map);
  m.def(
      "terms(Tensor x, Tensor skip_weight, Tensor bias, Tensor[] weights, Tensor inverse_lipschitz, int[] activations, "
      "float[] parameters, ScalarType? type, Tensor? v, Tensor? u, int wanted) -> Tensor[]",
      terms);
  m.def("stack_at_most(int bytes) -> ()", stack_at_most);
}
