// The choice among the instances of the fused kernels, and the launches before and after them.
#include "cuda/fused_shapes.h"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace ilvae::cuda {

namespace {

struct Instance {
  Status (*blocks)(int device, int layers, int& blocks);
  Status (*launch)(const FusedCall&, int blocks, int device, void* stream);
};

template <Operands kind>
constexpr Instance instances_of[] = {
#define ILVAE_SHAPE(n, d, layers) {blocks_per_multiprocessor<kind, n, d, layers>, launch_tiles<kind, n, d, layers>},
    ILVAE_FUSED_SHAPES(ILVAE_SHAPE)
#undef ILVAE_SHAPE
#define ILVAE_SHAPE(n, d, training) \
  {streamed_blocks_per_multiprocessor<kind, n, d, training>, launch_streamed<kind, n, d, training>},
        ILVAE_STREAMED_SHAPES(ILVAE_SHAPE)
#undef ILVAE_SHAPE
};

const Instance& instance(Operands kind, int shape) {
  switch (kind) {
    case Operands::tf32x3:
      return instances_of<Operands::tf32x3>[shape];
    case Operands::tf32:
      return instances_of<Operands::tf32>[shape];
    case Operands::bfloat16:
      return instances_of<Operands::bfloat16>[shape];
    default:
      return instances_of<Operands::float16>[shape];
  }
}

}  // namespace

Status limits_of_device(int device, Limits& limits) {
  limits.device = device;
  auto code = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (code == cudaSuccess) {
    code = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, limits.device);
  }
  return {static_cast<int>(code), "attributes of the device"};
}

Status fused_blocks(Operands kind, int shape, int layers, int64_t tiles, const Limits& limits, int& blocks) {
  int each = 0;
  if (const auto trouble = instance(kind, shape).blocks(limits.device, layers, each)) return trouble;
  const int64_t most = int64_t(limits.multiprocessors) * (each > 0 ? each : 1);
  blocks = static_cast<int>(tiles < most ? tiles : most);
  return {};
}

Status launch_fused(Operands kind, int shape, const FusedCall& call, int blocks, const Limits& limits, void* stream) {
  return instance(kind, shape).launch(call, blocks, limits.device, stream);
}

Status launch_pack(Operands kind, const Packing& p, void* stream) {
  constexpr int rows = pack_threads / 32;
  const auto kernel = kind == Operands::bfloat16 ? pack_kernel<Operands::bfloat16> : pack_kernel<Operands::float16>;
  return launch("packing of the weights", kernel, (p.rows + rows - 1) / rows, pack_threads, 0, stream, p);
}

Status launch_reduction(const Reduction& r, void* stream) {
  return launch("sum of the blocks' gradients", reduce_kernel, reduction_blocks(r), reduction_threads,
                reduction_shared_bytes, stream, r);
}

}  // namespace ilvae::cuda
