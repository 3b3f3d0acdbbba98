// What the CUDA part was compiled with.
#pragma once

namespace ilvae::cuda {

const char* toolkit_version();  // "13.0"
const char* architectures();    // "sm_80 sm_90 compute_80"

}  // namespace ilvae::cuda
