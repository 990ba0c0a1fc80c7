// Sixteen entries of a 16- or 32-bit storage type as float lanes, for NAME_loops.cpp files at the v4 level. The same values and rounding
// as load_block and store_block. Torch-free.
#pragma once

#ifdef __AVX512BW__

#include <immintrin.h>

#include "common/convert.h"

namespace taskloom {
namespace {

constexpr int64_t lane_count = 16;

// The lanes that `left` entries fill.
inline __mmask16 lanes_inside(int64_t left) {
  return left >= lane_count ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1);
}

inline void prefetch_bytes(const void* data, int64_t bytes) {
  constexpr int64_t cache_line = 64;
  for (int64_t byte = 0; byte < bytes; byte += cache_line) _mm_prefetch(static_cast<const char*>(data) + byte, _MM_HINT_T0);
}

template <DType dtype>
struct Storage;

template <>
struct Storage<DType::bf16> {
  static void prefetch(const void* data, int64_t at, int64_t n) { prefetch_bytes(static_cast<const char*>(data) + 2 * at, 2 * n); }
  static __m512 load(const void* data, int64_t at, __mmask16 inside) {
    const __m256i raw = _mm256_maskz_loadu_epi16(inside, static_cast<const char*>(data) + 2 * at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static void store(void* data, int64_t at, __m512 values, __mmask16 inside) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last), 16);
    const __m512i quiet_nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet_nan));
    _mm256_mask_storeu_epi16(static_cast<char*>(data) + 2 * at, inside, narrow);
  }
};

template <>
struct Storage<DType::f16> {
  static void prefetch(const void* data, int64_t at, int64_t n) { prefetch_bytes(static_cast<const char*>(data) + 2 * at, 2 * n); }
  static __m512 load(const void* data, int64_t at, __mmask16 inside) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(inside, static_cast<const char*>(data) + 2 * at));
  }
  static void store(void* data, int64_t at, __m512 values, __mmask16 inside) {
    const __m256i narrow = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<char*>(data) + 2 * at, inside, narrow);
  }
};

template <>
struct Storage<DType::f32> {
  static void prefetch(const void* data, int64_t at, int64_t n) { prefetch_bytes(static_cast<const char*>(data) + 4 * at, 4 * n); }
  static __m512 load(const void* data, int64_t at, __mmask16 inside) {
    return _mm512_maskz_loadu_ps(inside, static_cast<const char*>(data) + 4 * at);
  }
  static void store(void* data, int64_t at, __m512 values, __mmask16 inside) {
    _mm512_mask_storeu_ps(static_cast<char*>(data) + 4 * at, inside, values);
  }
};

}  // namespace
}  // namespace taskloom

#endif
