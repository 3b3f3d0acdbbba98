// What csrc/cuda/fused.cu and the instances of the kernels are to the host side of the fused route, on the executor: a
// device of three multiprocessors with the shared memory of sm_86, and four of the shapes.
#include "cuda/fused.cuh"
#include "cuda/fused_shapes.h"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"
#include "cuda/streamed.cuh"

extern "C" const char* executor_findings();

namespace ilvae::cuda {

namespace {

constexpr int multiprocessors = 3, shared_bytes = 101376;

template <class Kernel>
Status run(const char* what, int64_t blocks, int threads, int bytes, const Kernel& kernel) {
  if (bytes > shared_bytes) return {1, "shared memory"};
  executor::launch(dim3(blocks), dim3(threads), bytes, /*seed=*/1, kernel);
  return {executor_findings()[0] != 0, what};
}

template <Operands kind>
Status sweep(const FusedShape& shape, const FusedCall& c, int blocks) {
  const int bytes = shape.shared_bytes(kind, c.layers);
  if (shape.streamed && shape.n == 128 && shape.d == 64) {
    constexpr int threads = streamed_threads(kind, 128);
    if (shape.training()) return run("terms", blocks, threads, bytes, [&] { streamed_kernel<kind, 128, 64, true>(c); });
    return run("map", blocks, threads, bytes, [&] { streamed_kernel<kind, 128, 64, false>(c); });
  }
  if (shape.n == 32 && shape.d == 16 && shape.layers == 2) {
    return run("terms", blocks, block_threads(kind, 32, 2), bytes, [&] { tile_kernel<kind, 32, 16, 2>(c); });
  }
  if (shape.n == 32 && shape.d == 16 && shape.layers == 0) {
    return run("map", blocks, block_threads(kind, 32, 0), bytes, [&] { tile_kernel<kind, 32, 16, 0>(c); });
  }
  return {1, "a shape that is not compiled here"};
}

}  // namespace

const char* describe(int) { return executor_findings(); }

Status limits_of_device(int device, Limits& limits) {
  limits = {device, multiprocessors, shared_bytes};
  return {};
}

Status fused_blocks(Operands, int, int, int64_t tiles, const Limits& limits, int& blocks) {
  blocks = int(std::min<int64_t>(tiles, limits.multiprocessors));
  return {};
}

Status launch_fused(Operands kind, int shape, const FusedCall& c, int blocks, const Limits&, void*) {
  switch (kind) {
    case Operands::tf32x3:
      return sweep<Operands::tf32x3>(fused_shapes[shape], c, blocks);
    case Operands::tf32:
      return sweep<Operands::tf32>(fused_shapes[shape], c, blocks);
    case Operands::bfloat16:
      return sweep<Operands::bfloat16>(fused_shapes[shape], c, blocks);
    default:
      return {1, "operands that are not compiled here"};
  }
}

Status launch_pack(Operands kind, const Packing& p, void*) {
  if (kind != Operands::bfloat16) return {1, "packing to other operands than bfloat16"};
  constexpr int rows = pack_threads / 32;
  return run("pack", (p.rows + rows - 1) / rows, pack_threads, 0, [&] { pack_kernel<Operands::bfloat16>(p); });
}

Status launch_reduction(const Reduction& r, void*) {
  return run("sum", reduction_blocks(r), reduction_threads, reduction_shared_bytes, [&] { reduce_kernel(r); });
}

}  // namespace ilvae::cuda
