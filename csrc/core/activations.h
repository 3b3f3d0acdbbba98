// The activations of the potential with first and second derivative, for host and device.
//
// To add one: a code here, a specialisation of `Function`, a row in for_activation(), and a row in
// ilvae_fast/activations.py.
#pragma once

#include "scalar_math.h"

namespace ilvae {

enum class ActivationKind : int {
  softplus = 0,
  leaky_relu = 1,
  relu = 2,
  celu = 3,
  smooth_leaky_relu = 4,
  identity = 5,
  squared_leaky_relu = 6,
};
inline constexpr int activation_kinds = 7;

struct Activation {
  ActivationKind kind = ActivationKind::identity;
  double parameter = 0;
};

// s(a), s'(a), s''(a). What a caller does not read the compiler does not compute.
template <class V>
struct Derivatives {
  V value, first, second;
};

// The parameter of an activation as the functions use it; device code gets it ready-made.
template <class T>
struct Parameter {
  T value = 0, inverse = 0;
  Parameter() = default;
  ILVAE_HD Parameter(double parameter) : value(T(parameter)), inverse(T(1 / parameter)) {}
};

// A Function takes V: T, or several of them at once (scalar_math.h).
template <ActivationKind kind, class T>
struct Function;

template <class T>
struct Function<ActivationKind::softplus, T> {
  T beta, inverse;
  ILVAE_HD explicit Function(Parameter<T> p) : beta(p.value), inverse(p.inverse) {}
  template <class V>
  ILVAE_HD Derivatives<V> operator()(V a) const {
    const V t = beta * a;
    const V e = exp_nonpositive(-magnitude(t));
    const V r = V(1) / (V(1) + e);
    return {select(a > 0, a, V(0)) + log1p_unit(e) * inverse, select(t < 0, e, V(1)) * r, beta * e * r * r};
  }
};

template <class T>
struct Function<ActivationKind::leaky_relu, T> {
  T slope;
  ILVAE_HD explicit Function(Parameter<T> p) : slope(p.value) {}
  template <class V>
  ILVAE_HD Derivatives<V> operator()(V a) const {
    const V first = select(a > 0, V(1), V(slope));
    return {first * a, first, V(0)};
  }
};

template <class T>
struct Function<ActivationKind::relu, T> {
  ILVAE_HD explicit Function(Parameter<T>) {}
  template <class V>
  ILVAE_HD Derivatives<V> operator()(V a) const {
    return {select(a <= 0, V(0), a), select(a > 0, V(1), V(0)), V(0)};
  }
};

template <class T>
struct Function<ActivationKind::celu, T> {
  T alpha, inverse;
  ILVAE_HD explicit Function(Parameter<T> p) : alpha(p.value), inverse(p.inverse) {}
  template <class V>
  ILVAE_HD Derivatives<V> operator()(V a) const {
    const V t = select(a > 0, V(0), a * inverse);
    const V e = exp_nonpositive(t);
    return {select(a > 0, a, alpha * expm1_nonpositive(t)), select(a > 0, V(1), e), select(a < 0, e * inverse, V(0))};
  }
};

template <class T>
struct Function<ActivationKind::smooth_leaky_relu, T> {
  T slope;
  ILVAE_HD explicit Function(Parameter<T> p) : slope(p.value) {}
  template <class V>
  ILVAE_HD Derivatives<V> operator()(V a) const {
    const auto soft = Function<ActivationKind::softplus, T>(1.0)(a);
    const T rest = T(1) - slope;
    return {slope * a + rest * soft.value, slope + rest * soft.first, rest * soft.second};
  }
};

template <class T>
struct Function<ActivationKind::identity, T> {
  ILVAE_HD explicit Function(Parameter<T>) {}
  template <class V>
  ILVAE_HD Derivatives<V> operator()(V a) const {
    return {a, V(1), V(0)};
  }
};

template <class T>
struct Function<ActivationKind::squared_leaky_relu, T> {
  T slope;
  ILVAE_HD explicit Function(Parameter<T> p) : slope(p.value) {}
  template <class V>
  ILVAE_HD Derivatives<V> operator()(V a) const {
    const V c = select(a > 0, V(1), V(slope)), l = c * a;
    return {l * l, T(2) * l * c, T(2) * c * c};
  }
};

// Calls body(function) with the Function object of a run-time activation.
template <class T, class Body>
ILVAE_HD void for_activation(ActivationKind kind, Parameter<T> p, const Body& body) {
  switch (kind) {
    case ActivationKind::softplus:
      return body(Function<ActivationKind::softplus, T>(p));
    case ActivationKind::leaky_relu:
      return body(Function<ActivationKind::leaky_relu, T>(p));
    case ActivationKind::relu:
      return body(Function<ActivationKind::relu, T>(p));
    case ActivationKind::celu:
      return body(Function<ActivationKind::celu, T>(p));
    case ActivationKind::smooth_leaky_relu:
      return body(Function<ActivationKind::smooth_leaky_relu, T>(p));
    case ActivationKind::identity:
      return body(Function<ActivationKind::identity, T>(p));
    case ActivationKind::squared_leaky_relu:
      return body(Function<ActivationKind::squared_leaky_relu, T>(p));
  }
}
template <class T, class Body>
ILVAE_HD void for_activation(Activation activation, const Body& body) {
  for_activation<T>(activation.kind, Parameter<T>(activation.parameter), body);
}

}  // namespace ilvae
