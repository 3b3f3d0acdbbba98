// Kernels with one planted fault each, and sound ones: what the detectors are tested with.
#include "ptx.cuh"

using namespace ilvae::cuda;

namespace {

float* shared_floats() { return reinterpret_cast<float*>(ptx::dynamic_shared()); }

// y = x reversed within each block, through shared memory
void reverse(const float* x, float* y, bool barrier) {
  float* s = shared_floats();
  const unsigned i = threadIdx.x, n = blockDim.x;
  s[i] = x[blockIdx.x * n + i];
  if (barrier) __syncthreads();
  y[blockIdx.x * n + i] = s[n - 1 - i];
}

// reverses within a warp; only a warp barrier is needed
void reverse_in_warp(const float* x, float* y, bool barrier) {
  float* s = shared_floats() + threadIdx.x / 32 * 32;
  const unsigned lane = threadIdx.x % 32;
  s[lane] = x[threadIdx.x];
  if (barrier) __syncwarp();
  y[threadIdx.x] = s[31 - lane];
}

void divergent_barrier(float* y) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}

void barrier_after_return(float* y) {
  if (threadIdx.x == 33) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}

void shuffle_in_a_branch(float* y) {
  float v = float(threadIdx.x);
  if (threadIdx.x % 32 < 7) v += __shfl_xor_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}

void reads_what_nobody_wrote(float* y) {
  float* s = shared_floats();
  if (threadIdx.x) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

void one_beyond(const float* x, float* y, int beyond_shared, int beyond_global) {
  float* s = shared_floats();
  s[threadIdx.x + beyond_shared] = x[threadIdx.x + beyond_global];
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

void beyond_a_local_array(const int* index, float* y) {
  float local[8];
  for (int i = 0; i < 8; ++i) local[i] = float(i);
  y[threadIdx.x] = local[index[threadIdx.x]];
}

void misaligned(const float* x, float* y, int shift) {
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + shift);
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// each block adds up its numbers in whatever order its threads come
void sum_in_any_order(const float* x, float* y) { atomicAdd(y, x[threadIdx.x]); }

void blocks_write_the_same(float* y) {
  if (threadIdx.x == 0) y[0] = float(blockIdx.x * 0);
}

void blocks_write_neighbours(uint16_t* y) { y[blockIdx.x * blockDim.x + threadIdx.x] = uint16_t(threadIdx.x); }

// two stages of cp.async; `early`: reads one group too soon; `refill`: issues the next copy before all have read
void copies(const float* x, float* y, int n, bool early, bool refill) {
  float* s = shared_floats();
  const int stage_floats = 4 * blockDim.x, mine = 4 * threadIdx.x;
  const auto fetch = [&](int i) {
    if (i < n) ptx::cp_async_16(s + i % 2 * stage_floats + mine, x + i * stage_floats + mine);
    ptx::cp_async_commit();
  };
  fetch(0);
  fetch(1);
  float sum = 0;
  for (int i = 0; i < n; ++i) {
    if (early)
      ptx::cp_async_wait<2>();
    else
      ptx::cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) sum += s[i % 2 * stage_floats + (mine + 4 + j) % stage_floats];  // the neighbour's
    if (!refill) __syncthreads();
    fetch(i + 2);
  }
  y[threadIdx.x] = sum;
}

}  // namespace

extern "C" {

void run_reverse(int64_t blocks, int64_t threads, const float* x, float* y, int64_t barrier, int64_t seed) {
  executor::launch(dim3(blocks), dim3(threads), 4 * threads, seed, [&] { reverse(x, y, barrier != 0); });
}
void run_reverse_in_warp(const float* x, float* y, int64_t barrier, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 256, seed, [&] { reverse_in_warp(x, y, barrier != 0); });
}
void run_divergent_barrier(float* y, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 0, seed, [&] { divergent_barrier(y); });
}
void run_barrier_after_return(float* y, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 0, seed, [&] { barrier_after_return(y); });
}
void run_shuffle_in_a_branch(float* y, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 0, seed, [&] { shuffle_in_a_branch(y); });
}
void run_reads_what_nobody_wrote(float* y, int64_t seed) {
  executor::launch(dim3(2), dim3(64), 256, seed, [&] { reads_what_nobody_wrote(y); });
}
void run_one_beyond(const float* x, float* y, int64_t beyond_shared, int64_t beyond_global, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 256, seed, [&] { one_beyond(x, y, int(beyond_shared), int(beyond_global)); });
}
void run_beyond_a_local_array(const int* index, float* y, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 0, seed, [&] { beyond_a_local_array(index, y); });
}
void run_misaligned(const float* x, float* y, int64_t shift, int64_t seed) {
  executor::launch(dim3(1), dim3(32), 0, seed, [&] { misaligned(x, y, int(shift)); });
}
void run_sum_in_any_order(const float* x, float* y, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 0, seed, [&] { sum_in_any_order(x, y); });
}
void run_blocks_write_the_same(float* y, int64_t seed) {
  executor::launch(dim3(3), dim3(32), 0, seed, [&] { blocks_write_the_same(y); });
}
void run_blocks_write_neighbours(uint16_t* y, int64_t seed) {
  executor::launch(dim3(3), dim3(33), 0, seed, [&] { blocks_write_neighbours(y); });
}
void run_copies(const float* x, float* y, int64_t n, int64_t early, int64_t refill, int64_t seed) {
  executor::launch(dim3(1), dim3(64), 2 * 64 * 16, seed, [&] { copies(x, y, int(n), early != 0, refill != 0); });
}

}  // extern "C"
