// The Python module ilvae_fast._C: what was built, plans, and the operators as functions. Loading it registers the
// operators.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "core/plan.h"
#include "cpu/instruction_set.h"
#if defined(ILVAE_CUDA)
#include "cuda/fused_shapes.h"
#include "cuda/toolkit.h"
#endif
#include "ops.h"

namespace {

// An argument of an operator as pybind11 holds it during a call.
template <class T>
struct Held {
  using type = T;
};
template <class T>
struct Held<at::ArrayRef<T>> {
  using type = const std::vector<T>&;
};

// An operator as a Python function of the same arguments, all by position, that enters the dispatcher as C++ does.
// torch.ops interprets the schema for each call and boxes arguments and results: as long as a small network takes.
template <class Result, class... Arguments>
auto function_of(const c10::TypedOperatorHandle<Result(Arguments...)>& op) {
  return torch::wrap_pybind_function_no_gil(
      [&op](typename Held<Arguments>::type... arguments) { return op.call(arguments...); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, plans and operators; importing it registers torch.ops.ilvae_fast.*";
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = ILVAE_TORCH_VERSION;
    info["python"] = ILVAE_PYTHON_VERSION;
    info["compiler"] = ILVAE_COMPILER;
    info["cpu"] = ilvae::cpu::instruction_set();
#if defined(ILVAE_CUDA)
    info["cuda"] = ilvae::cuda::toolkit_version();
    info["cuda_architectures"] = ilvae::cuda::architectures();
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = "";
#endif
    return info;
  });
  m.def("potential_and_map", function_of(ilvae::ops::potential_and_map()));
  m.def("training_terms", function_of(ilvae::ops::training_terms()));
  m.def("map_jvp", function_of(ilvae::ops::map_jvp()));
  m.def("softplus", function_of(ilvae::ops::softplus()));
  py::class_<ilvae::Plan>(m, "Plan")
      .def_readonly("route", &ilvae::Plan::route)
      .def_readonly("reason", &ilvae::Plan::reason)
      .def_readonly("recompute", &ilvae::Plan::recompute)
      .def_readonly("map_flops", &ilvae::Plan::map_flops)
      .def_readonly("training_flops", &ilvae::Plan::training_flops)
      .def_readonly("saved_bytes", &ilvae::Plan::saved_bytes);
  m.def("plan", [](int64_t rows, int64_t input, int64_t width, std::vector<int64_t> widths, bool dense,
                   int64_t real_bytes, int64_t operand_bytes, int route, std::optional<bool> recompute,
                   int64_t cuda_shared_bytes, [[maybe_unused]] bool tf32) {
    ilvae::Shape shape{rows, input, width, std::move(widths), dense, real_bytes, operand_bytes};
    shape.cuda = cuda_shared_bytes > 0;
#if defined(ILVAE_CUDA)
    if (shape.cuda) {
      const auto kind = operand_bytes == 2 ? ilvae::cuda::Operands::bfloat16
                        : tf32             ? ilvae::cuda::Operands::tf32
                                           : ilvae::cuda::Operands::tf32x3;
      shape.fit = ilvae::cuda::fused_fit(kind, operand_bytes == 8, dense, shape.widths, width, cuda_shared_bytes);
    }
#endif
    return ilvae::plan(shape, static_cast<ilvae::Route>(route), recompute);
  });
}
