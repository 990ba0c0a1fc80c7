// Loads and stores of blocks of storage elements as float or double, round to nearest even. Torch-free; for NAME_loops.cpp files, so that
// every CPU level compiles its own copy: everything here has internal linkage. Data need not be aligned (mapped files are not).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/unaligned.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace taskloom {
namespace {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bfloat16_to_float(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline float half_to_float(uint16_t value) {
  const uint32_t magnitude = value & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? 0x400000u : 0u);
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bits_float(sign | (magnitude >= 0x7c00u ? special : magnitude < 0x400u ? subnormal : normal));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 lines the last bit of a half subnormal (2^-24) up with the last bit of a float, so the hardware rounds it.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? nan : 0x7c00u;
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude >= 0x477ff000u ? special : finite));
}

#ifdef __F16C__
template <class Acc>
inline void load_halves(const char* from, int64_t n, Acc* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i)));
    if constexpr (sizeof(Acc) == 4) {
      _mm256_storeu_ps(out + i, values);
    } else {
      _mm256_storeu_pd(out + i, _mm256_cvtps_pd(_mm256_castps256_ps128(values)));
      _mm256_storeu_pd(out + i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)));
    }
  }
  for (; i < n; ++i) out[i] = static_cast<Acc>(half_to_float(load_at<uint16_t>(from, i)));
}

template <class Acc>
inline void store_halves(const Acc* values, int64_t n, char* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    alignas(32) float lanes[8];
    for (int lane = 0; lane < 8; ++lane) lanes[lane] = static_cast<float>(values[i + lane]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i), _mm256_cvtps_ph(_mm256_load_ps(lanes), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) store_at(to, i, float_to_half(static_cast<float>(values[i])));
}
#else
template <class Acc>
inline void load_halves(const char* from, int64_t n, Acc* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(half_to_float(load_at<uint16_t>(from, i)));
}

template <class Acc>
inline void store_halves(const Acc* values, int64_t n, char* to) {
  for (int64_t i = 0; i < n; ++i) store_at(to, i, float_to_half(static_cast<float>(values[i])));
}
#endif

// Asks for elements offset .. offset + n of `data` to be brought near. For loops that take a short run of each of many tensors in turn: the
// processor notices a run only when it is well under way, and waits for the start of each anew.
inline void prefetch_block(DType dtype, const void* data, int64_t offset, int64_t n) {
  constexpr int64_t cache_line = 64;
  const char* from = static_cast<const char*>(data) + offset * element_size(dtype);
  for (int64_t byte = 0; byte < n * element_size(dtype); byte += cache_line) __builtin_prefetch(from + byte, 0, 2);
}

// Elements offset .. offset + n of `data`, as Acc (float or double).
template <class Acc>
inline void load_block(DType dtype, const void* data, int64_t offset, int64_t n, Acc* __restrict__ out) {
  const char* from = static_cast<const char*>(data) + offset * element_size(dtype);
  switch (dtype) {
    case DType::f32:
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(load_at<float>(from, i));
      return;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(bfloat16_to_float(load_at<uint16_t>(from, i)));
      return;
    case DType::f16:
      load_halves(from, n, out);
      return;
    case DType::f64:
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(load_at<double>(from, i));
      return;
  }
}

// Writes n values to elements offset .. offset + n of `data`. A double goes to a 16-bit type through float, as in torch.
template <class Acc>
inline void store_block(DType dtype, const Acc* __restrict__ values, int64_t n, void* data, int64_t offset) {
  char* to = static_cast<char*>(data) + offset * element_size(dtype);
  switch (dtype) {
    case DType::f32:
      for (int64_t i = 0; i < n; ++i) store_at(to, i, static_cast<float>(values[i]));
      return;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) store_at(to, i, float_to_bfloat16(static_cast<float>(values[i])));
      return;
    case DType::f16:
      store_halves(values, n, to);
      return;
    case DType::f64:
      for (int64_t i = 0; i < n; ++i) store_at(to, i, static_cast<double>(values[i]));
      return;
  }
}

}  // namespace
}  // namespace taskloom
