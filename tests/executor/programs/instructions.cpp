// The instructions one by one, for comparison with their definitions in the PTX manual.
#include "ptx.cuh"

using namespace ilvae::cuda;

extern "C" {

// c (16, 8) += a (16, k) b (k, 8), row-major, k = 16 (kind 0: bf16, 1: fp16, elements already converted to bits) or 8
// (kind 2: tf32 as float32).
void multiply(int64_t kind, const void* a, const void* b, float* c, int64_t seed) {
  executor::launch(dim3(1), dim3(32), 0, seed, [&] {
    const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    float f[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
    if (kind == 2) {
      const auto* x = static_cast<const uint32_t*>(a);
      const auto* y = static_cast<const uint32_t*>(b);
      const uint32_t fa[4] = {x[g * 8 + t], x[(g + 8) * 8 + t], x[g * 8 + t + 4], x[(g + 8) * 8 + t + 4]};
      const uint32_t fb[2] = {y[t * 8 + g], y[(t + 4) * 8 + g]};
      ptx::mma_tf32(f, fa, fb);
    } else {
      const auto* x = static_cast<const uint16_t*>(a);
      const auto* y = static_cast<const uint16_t*>(b);
      const auto pair = [](const uint16_t* p, int stride) { return uint32_t(p[0]) | uint32_t(p[stride]) << 16; };
      const uint32_t fa[4] = {pair(x + g * 16 + 2 * t, 1), pair(x + (g + 8) * 16 + 2 * t, 1),
                              pair(x + g * 16 + 2 * t + 8, 1), pair(x + (g + 8) * 16 + 2 * t + 8, 1)};
      const uint32_t fb[2] = {pair(y + 2 * t * 8 + g, 8), pair(y + (2 * t + 8) * 8 + g, 8)};
      kind == 0 ? ptx::mma_bf16(f, fa, fb) : ptx::mma_fp16(f, fa, fb);
    }
    c[g * 8 + 2 * t] = f[0];
    c[g * 8 + 2 * t + 1] = f[1];
    c[(g + 8) * 8 + 2 * t] = f[2];
    c[(g + 8) * 8 + 2 * t + 1] = f[3];
  });
}

// Four 8x8 matrices (32 rows of 8) to r (32 lanes, 4).
void load_matrices(int64_t transposed, const uint16_t* matrices, uint32_t* r, int64_t seed) {
  executor::launch(dim3(1), dim3(32), 512, seed, [&] {
    auto* s = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
    for (int i = 0; i < 8; ++i) s[threadIdx.x * 8 + i] = matrices[threadIdx.x * 8 + i];
    __syncwarp();
    uint32_t mine[4];
    transposed ? ptx::ldmatrix_x4_trans(mine, s + threadIdx.x * 8) : ptx::ldmatrix_x4(mine, s + threadIdx.x * 8);
    for (int i = 0; i < 4; ++i) r[threadIdx.x * 4 + i] = mine[i];
  });
}

void convert(int64_t n, const float* x, uint32_t* tf32, uint32_t* bf16, uint32_t* fp16, float* from_bf16,
             float* from_fp16, float* power, float* reciprocal) {
  executor::launch(dim3(n), dim3(1), 0, 0, [&] {
    const unsigned i = blockIdx.x;
    tf32[i] = ptx::round_tf32(x[i]);
    bf16[i] = ptx::pack_bf16(x[i], -x[i]);
    fp16[i] = ptx::pack_fp16(x[i], -x[i]);
    from_bf16[i] = ptx::unpack_bf16(bf16[i]).x + 0 * ptx::unpack_bf16(bf16[i]).y;
    from_fp16[i] = ptx::unpack_fp16(fp16[i]).x;
    power[i] = ptx::ex2_approx(x[i]);
    reciprocal[i] = ptx::rcp_approx(x[i]);
  });
}

// One block of 64: what lanes see through shuffles and votes. out (6, 64)
void shuffles(int64_t seed, float* out) {
  executor::launch(dim3(1), dim3(64), 0, seed, [&] {
    const int i = threadIdx.x;
    const float v = float(i);
    out[0 * 64 + i] = __shfl_xor_sync(0xffffffffu, v, 5);
    out[1 * 64 + i] = __shfl_down_sync(0xffffffffu, v, 3);
    out[2 * 64 + i] = __shfl_up_sync(0xffffffffu, v, 3, 8);
    out[3 * 64 + i] = float(__shfl_sync(0xffffffffu, double(v), 9, 4));
    out[4 * 64 + i] = float(__ballot_sync(0xffffffffu, i % 32 < 2));
    out[5 * 64 + i] = float(__any_sync(0xffffffffu, i == 40) * 2 + __all_sync(0xffffffffu, i < 32));
  });
}

}  // extern "C"
