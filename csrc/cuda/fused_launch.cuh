// Launchers of the fused kernels, for the files that instantiate one each.
#pragma once

#include <atomic>

#include "cuda/fused.h"
#include "cuda/launch.cuh"

namespace ilvae::cuda {

inline constexpr int most_devices = 64;

// Permits a kernel its shared memory, once on each device.
template <auto kernel>
Status prepare(int device) {
  static std::atomic<uint64_t> ready{0};
  const uint64_t bit = uint64_t(1) << (device % most_devices);
  if (device < most_devices && (ready.load() & bit)) return {};
  int limit = 0;
  auto code = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code == cudaSuccess) code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (code == cudaSuccess && device < most_devices) ready.fetch_or(bit);
  return {static_cast<int>(code), "shared memory of the fused kernel"};
}

template <auto kernel>
Status occupancy(int device, int network_layers, int threads, int shared_bytes, int& blocks) {
  static std::atomic<int> known[most_devices][fused_layers + 1];
  if (device < most_devices && (blocks = known[device][network_layers].load()) > 0) return {};
  if (const auto trouble = prepare<kernel>(device)) return trouble;
  const auto code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  if (code == cudaSuccess && device < most_devices) known[device][network_layers].store(blocks);
  return {static_cast<int>(code), "occupancy of the fused kernel"};
}

template <auto kernel>
Status launch_prepared(const char* what, const FusedCall& call, int blocks, int threads, int shared_bytes, int device,
                       void* stream) {
  if (const auto trouble = prepare<kernel>(device)) return trouble;
  return launch(what, kernel, blocks, threads, shared_bytes, stream, call);
}

}  // namespace ilvae::cuda
