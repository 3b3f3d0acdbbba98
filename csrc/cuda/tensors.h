// Between torch and the launchers: streams, element types, errors. Only .cpp files include this.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include <string>

#include "cuda/dtype.h"
#include "cuda/status.h"

namespace ilvae::cuda {

inline void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kFloat:
      return DType::float32;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      TORCH_INTERNAL_ASSERT(t.scalar_type() == at::kHalf, t.scalar_type());
      return DType::float16;
  }
}

// Raises what a launcher reports, with the shape it was called for. The operator is named by who calls
// (csrc/torch/operators.h).
inline void check(const Status& status, int64_t rows, int64_t width) {
  TORCH_CHECK(!status, "CUDA: ", status.what, " for ", rows, " rows of width ", width, ": ", describe(status.code));
}

}  // namespace ilvae::cuda
