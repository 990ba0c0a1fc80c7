// Many Philox words at once, for NAME_loops.cpp files: every CPU level compiles its own copy. Torch-free.
#pragma once

#include <cstdint>

#include "common/philox.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace taskloom {
namespace {

#ifdef __AVX512F__
constexpr int64_t philox_group = 8;  // blocks that philox_group_words makes

// Each counter's word in the low half of a 64-bit lane: a product's high word is then one shift away, and what a lane's high half holds
// after an exclusive or does not matter, because the next product ignores it.
inline void philox_group_words(uint64_t seed, uint64_t tensor_key, uint64_t first, uint32_t* words) {
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first & 0xffffffffu)), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  __m512i c1 = _mm512_set1_epi64(static_cast<int64_t>(first >> 32));
  __m512i c2 = _mm512_set1_epi64(static_cast<int64_t>(tensor_key & 0xffffffffu));
  __m512i c3 = _mm512_set1_epi64(static_cast<int64_t>(tensor_key >> 32));
  const __m512i factor0 = _mm512_set1_epi64(0xD2511F53ll);
  const __m512i factor1 = _mm512_set1_epi64(0xCD9E8D57ll);
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  constexpr int exclusive_or = 0x96;  // of three operands
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(factor0, c0);
    const __m512i p1 = _mm512_mul_epu32(factor1, c2);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), exclusive_or);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), exclusive_or);
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // The words of a block side by side: first and second, third and fourth, then block by block.
  constexpr __mmask16 odd_lanes = 0xaaaa;
  const __m512i low = _mm512_mask_blend_epi32(odd_lanes, c0, _mm512_slli_epi64(c1, 32));
  const __m512i high = _mm512_mask_blend_epi32(odd_lanes, c2, _mm512_slli_epi64(c3, 32));
  _mm512_storeu_si512(words, _mm512_permutex2var_epi64(low, _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), high));
  _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(low, _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4), high));
}
#elif defined(__AVX2__)
constexpr int64_t philox_group = 8;

struct PhiloxProduct {
  __m256i high, low;
};

inline PhiloxProduct philox_product(__m256i factor, __m256i value) {
  const __m256i even = _mm256_mul_epu32(factor, value);
  const __m256i odd = _mm256_mul_epu32(factor, _mm256_srli_epi64(value, 32));
  return {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa), _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
}

inline void philox_group_words(uint64_t seed, uint64_t tensor_key, uint64_t first, uint32_t* words) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(first))), lane);
  __m256i c1 = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(first >> 32)));
  __m256i c2 = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(tensor_key)));
  __m256i c3 = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(tensor_key >> 32)));
  const __m256i factor0 = _mm256_set1_epi64x(0xD2511F53ll);
  const __m256i factor1 = _mm256_set1_epi64x(0xCD9E8D57ll);
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const PhiloxProduct p0 = philox_product(factor0, c0);
    const PhiloxProduct p1 = philox_product(factor1, c2);
    c0 = _mm256_xor_si256(_mm256_xor_si256(p1.high, c1), _mm256_set1_epi32(static_cast<int>(k0)));
    c2 = _mm256_xor_si256(_mm256_xor_si256(p0.high, c3), _mm256_set1_epi32(static_cast<int>(k1)));
    c1 = p1.low;
    c3 = p0.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m256i a = _mm256_unpacklo_epi32(c0, c1);
  const __m256i b = _mm256_unpackhi_epi32(c0, c1);
  const __m256i c = _mm256_unpacklo_epi32(c2, c3);
  const __m256i d = _mm256_unpackhi_epi32(c2, c3);
  const __m256i q0 = _mm256_unpacklo_epi64(a, c);  // blocks 0, 4
  const __m256i q1 = _mm256_unpackhi_epi64(a, c);  // 1, 5
  const __m256i q2 = _mm256_unpacklo_epi64(b, d);
  const __m256i q3 = _mm256_unpackhi_epi64(b, d);
  auto* out = reinterpret_cast<__m256i*>(words);
  _mm256_storeu_si256(out, _mm256_permute2x128_si256(q0, q1, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(q2, q3, 0x20));
  _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(q0, q1, 0x31));
  _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(q2, q3, 0x31));
}
#else
constexpr int64_t philox_group = 1;

inline void philox_group_words(uint64_t seed, uint64_t tensor_key, uint64_t first, uint32_t* words) {
  const PhiloxBlock random = philox_4x32_10(seed, tensor_key, first);
  for (int word = 0; word < 4; ++word) words[word] = random.word[word];
}
#endif

// A word below this keeps an entry of probability p; 2^32 keeps it always.
inline int64_t keep_limit(double probability) { return static_cast<int64_t>(__builtin_nearbyint(probability * 4294967296.0)); }

// Whether the low halves of `count` counters from `first` on stay below 2^32 together: a group shares its high half.
inline bool philox_same_high(uint64_t first, int64_t count) { return (first >> 32) == ((first + static_cast<uint64_t>(count) - 1) >> 32); }

// Words of entries begin .. begin + n into words[0 .. n).
inline void philox_words(uint64_t seed, uint64_t tensor_key, int64_t begin, int64_t n, uint32_t* words) {
  auto block_at = [&](int64_t entry) { return philox_4x32_10(seed, tensor_key, static_cast<uint64_t>(entry) >> 2); };
  int64_t done = 0;
  if ((begin & 3) != 0) {
    const PhiloxBlock random = block_at(begin);
    for (int64_t word = begin & 3; word < 4 && done < n; ++word) words[done++] = random.word[word];
  }
  constexpr int64_t group = 4 * philox_group;
  while (done < n) {
    const uint64_t block = static_cast<uint64_t>(begin + done) >> 2;
    if (n - done >= group && philox_same_high(block, philox_group)) {
      philox_group_words(seed, tensor_key, block, words + done);
      done += group;
      continue;
    }
    const PhiloxBlock random = block_at(begin + done);
    for (int word = 0; word < 4 && done < n; ++word) words[done++] = random.word[word];
  }
}

}  // namespace
}  // namespace taskloom
