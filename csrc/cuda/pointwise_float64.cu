#include "cuda/pointwise_launch.cuh"

namespace ilvae::cuda {

template struct PointwiseLaunchers<double, double>;
template Status launch_quadratic(const QuadraticTerm<double>&, void*);

}  // namespace ilvae::cuda
