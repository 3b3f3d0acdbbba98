// The Python module ilvae_fast._C: what was built. Loading it registers the operators.
#include <pybind11/pybind11.h>

#include "cpu/pointwise.h"
#if defined(ILVAE_CUDA)
#include "cuda/toolkit.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information; importing it registers torch.ops.ilvae_fast.*";
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
}
