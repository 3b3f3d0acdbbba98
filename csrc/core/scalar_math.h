// Exponential and logarithm for the activations: no calls, no branches, no tables, so that compilers vectorise loops
// over them, and V may be float, double or several of these at once (Wide of cpu/vectors.h). Arguments are restricted
// to what the activations need. NaN in, NaN out.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define ILVAE_HD __host__ __device__ __forceinline__
#else
#define ILVAE_HD inline __attribute__((always_inline))
#endif

namespace ilvae {

// The type of the numbers that V holds.
template <class V>
struct ElementOf {
  using type = V;
};
template <class V>
using Element = typename ElementOf<V>::type;

// What Wide has too
template <class V>
ILVAE_HD V select(bool condition, V yes, V no) {
  return condition ? yes : no;
}
ILVAE_HD float magnitude(float x) { return fabsf(x); }
ILVAE_HD double magnitude(double x) { return fabs(x); }

namespace detail {

// Adding 1.5 * 2^mantissa rounds to an integer n and leaves it in the low bits; shifted up by the mantissa's width they
// are an exponent.
template <class T>
inline constexpr T shifter = std::is_same_v<T, float> ? T(12582912.0) : T(6755399441055744.0);

// 2^n from n + shifter
ILVAE_HD float power_of_two(float shifted) {
  return __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u);
}
ILVAE_HD double power_of_two(double shifted) {
  return __builtin_bit_cast(double, (__builtin_bit_cast(uint64_t, shifted) << 52) + 0x3ff0000000000000u);
}

// exp(x) = scale + scale * rest with scale = 2^n and |log(1 + rest)| <= log(2) / 2, so that both exp and expm1 follow
// without cancellation.
template <class V>
struct Exponential {
  V scale, rest;
};

template <class V>
ILVAE_HD Exponential<V> split_exponential(V x) {
  using T = Element<V>;
  const V shifted = x * T(1.4426950408889634074) + shifter<T>;
  const V n = shifted - shifter<T>;
  if constexpr (std::is_same_v<T, float>) {
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V q = 1.9875691500e-4f;  // Cephes expf
    q = q * r + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
    return {power_of_two(shifted), q * (r * r) + r};
  } else {
    const V r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    V q = 1.0 / 6227020800.0;  // Taylor to degree 13: the remainder is below 1e-17 for |r| <= log(2) / 2
    q = q * r + 1.0 / 479001600.0;
    q = q * r + 1.0 / 39916800.0;
    q = q * r + 1.0 / 3628800.0;
    q = q * r + 1.0 / 362880.0;
    q = q * r + 1.0 / 40320.0;
    q = q * r + 1.0 / 5040.0;
    q = q * r + 1.0 / 720.0;
    q = q * r + 1.0 / 120.0;
    q = q * r + 1.0 / 24.0;
    q = q * r + 1.0 / 6.0;
    q = q * r + 0.5;
    return {power_of_two(shifted), q * (r * r) + r};
  }
}

template <class T>
inline constexpr T smallest_exponent = std::numeric_limits<T>::min_exponent * T(0.69314718);

}  // namespace detail

// exp(x) for x <= 0; 0 where the result would be subnormal.
template <class V>
ILVAE_HD V exp_nonpositive(V x) {
  const auto [scale, rest] = detail::split_exponential(x);
  return select(x < detail::smallest_exponent<Element<V>>, V(0), scale + scale * rest);
}

// exp(x) - 1 for x <= 0, accurate near 0.
template <class V>
ILVAE_HD V expm1_nonpositive(V x) {
  const auto [scale, rest] = detail::split_exponential(x);
  return select(x < detail::smallest_exponent<Element<V>>, V(-1), (scale - V(1)) + scale * rest);
}

// log(1 + e) for 0 <= e <= 1, accurate near 0.
template <class V>
ILVAE_HD V log1p_unit(V e) {
  if constexpr (std::is_same_v<Element<V>, float>) {  // minimax of log1p(e) / e, relative error 4.7e-9
    V q = -0.00324401191252f;
    q = q * e + 0.0198514004944f;
    q = q * e - 0.0569594132536f;
    q = q * e + 0.106036420166f;
    q = q * e - 0.153055845131f;
    q = q * e + 0.196759362536f;
    q = q * e - 0.249541330169f;
    q = q * e + 0.333299623477f;
    q = q * e - 0.499999024201f;
    q = q * e + 0.999999995287f;
    return e * q;
  } else {  // 2 atanh(s), s = e / (2 + e) <= 1/3: the series to s^33
    const V s = e / (2.0 + e), z = s * s;
    V q = 1.0 / 33.0;
    q = q * z + 1.0 / 31.0;
    q = q * z + 1.0 / 29.0;
    q = q * z + 1.0 / 27.0;
    q = q * z + 1.0 / 25.0;
    q = q * z + 1.0 / 23.0;
    q = q * z + 1.0 / 21.0;
    q = q * z + 1.0 / 19.0;
    q = q * z + 1.0 / 17.0;
    q = q * z + 1.0 / 15.0;
    q = q * z + 1.0 / 13.0;
    q = q * z + 1.0 / 11.0;
    q = q * z + 1.0 / 9.0;
    q = q * z + 1.0 / 7.0;
    q = q * z + 1.0 / 5.0;
    q = q * z + 1.0 / 3.0;
    q = q * z + 1.0;
    return 2.0 * s * q;
  }
}

}  // namespace ilvae
