#include "cuda/pointwise_launch.cuh"

namespace ilvae::cuda {

template struct PointwiseLaunchers<float, float>;
template Status launch_quadratic(const QuadraticTerm<float>&, void*);

}  // namespace ilvae::cuda
