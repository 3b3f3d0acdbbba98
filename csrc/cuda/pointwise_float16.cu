#include "cuda/pointwise_launch.cuh"

namespace ilvae::cuda {

template struct PointwiseLaunchers<float, float16>;

}  // namespace ilvae::cuda
