#include "cuda/pointwise_launch.cuh"

namespace ilvae::cuda {

template struct PointwiseLaunchers<float, bfloat16>;

}  // namespace ilvae::cuda
