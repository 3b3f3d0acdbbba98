// One instantiation of the tile kernel and its launcher; CMake makes a file of each from fused_instance.cu.in.
#pragma once

#include <atomic>

#include "cuda/fused.cuh"
#include "cuda/launch.cuh"

namespace ilvae::cuda {

inline constexpr int most_devices = 64;

// Permits the kernel its shared memory, once on each device.
template <Operands kind, int n, int d, int layers>
Status prepare(int device) {
  static std::atomic<uint64_t> ready{0};
  const uint64_t bit = uint64_t(1) << (device % most_devices);
  if (device < most_devices && (ready.load() & bit)) return {};
  int limit = 0;
  auto code = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code == cudaSuccess) {
    code = cudaFuncSetAttribute(tile_kernel<kind, n, d, layers>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  }
  if (code == cudaSuccess && device < most_devices) ready.fetch_or(bit);
  return {static_cast<int>(code), "shared memory of the fused kernel"};
}

template <Operands kind, int n, int d, int layers>
Status blocks_per_multiprocessor(int device, int network_layers, int& blocks) {
  static std::atomic<int> known[most_devices][fused_layers + 1];
  if (device < most_devices && (blocks = known[device][network_layers].load()) > 0) return {};
  if (const auto trouble = prepare<kind, n, d, layers>(device)) return trouble;
  const auto code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, tile_kernel<kind, n, d, layers>,
                                                                  block_threads(kind, n, layers),
                                                                  layout(kind, n, d, network_layers, layers > 0).total);
  if (code == cudaSuccess && device < most_devices) known[device][network_layers].store(blocks);
  return {static_cast<int>(code), "occupancy of the fused kernel"};
}

template <Operands kind, int n, int d, int layers>
Status launch_tiles(const FusedCall& call, int blocks, int device, void* stream) {
  if (const auto trouble = prepare<kind, n, d, layers>(device)) return trouble;
  return launch(layers > 0 ? "fused training terms" : "fused map", tile_kernel<kind, n, d, layers>, blocks,
                block_threads(kind, n, layers), layout(kind, n, d, call.layers, layers > 0).total, stream, call);
}

}  // namespace ilvae::cuda
