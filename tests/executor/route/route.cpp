// The host side of the fused CUDA route as operators on CPU tensors: tests/test_cuda_route.py. SOURCE is a copy of
// csrc/cuda/fused_route.cpp in which most_stacked_bytes can be changed.
#include SOURCE

#include <torch/library.h>

namespace {

using namespace ilvae;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using Floats = at::ArrayRef<double>;

Arguments bundle(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                 const Tensor& inverse_lipschitz, at::IntArrayRef activations, Floats parameters, OptionalType type) {
  return {x, skip_weight, bias, weights.vec(), inverse_lipschitz, {}, activations, parameters, type};
}

std::vector<Tensor> defined(std::vector<Tensor> tensors) {
  for (auto& t : tensors) {
    if (!t.defined()) t = at::empty({0});
  }
  return tensors;
}

std::vector<Tensor> map(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                        const Tensor& inverse_lipschitz, at::IntArrayRef activations, Floats parameters,
                        OptionalType type, bool want_potential, bool want_map) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, activations, parameters, type);
  const auto values = cuda::fused_potential_and_map(c, want_potential, want_map);
  return defined({values.potential, values.map});
}

std::vector<Tensor> terms(const Tensor& x, const Tensor& skip_weight, const Tensor& bias, at::TensorList weights,
                          const Tensor& inverse_lipschitz, at::IntArrayRef activations, Floats parameters,
                          OptionalType type, const OptionalTensor& v, const OptionalTensor& u, int64_t wanted) {
  const auto c = bundle(x, skip_weight, bias, weights, inverse_lipschitz, activations, parameters, type);
  std::vector<bool> flags(grad_weights + weights.size());
  for (size_t i = 0; i < flags.size(); ++i) flags[i] = (wanted >> i) & 1;
  return defined(cuda::fused_training_terms(c, v.value_or(Tensor()), u.value_or(Tensor()), flags));
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
