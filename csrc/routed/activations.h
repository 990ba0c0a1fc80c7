// Activations and their derivatives, by lanes, with the same bits at every CPU level. For NAME_loops.cpp files. Torch-free, internal
// linkage.
#pragma once

#include "lowrank/lanes.h"
#include "routed/activation.h"

namespace taskloom {
namespace {

template <class T>
inline __attribute__((always_inline)) Lanes<T> polynomial(const Lanes<T>& x, const T* coefficients, int degree) {
  Lanes<T> sum = every_lane(coefficients[degree]);
  for (int term = degree - 1; term >= 0; --term) sum = sum * x + every_lane(coefficients[term]);
  return sum;
}

// The error function: x p(x^2) up to 1, 1 - exp(-q(x)) from there on; Chebyshev fits of our own, to about an ulp and a half.
inline __attribute__((always_inline)) Lanes<float> error_function(const Lanes<float>& x) {
  constexpr float p[] = {1.12837917f,    -0.376126385f,   0.112837826f,    -0.0268654383f,
                         0.00522105342f, -0.00084843966f, 0.000112682542f, -9.67359186e-06f};
  constexpr float q[] = {0.000756968617f, 1.12592595f,   0.639093319f,     0.10331898f,
                         -0.0226219859f,  0.0034368676f, -0.000317572035f, 1.33093904e-05f};
  const Lanes<float> zero = every_lane(0.0f), one = every_lane(1.0f), four = every_lane(4.0f);
  const Lanes<float> size = absolute(x), nearer = where_above(size, four, four, size);
  const Lanes<float> small = x * polynomial(x * x, p, 7);
  const Lanes<float> tail = one - exponential(zero - polynomial(nearer, q, 7));
  return where_above(size, one, where_above(zero, x, zero - tail, tail), small);
}

inline __attribute__((always_inline)) Lanes<double> error_function(const Lanes<double>& x) {
  double all[lanes];
  store_lanes(all, x);
  for (double& one : all) one = __builtin_erf(one);
  return load_lanes(all);
}

template <class T>
inline __attribute__((always_inline)) Lanes<T> logistic(const Lanes<T>& x) {
  return every_lane(T{1}) / (every_lane(T{1}) + exponential(every_lane(T{0}) - x));
}

template <class T>
inline __attribute__((always_inline)) Lanes<T> normal_distribution(const Lanes<T>& x) {
  const Lanes<T> half = every_lane(T{0.5});
  return half + half * error_function(x * every_lane(static_cast<T>(0.70710678118654752)));
}

template <Activation activation, class T>
inline __attribute__((always_inline)) Lanes<T> activated(const Lanes<T>& x) {
  const Lanes<T> zero = every_lane(T{0});
  if constexpr (activation == Activation::relu) {
    // False for NaN, which stays.
    return where_above(zero, x, zero, x);
  } else if constexpr (activation == Activation::gelu) {
    return x * normal_distribution(x);
  } else if constexpr (activation == Activation::silu) {
    return x / (every_lane(T{1}) + exponential(zero - x));
  } else {
    return x;
  }
}

template <Activation activation, class T>
inline __attribute__((always_inline)) Lanes<T> slope_of(const Lanes<T>& x) {
  const Lanes<T> zero = every_lane(T{0}), one = every_lane(T{1});
  if constexpr (activation == Activation::relu) {
    return where_above(x, zero, one, zero);
  } else if constexpr (activation == Activation::gelu) {
    const Lanes<T> density = every_lane(static_cast<T>(0.39894228040143268)) * exponential(every_lane(T{-0.5}) * (x * x));
    return normal_distribution(x) + x * density;
  } else if constexpr (activation == Activation::silu) {
    const Lanes<T> gate = logistic(x);
    return gate * (one + x * (one - gate));
  } else {
    return one;
  }
}

}  // namespace
}  // namespace taskloom
