// Element types that are known at run time only.
#pragma once

namespace ilvae::cuda {

enum class DType : int { float64, float32, bfloat16, float16 };

}  // namespace ilvae::cuda
