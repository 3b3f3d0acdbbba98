// Exponential and logarithm for the activations, in a form that compilers vectorise: no calls, no branches, no tables.
// Arguments are restricted to what the activations need. NaN in, NaN out.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define ILVAE_HD __host__ __device__ __forceinline__
#else
#define ILVAE_HD inline __attribute__((always_inline))
#endif

namespace ilvae {

namespace detail {

// exp(x) = scale + scale * rest with scale = 2^n and |log(1 + rest)| <= log(2) / 2, so that both exp and expm1 follow
// without cancellation.
template <class T>
struct Exponential {
  T scale, rest;
};

template <class T>
ILVAE_HD Exponential<T> split_exponential(T x);

// Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits; shifted up by the mantissa's width they
// are an exponent.
template <>
ILVAE_HD Exponential<float> split_exponential(float x) {
  const float shifter = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 1.9875691500e-4f;  // Cephes expf
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  const uint32_t bits = (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u;
  return {__builtin_bit_cast(float, bits), q * (r * r) + r};
}

template <>
ILVAE_HD Exponential<double> split_exponential(double x) {
  const double shifter = 6755399441055744.0;
  const double shifted = x * 1.4426950408889634074 + shifter;
  const double n = shifted - shifter;
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double q = 1.0 / 6227020800.0;  // Taylor to degree 13: the remainder is below 1e-17 for |r| <= log(2) / 2
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
  const uint64_t bits = (__builtin_bit_cast(uint64_t, shifted) << 52) + 0x3ff0000000000000u;
  return {__builtin_bit_cast(double, bits), q * (r * r) + r};
}

template <class T>
inline constexpr T smallest_exponent = std::numeric_limits<T>::min_exponent * T(0.69314718);

}  // namespace detail

// exp(x) for x <= 0; 0 where the result would be subnormal.
template <class T>
ILVAE_HD T exp_nonpositive(T x) {
  const T bound = detail::smallest_exponent<T>;
  const auto [scale, rest] = detail::split_exponential<T>(x < bound ? bound : x);
  return x < bound ? T(0) : scale + scale * rest;
}

// exp(x) - 1 for x <= 0, accurate near 0.
template <class T>
ILVAE_HD T expm1_nonpositive(T x) {
  const T bound = detail::smallest_exponent<T>;
  const auto [scale, rest] = detail::split_exponential<T>(x < bound ? bound : x);
  return (scale - T(1)) + scale * rest;
}

// log(1 + e) for 0 <= e <= 1, accurate near 0.
template <class T>
ILVAE_HD T log1p_unit(T e);

template <>
ILVAE_HD float log1p_unit(float e) {  // minimax of log1p(e) / e, relative error 4.7e-9
  float q = -0.00324401191252f;
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
}

template <>
ILVAE_HD double log1p_unit(double e) {  // 2 atanh(s), s = e / (2 + e) <= 1/3: the series to s^33
  const double s = e / (2.0 + e), z = s * s;
  double q = 1.0 / 33.0;
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

}  // namespace ilvae
