// Models of the instructions: shuffles, mma, ldmatrix, cp.async, conversions.
#include <algorithm>
#include <cfloat>
#include <cstdlib>

#include "runtime.h"

namespace executor {

// ---- shuffles and votes

void shuffle(uint32_t mask, const char* what, Where where, Shuffle& record) {
  const auto perform = [](void* const* lanes) {
    uint64_t values[32] = {};
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) values[i] = static_cast<Shuffle*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      auto& mine = *static_cast<Shuffle*>(lanes[i]);
      if (!lanes[mine.source]) {
        report("shuffle: lane " + std::to_string(i) + " reads lane " + std::to_string(mine.source) +
               ", which does not take part");
        mine.value = ~uint64_t(0);
      } else {
        mine.value = values[mine.source];
      }
    }
  };
  together(mask, what, where, perform, &record);
}

uint32_t ballot(uint32_t mask, bool predicate, Where where) {
  uint32_t record = predicate;
  const auto perform = [](void* const* lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i] && *static_cast<uint32_t*>(lanes[i])) votes |= 1u << i;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) *static_cast<uint32_t*>(lanes[i]) = votes;
  };
  together(mask, "vote", where, perform, &record);
  return record;
}

// ---- 16-bit and 19-bit formats

namespace {

float from_fp16(uint32_t h) {
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  const uint32_t exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
  return sign * std::ldexp(float(mantissa | 0x400), int(exponent) - 25);
}

uint32_t to_fp16(float x) {
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const float steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // ties to even; 2048 carries by itself
  return sign | (uint32_t(exponent + 14 << 10) + uint32_t(steps));
}

uint32_t to_bf16(float x) {
  const uint32_t u = __float_as_uint(x);
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

float from_bf16(uint32_t h) { return __uint_as_float(h << 16); }

}  // namespace

uint32_t round_tf32(float x) {
  const uint32_t u = __float_as_uint(x);
  if (!std::isfinite(x)) return x != x ? 0x7fffffff : u;
  return u + 0x1000 & 0xffffe000;
}
uint32_t pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
uint32_t pack_fp16(float low, float high) { return to_fp16(low) | to_fp16(high) << 16; }
float2 unpack_fp16(uint32_t pair) { return {from_fp16(pair & 0xffff), from_fp16(pair >> 16)}; }

namespace {

float less_accurate(float x) {  // one bit less, zero for subnormals
  return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : __uint_as_float(__float_as_uint(x) & ~1u);
}

}  // namespace

float ex2_approx(float x) { return less_accurate(std::exp2(x)); }
float rcp_approx(float x) { return less_accurate(1 / (std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x)); }

// ---- mma

namespace {

struct Fragments {
  float* c;
  const uint32_t *a, *b;
};

constexpr int guard_bits = 2;

uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }

// c + sum of products as a tensor core forms it: all addends aligned to the largest, cut off guard_bits below its last
// place, added exactly, cut to float32.
float truncated_sum(float c, const double* products, int count) {
  constexpr uint64_t magnitude = ~uint64_t(0) >> 1;
  uint64_t largest = bits_of(c) & magnitude;
  for (int i = 0; i < count; ++i) largest = std::max(largest, bits_of(products[i]) & magnitude);
  const int exponent = int(largest >> 52) - 1023;
  if (largest == 0) return 0;
  if (exponent == 1024) {
    double sum = c;
    for (int i = 0; i < count; ++i) sum += products[i];
    return float(sum);
  }
  const int shift = 23 + guard_bits - exponent;
  const double scale = __builtin_bit_cast(double, uint64_t(1023 + shift) << 52);
  int64_t sum = int64_t(c * scale);
  for (int i = 0; i < count; ++i) sum += int64_t(products[i] * scale);
  const double exact = double(sum) * __builtin_bit_cast(double, uint64_t(1023 - shift) << 52);
  return float(__builtin_bit_cast(double, bits_of(exact) & ~((uint64_t(1) << 29) - 1)));
}

template <int K, class A, class B>
void multiply(void* const* lanes, const A& a_of, const B& b_of) {
  double a[16][K], b[8][K];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments*>(lanes[lane]);
    a_of(f.a, lane >> 2, lane & 3, a);
    b_of(f.b, lane >> 2, lane & 3, b);
  }
  constexpr int block = K / 2;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const double* row = a[(lane >> 2) + (i & 2 ? 8 : 0)];
      const double* column = b[2 * (lane & 3) + (i & 1)];
      for (int k = 0; k < K; k += block) {
        double products[block];
        for (int j = 0; j < block; ++j) products[j] = row[k + j] * column[k + j];
        f.c[i] = truncated_sum(f.c[i], products, block);
      }
    }
  }
}

template <float (&convert)(uint32_t)>
void mma_b16(void* const* lanes) {
  const auto a_of = [](const uint32_t* r, int g, int t, double (&a)[16][16]) {
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        a[g + (i & 1 ? 8 : 0)][2 * t + (i & 2 ? 8 : 0) + half] = convert(r[i] >> 16 * half & 0xffff);
  };
  const auto b_of = [](const uint32_t* r, int g, int t, double (&b)[8][16]) {
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half) b[g][2 * t + 8 * i + half] = convert(r[i] >> 16 * half & 0xffff);
  };
  multiply<16>(lanes, a_of, b_of);
}

