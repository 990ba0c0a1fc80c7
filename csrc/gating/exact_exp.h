// The exponential and the sigmoid of one value on a GPU, with the bits of the CPU's lanes. Everything here has internal linkage.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/exponential_terms.h"

namespace taskloom {
namespace {

inline __device__ int32_t bits_of(float value) { return __float_as_int(value); }
inline __device__ int64_t bits_of(double value) { return __double_as_longlong(value); }
inline __device__ float from_bits(int32_t bits) { return __int_as_float(bits); }
inline __device__ double from_bits(int64_t bits) { return __longlong_as_double(bits); }

template <class Acc, int term>
__device__ inline Acc exp_series(Acc rest) {
  constexpr Acc factor = ExpTable<Acc>::inverse_factorial[term];
  if constexpr (term + 1 == ExpTable<Acc>::terms) {
    return factor;
  } else {
    return exp_series<Acc, term + 1>(rest) * rest + factor;
  }
}

template <class Acc>
__device__ inline Acc exact_exp(Acc x) {
  using Table = ExpTable<Acc>;
  using Int = typename Words<Acc>::Int;
  constexpr Acc log2_e = Table::log2_e, rounder = Table::rounder, ln2_high = Table::ln2_high, ln2_low = Table::ln2_low;
  constexpr Acc lowest = Table::lowest, highest = Table::highest;
  const Acc shifted = x * log2_e + rounder, power = shifted - rounder;
  const Acc rest = (x - power * ln2_high) - power * ln2_low;
  using Unsigned = std::make_unsigned_t<Int>;
  const auto scale = static_cast<Int>((static_cast<Unsigned>(bits_of(shifted)) << Words<Acc>::mantissa) + Words<Acc>::one_half);
  const Acc value = (exp_series<Acc, 0>(rest) * from_bits(scale)) * Acc{2};
  const Acc floored = x < lowest ? Acc{0} : value;
  return x > highest ? from_bits(Words<Acc>::infinity) : floored;
}

template <class Acc>
__device__ inline Acc exact_sigmoid(Acc z) {
  return Acc{1} / (Acc{1} + exact_exp(Acc{0} - z));
}

// Integers in the order of values, both zeros alike; 0 is below that of any number.
inline __device__ uint32_t ordered_key(float value) {
  const uint32_t bits = value == 0 ? 0u : __float_as_uint(value);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
inline __device__ uint64_t ordered_key(double value) {
  const auto bits = value == 0 ? 0ull : static_cast<unsigned long long>(__double_as_longlong(value));
  return bits ^ (bits >> 63 != 0 ? 0xffffffffffffffffull : 0x8000000000000000ull);
}
inline __device__ float key_value(uint32_t key) { return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu)); }
inline __device__ double key_value(uint64_t key) {
  return __longlong_as_double(static_cast<long long>(key ^ (key >> 63 != 0 ? 0x8000000000000000ull : 0xffffffffffffffffull)));
}

}  // namespace
}  // namespace taskloom
