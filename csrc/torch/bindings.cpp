// The Python module ilvae_fast._C: what was built, plans, and the operators as functions. Loading it registers the
// operators.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "core/plan.h"
#include "route.h"
#include "torch/operators.h"

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

template <class Op>
void define(py::module_& m) {
  m.def(Op::name, function_of(ilvae::ops::handle<Op>()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, plans and operators; importing it registers torch.ops.ilvae_fast.*";
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = ILVAE_TORCH_VERSION;
    info["python"] = ILVAE_PYTHON_VERSION;
    info["compiler"] = ILVAE_COMPILER;
    info["cuda"] = py::none();
    info["cuda_architectures"] = "";
    for (const auto type : {c10::DeviceType::CPU, c10::DeviceType::CUDA}) {
      const auto* const device = ilvae::find_device(type);
      if (!device) continue;
      for (const auto& [name, value] : device->build()) info[py::str(name)] = value;
    }
    return info;
  });
  define<ilvae::ops::PotentialAndMap>(m);
  define<ilvae::ops::TrainingTerms>(m);
  define<ilvae::ops::MapJvp>(m);
  m.def("softplus", function_of(ilvae::ops::softplus()));
  py::class_<ilvae::Plan>(m, "Plan")
      .def_readonly("route", &ilvae::Plan::route)
      .def_readonly("reason", &ilvae::Plan::reason)
      .def_readonly("recompute", &ilvae::Plan::recompute)
      .def_readonly("map_flops", &ilvae::Plan::map_flops)
      .def_readonly("training_flops", &ilvae::Plan::training_flops)
      .def_readonly("saved_bytes", &ilvae::Plan::saved_bytes)
      .def_readonly("few_rows", &ilvae::Plan::few_rows);
  m.def("plan",
        [](int64_t rows, int64_t input, int64_t width, std::vector<int64_t> widths, bool dense, int64_t real_bytes,
           int64_t operand_bytes, int route, std::optional<bool> recompute, int64_t cuda_shared_bytes, bool tf32) {
          ilvae::Shape shape{rows, input, width, std::move(widths), dense, real_bytes, operand_bytes};
          shape.cuda = cuda_shared_bytes > 0;
          const auto* const device = ilvae::find_device(c10::DeviceType::CUDA);
          if (shape.cuda && device) {
            shape.fit = device->fit_within(cuda_shared_bytes, shape.widths, width, dense, operand_bytes, tf32);
          }
          return ilvae::plan(shape, static_cast<ilvae::Route>(route), recompute);
        });
}
