// Launching with every return code checked; for .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/status.h"

namespace ilvae::cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), nothing for an empty grid.
template <class... Parameters, class... Arguments>
Status launch(const char* what, void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes,
              void* stream, const Arguments&... arguments) {
  if (grid == 0) return {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return {static_cast<int>(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...)), what};
}

}  // namespace ilvae::cuda
