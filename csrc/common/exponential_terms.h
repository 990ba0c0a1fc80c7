// The constants of our exponential, which vectors of every CPU level, GPUs and the reference compute with the same bits. Torch-free.
#pragma once

#include <cstdint>

namespace taskloom {
namespace {

template <class T>
struct Words;
template <>
struct Words<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23;
  static constexpr Int magnitude = 0x7fffffff, infinity = 0x7f800000, one_half = 0x3f000000;
};
template <>
struct Words<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52;
  static constexpr Int magnitude = 0x7fffffffffffffff, infinity = 0x7ff0000000000000, one_half = 0x3fe0000000000000;
};

// The exponential to about one unit in the last place; what would be subnormal is 0.
template <class T>
struct ExpTable;
template <>
struct ExpTable<float> {
  static constexpr float lowest = -87.33654f, highest = 88.72283f, log2_e = 1.44269504f, rounder = 12582912.0f;
  // ln 2 in two parts, the first of so few bits that its products with exponents are exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int terms = 8;
  static constexpr float inverse_factorial[terms] = {1.f, 1.f, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
};
template <>
struct ExpTable<double> {
  static constexpr double lowest = -708.39641853226408, highest = 709.78271289338397, log2_e = 1.4426950408889634,
                          rounder = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int terms = 14;
  static constexpr double inverse_factorial[terms] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

}  // namespace
}  // namespace taskloom