void mma_tf32(void* const* lanes) {
  const auto cut = [](uint32_t r) { return double(__uint_as_float(r & 0xffffe000)); };
  const auto a_of = [cut](const uint32_t* r, int g, int t, double (&a)[16][8]) {
    for (int i = 0; i < 4; ++i) a[g + (i & 1 ? 8 : 0)][t + (i & 2 ? 4 : 0)] = cut(r[i]);
  };
  const auto b_of = [cut](const uint32_t* r, int g, int t, double (&b)[8][8]) {
    for (int i = 0; i < 2; ++i) b[g][t + 4 * i] = cut(r[i]);
  };
  multiply<8>(lanes, a_of, b_of);
}

constexpr uint32_t all_lanes = 0xffffffff;

bool whole_warp(void* const* lanes, const char* what) {
  for (int i = 0; i < 32; ++i) {
    if (lanes[i]) continue;
    report(std::string(what) + " in a warp of fewer than 32 threads");
    return false;
  }
  return true;
}

}  // namespace

void mma(Operand operand, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments record{c, a, b};
  switch (operand) {
    case Operand::bf16:
      return together(
          all_lanes, "mma.bf16", {}, [](void* const* l) { whole_warp(l, "mma") ? mma_b16<from_bf16>(l) : void(); },
          &record);
    case Operand::fp16:
      return together(
          all_lanes, "mma.fp16", {}, [](void* const* l) { whole_warp(l, "mma") ? mma_b16<from_fp16>(l) : void(); },
          &record);
    case Operand::tf32:
      return together(
          all_lanes, "mma.tf32", {}, [](void* const* l) { whole_warp(l, "mma") ? mma_tf32(l) : void(); }, &record);
  }
}

// ---- ldmatrix

namespace {

struct Rows {
  uint32_t* r;
  const unsigned char* row;
  bool valid;
};

void load_matrices(void* const* lanes, bool transposed) {
  if (!whole_warp(lanes, "ldmatrix")) return;
  uint16_t elements[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Rows*>(lanes[lane]);
    if (mine.valid)
      std::memcpy(elements[lane], mine.row, 16);
    else
      std::memset(elements[lane], 0xff, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = lane & 3;
    uint32_t* r = static_cast<const Rows*>(lanes[lane])->r;
    for (int i = 0; i < 4; ++i) {
      const auto& m = elements + 8 * i;
      const uint32_t low = transposed ? m[2 * t][g] : m[g][2 * t];
      const uint32_t high = transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
      r[i] = low | high << 16;
    }
  }
}

bool aligned(const void* p, int bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

std::string shared_address(const void* p) {
  return "shared memory" + std::string(p < shared_memory.begin ? " - " : " + ") +
         std::to_string(std::abs(static_cast<const unsigned char*>(p) - shared_memory.begin)) + " (of " +
         std::to_string(shared_memory.bytes) + " bytes)";
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, bool transposed) {
  Rows record{r, static_cast<const unsigned char*>(shared_row), true};
  if (!shared_memory.contains(shared_row, 16)) {
    report("out of bounds: ldmatrix by " + place() + " reads 16 bytes at " + shared_address(shared_row));
    record.valid = false;
  } else if (!aligned(shared_row)) {
    report("misaligned: ldmatrix by " + place() + " at " + shared_address(shared_row));
  } else {
    races_access(shared_row, 16, Kind::read, __builtin_return_address(0));
  }
  if (transposed)
    together(all_lanes, "ldmatrix.trans", {}, [](void* const* l) { load_matrices(l, true); }, &record);
  else
    together(all_lanes, "ldmatrix", {}, [](void* const* l) { load_matrices(l, false); }, &record);
}

// ---- cp.async

namespace {

void perform(Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.done = true;
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  if (!shared_memory.contains(shared, bytes) || source_bytes < 0 || source_bytes > bytes) {
    report("out of bounds: cp.async by " + place() + " writes " + std::to_string(bytes) + " bytes (" +
           std::to_string(source_bytes) + " copied) at " + shared_address(shared));
    return;
  }
  if (!aligned(shared, bytes) || (source_bytes && !aligned(global, bytes)))
    report("misaligned: cp.async by " + place() + " to " + shared_address(shared));
  const void* caller = __builtin_return_address(0);
  if (source_bytes) races_access(global, source_bytes, Kind::read, caller);
  races_access(shared, bytes, Kind::copy_begins, caller);
  running->copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
                             source_bytes, running->group, false});
  // Mostly not before the wait: what reads too early sees it. Sometimes at once: what is overwritten too early sees
  // that.
  if (!in_order() && random_below(4) == 0) perform(running->copies.back());
}

void cp_async_commit() { ++running->group; }

void cp_async_wait(int pending_groups) {
  Thread& thread = *running;
  const int last = thread.group - 1 - pending_groups;
  std::erase_if(thread.copies, [&](Copy& copy) {
    if (copy.group > last) return false;
    races_access(copy.shared, copy.bytes, Kind::copy_ends, __builtin_return_address(0));
    if (!copy.done) perform(copy);
    return true;
  });
}

}  // namespace executor
