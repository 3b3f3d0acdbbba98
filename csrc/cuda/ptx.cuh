// The PTX instructions that CUDA C++ has no words for: the only file with inline assembly.
//
// mma fragments, g = lane >> 2 and t = lane & 3. In a packed register the low half is the lower column of A, the lower
// row of B.
//
//               m16n8k16, two b16 a register                  m16n8k8, one tf32 a register
//   A (row, k)  0 (g, 2t..)    2 (g, 2t + 8..)                0 (g, t)      2 (g, t + 4)
//               1 (g+8, 2t..)  3 (g+8, 2t + 8..)              1 (g+8, t)    3 (g+8, t + 4)
//   B (k, col)  0 (2t.., g)    1 (2t + 8.., g)                0 (t, g)      1 (t + 4, g)
//   C (row, col), both: 0 (g, 2t)  1 (g, 2t+1)  2 (g+8, 2t)  3 (g+8, 2t+1)
//
// Without a GPU the same functions are executed on the host: tests/executor/README.md.
#pragma once

#include <cstdint>

namespace ilvae::cuda::ptx {

#if defined(ILVAE_EXECUTOR)

// The block's dynamic shared memory, 128-byte aligned; kernels take all their shared memory from here.
__device__ __forceinline__ unsigned char* dynamic_shared() { return executor::dynamic_shared(); }

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  executor::mma(executor::Operand::bf16, c, a, b);
}
__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  executor::mma(executor::Operand::fp16, c, a, b);
}
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  executor::mma(executor::Operand::tf32, c, a, b);
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  executor::ldmatrix_x4(r, shared_row, false);
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  executor::ldmatrix_x4(r, shared_row, true);
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int source_bytes = 16) {
  executor::cp_async(shared, global, 16, source_bytes);
}
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int source_bytes = 4) {
  executor::cp_async(shared, global, 4, source_bytes);
}
__device__ __forceinline__ void cp_async_commit() { executor::cp_async_commit(); }
template <int pending_groups>
__device__ __forceinline__ void cp_async_wait() {
  executor::cp_async_wait(pending_groups);
}

__device__ __forceinline__ uint32_t round_tf32(float x) { return executor::round_tf32(x); }
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) { return executor::pack_bf16(low, high); }
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) { return executor::pack_fp16(low, high); }
__device__ __forceinline__ float2 unpack_fp16(uint32_t pair) { return executor::unpack_fp16(pair); }
__device__ __forceinline__ float ex2_approx(float x) { return executor::ex2_approx(x); }
__device__ __forceinline__ float rcp_approx(float x) { return executor::rcp_approx(x); }

#else

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char ilvae_dynamic_shared[];
  return ilvae_dynamic_shared;
}

// c += a b, 16x16 by 16x8 (b16) or 16x8 by 8x8 (tf32); sums are truncated, not rounded.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Operands are float32 bits of which the last 13 are ignored: round them first.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of b16. Lane 8 i + j names row j (16 aligned bytes) of matrix i; r[i] is then this lane's pair
// (g, 2t..2t+1) of matrix i, transposed (2t..2t+1, g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

// Copies source_bytes (0..16) from global to shared memory past the registers and fills up 16 bytes with zeros; both
// addresses 16-byte aligned. Visible to this thread after the wait, to others after a barrier that follows it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int source_bytes = 16) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
      : "memory");
}
// The same for 4 bytes (0..4 of them copied), addresses 4-byte aligned.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int source_bytes = 4) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
      : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending_groups>  // waits until at most so many of this thread's groups are under way
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending_groups) : "memory");
}

__device__ __forceinline__ uint32_t round_tf32(float x) {  // to nearest, ties away from zero
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {  // to nearest, ties to even
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {  // as above; beyond 65504 inf
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float2 unpack_fp16(uint32_t pair) {
  float2 r;
  asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;}"
      : "=f"(r.x), "=f"(r.y)
      : "r"(pair));
  return r;
}
__device__ __forceinline__ float ex2_approx(float x) {  // 2^x, relative error 2^-22; subnormal results are 0
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float rcp_approx(float x) {  // 1 / x to one unit in the last place
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

#endif

__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {  // (low, high)
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

}  // namespace ilvae::cuda::ptx
