#include <cuda_runtime.h>

#include "cuda/status.h"
#include "cuda/toolkit.h"

#define ILVAE_STRING_(x) #x
#define ILVAE_STRING(x) ILVAE_STRING_(x)

namespace ilvae::cuda {

const char* toolkit_version() { return ILVAE_STRING(__CUDACC_VER_MAJOR__) "." ILVAE_STRING(__CUDACC_VER_MINOR__); }
const char* architectures() { return ILVAE_CUDA_ARCHITECTURES; }

const char* describe(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace ilvae::cuda
