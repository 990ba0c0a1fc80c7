// The coefficients of a run of entries in registers, for block_scale_merge_loops.cpp alone. Torch-free.
#pragma once

#include "masked/block_scale_merge.h"
#include "masked/storage_vectors.h"

namespace taskloom {
namespace {

constexpr int run_vectors = 8;

template <class Acc>
constexpr int64_t run_entries = run_vectors * vector_size<Acc>;

// A block without groups: a task has one coefficient.
template <class Acc>
struct OneFactor {
  explicit OneFactor(const ScaleBlock&) {}
  inline __attribute__((always_inline)) void enter_run(int64_t) {}
  inline __attribute__((always_inline)) void enter_task(const Acc* coef) { factor = every(coef[0]); }
  inline __attribute__((always_inline)) Vector<Acc> of(int) const { return factor; }

  Vector<Acc> factor;
};

// Groups whose coefficients fit in registers: each entry's is picked there. The partition must have no value from `groups` on.
#if defined(__AVX512F__)
constexpr int64_t register_groups = 32;

struct GroupFactors {
  explicit GroupFactors(const ScaleBlock& block) : partition(block.partition) {
    const uint32_t inside = block.groups >= 32 ? ~0u : (1u << block.groups) - 1;
    low_inside = static_cast<__mmask16>(inside);
    high_inside = static_cast<__mmask16>(inside >> 16);
  }
  inline __attribute__((always_inline)) void enter_run(int64_t at) {
    for (int v = 0; v < run_vectors; ++v) {
      group[v] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(partition + at + 16 * v)));
    }
  }
  inline __attribute__((always_inline)) void enter_task(const float* coef) {
    low = _mm512_maskz_loadu_ps(low_inside, coef);
    high = _mm512_maskz_loadu_ps(high_inside, coef + 16);
  }
  inline __attribute__((always_inline)) Vector<float> of(int v) const { return _mm512_permutex2var_ps(low, group[v], high); }

  const uint8_t* partition;
  __mmask16 low_inside, high_inside;
  __m512i group[run_vectors];
  __m512 low, high;
};
#elif defined(__AVX2__)
constexpr int64_t register_groups = 16;

struct GroupFactors {
  explicit GroupFactors(const ScaleBlock& block) : partition(block.partition) {
    const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), groups = _mm256_set1_epi32(static_cast<int32_t>(block.groups));
    low_inside = _mm256_cmpgt_epi32(groups, place);
    high_inside = _mm256_cmpgt_epi32(groups, _mm256_add_epi32(place, _mm256_set1_epi32(8)));
  }
  inline __attribute__((always_inline)) void enter_run(int64_t at) {
    for (int v = 0; v < run_vectors; ++v) {
      group[v] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(partition + at + 8 * v)));
    }
  }
  inline __attribute__((always_inline)) void enter_task(const float* coef) {
    low = _mm256_maskload_ps(coef, low_inside);
    high = _mm256_maskload_ps(coef + 8, high_inside);
  }
  inline __attribute__((always_inline)) Vector<float> of(int v) const {
    // Bit 3 of the group, as the sign, says which half of the table it is in.
    const __m256 in_high = _mm256_castsi256_ps(_mm256_slli_epi32(group[v], 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, group[v]), _mm256_permutevar8x32_ps(high, group[v]), in_high);
  }

  const uint8_t* partition;
  __m256i low_inside, high_inside;
  __m256i group[run_vectors];
  __m256 low, high;
};
#else
constexpr int64_t register_groups = 0;
#endif

}  // namespace
}  // namespace taskloom
