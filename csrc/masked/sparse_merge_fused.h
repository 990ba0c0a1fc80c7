// The common merges of sparse_merge in registers, sixteen entries of all tasks at a time: up to four tasks, one 16- or 32-bit storage type,
// no vote, selection by whole-block cuts or packed bits. Same arithmetic in the same order as the general blocks of
// sparse_merge_loops.cpp, which take over wherever fused_block refuses. For that file alone.
#pragma once

#ifdef __AVX512BW__

#include <immintrin.h>

#include "common/lanes_avx512.h"
#include "common/philox_words.h"
#include "masked/sparse_merge.h"

namespace taskloom {
namespace {

constexpr int most_fused_tasks = 4;

// How one task selects within one block.
struct FusedSelect {
  enum class Kind { all, cut, bits } kind;
  __m512i outer, inner;  // kept are outer < magnitude bits <= inner
  const uint8_t* packed;
};

// Whether a cut means one comparison for the whole block at .. at + n, and which.
inline bool whole_block_cut(const Cut& cut, int64_t at, int64_t n, __m512i* above) {
  if (cut.tie_end > at && cut.tie_end < at + n) return false;
  *above = _mm512_set1_epi32(static_cast<int32_t>(cut.tie_end > at ? cut.bits - 1 : cut.bits));
  return true;
}

inline bool fused_select(const MergeView& merge, const MergeTask& task, int64_t at, int64_t n, FusedSelect* out) {
  if (task.recorded != nullptr || merge.select == Select::mask) {
    out->kind = FusedSelect::Kind::bits;
    out->packed = (task.recorded != nullptr ? task.recorded : task.mask) + at / 8;
    return true;
  }
  if (merge.select == Select::all) {
    out->kind = FusedSelect::Kind::all;
    return true;
  }
  out->kind = FusedSelect::Kind::cut;
  return merge.select == Select::magnitude && whole_block_cut(task.outer, at, n, &out->outer) &&
         whole_block_cut(task.inner, at, n, &out->inner);
}

inline __mmask16 fused_keep(const FusedSelect& select, __m512i bits, int64_t i, __mmask16 inside) {
  switch (select.kind) {
    case FusedSelect::Kind::all:
      return inside;
    case FusedSelect::Kind::cut:
      return _mm512_mask_cmple_epi32_mask(_mm512_mask_cmpgt_epi32_mask(inside, bits, select.outer), bits, select.inner);
    default: {
      uint16_t word = select.packed[i / 8];
      if (inside > 0xff) word = static_cast<uint16_t>(word | (select.packed[i / 8 + 1] << 8));
      return static_cast<__mmask16>(word & inside);
    }
  }
}

template <DType dtype, int tasks, bool elected>
void fused_entries(const MergeView& merge, const FusedSelect* select, int64_t at, int64_t n, void* out, int64_t out_at, double* lane_dots,
                   ChunkStatistics* statistics) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512i absolute = _mm512_set1_epi32(INT32_MAX);
  const __m512i infinity = _mm512_set1_epi32(0x7f800000);
  const __m512 scale = _mm512_set1_ps(static_cast<float>(merge.scale));
  __m512 weight[tasks], factor[tasks];
  float all_weights = 0;
  for (int t = 0; t < tasks; ++t) {
    weight[t] = _mm512_set1_ps(static_cast<float>(merge.tasks[t].weight));
    factor[t] = _mm512_set1_ps(static_cast<float>(merge.tasks[t].factor));
    all_weights += static_cast<float>(merge.tasks[t].weight);
  }
  const bool no_weight = (all_weights < 0 ? -all_weights : all_weights) < 1e-8f;
  const __m512 mean_divisor = _mm512_set1_ps(no_weight ? 1.0f : all_weights);
  __m512 sums[tasks * (tasks + 1) / 2];
  for (__m512& sum : sums) sum = zero;
  int64_t kept[tasks] = {};
  int64_t conflicts = 0;
  __mmask16 nonfinite = 0;
  for (int64_t i = 0; i < n; i += lane_count) {
    const __mmask16 inside = lanes_inside(n - i);
    const __m512 base = merge.base == nullptr ? zero : Storage<dtype>::load(merge.base, at + i, inside);
    __m512 delta[tasks], part[tasks];
    __mmask16 positive[tasks], negative[tasks];
    __mmask16 any_positive = 0, any_negative = 0;
    for (int t = 0; t < tasks; ++t) {
      delta[t] = Storage<dtype>::load(merge.tasks[t].tuned, at + i, inside);
      // Subtracting zero would change the bits of a signaling NaN, which rank it.
      if (merge.base != nullptr) delta[t] = _mm512_sub_ps(delta[t], base);
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(delta[t]), absolute);
      nonfinite |= _mm512_cmpge_epi32_mask(bits, infinity);
      const __mmask16 keep = fused_keep(select[t], bits, i, inside);
      kept[t] += __builtin_popcount(keep);
      part[t] = _mm512_mul_ps(weight[t], _mm512_mul_ps(factor[t], _mm512_maskz_mov_ps(keep, delta[t])));
      positive[t] = _mm512_cmp_ps_mask(part[t], zero, _CMP_GT_OQ);
      negative[t] = _mm512_cmp_ps_mask(part[t], zero, _CMP_LT_OQ);
      any_positive |= positive[t];
      any_negative |= negative[t];
    }
    conflicts += __builtin_popcount(any_positive & any_negative);
    if (merge.statistics) {
      int pair = 0;
      for (int t = 0; t < tasks; ++t) {
        for (int other = t; other < tasks; ++other, ++pair) sums[pair] = _mm512_add_ps(sums[pair], _mm512_mul_ps(delta[t], delta[other]));
      }
    }
    __m512 combined = zero, weight_sum = zero;
    if constexpr (elected) {
      __m512 sum = zero;
      for (int t = 0; t < tasks; ++t) sum = _mm512_add_ps(sum, part[t]);
      __mmask16 up = _mm512_cmp_ps_mask(sum, zero, _CMP_GT_OQ);
      if (merge.zero_sign > 0) up = static_cast<__mmask16>(~_mm512_cmp_ps_mask(sum, zero, _CMP_LT_OQ));
      for (int t = 0; t < tasks; ++t) {
        const __mmask16 agrees = static_cast<__mmask16>((up & positive[t]) | (~up & negative[t]));
        combined = _mm512_mask_add_ps(combined, agrees, combined, part[t]);
        weight_sum = _mm512_mask_add_ps(weight_sum, agrees, weight_sum, weight[t]);
      }
    } else {
      for (int t = 0; t < tasks; ++t) {
        combined = _mm512_add_ps(combined, part[t]);
        weight_sum = _mm512_mask_add_ps(weight_sum, _mm512_cmp_ps_mask(part[t], zero, _CMP_NEQ_UQ), weight_sum, weight[t]);
      }
    }
    if (merge.combine == Combine::disjoint_mean) {
      const __mmask16 none = _mm512_cmp_ps_mask(weight_sum, zero, _CMP_EQ_OQ);
      combined = _mm512_div_ps(combined, _mm512_mask_mov_ps(weight_sum, none, _mm512_set1_ps(1.0f)));
    } else if (merge.combine == Combine::weighted_mean) {
      combined = _mm512_div_ps(combined, mean_divisor);
    }
    __m512 value = _mm512_mul_ps(scale, combined);
    if (merge.base != nullptr) value = _mm512_add_ps(base, value);
    Storage<dtype>::store(out, out_at + i, value, inside);
  }
  for (int t = 0; t < tasks; ++t) statistics->kept[t] += kept[t];
  statistics->nonfinite |= nonfinite != 0 ? 1 : 0;
  if (!merge.statistics) return;
  statistics->conflicts += conflicts;
  for (int pair = 0; pair < tasks * (tasks + 1) / 2; ++pair) {
    double* lane = lane_dots + pair * lane_count;
    _mm512_storeu_pd(lane, _mm512_add_pd(_mm512_loadu_pd(lane), _mm512_cvtps_pd(_mm512_castps512_ps256(sums[pair]))));
    _mm512_storeu_pd(lane + 8, _mm512_add_pd(_mm512_loadu_pd(lane + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(sums[pair], 1))));
  }
}

template <DType dtype, bool elected>
inline void fused_by_count(const MergeView& merge, const FusedSelect* select, int64_t at, int64_t n, void* out, int64_t out_at,
                           double* lane_dots, ChunkStatistics* statistics) {
  switch (merge.count) {
    case 1:
      return fused_entries<dtype, 1, elected>(merge, select, at, n, out, out_at, lane_dots, statistics);
    case 2:
      return fused_entries<dtype, 2, elected>(merge, select, at, n, out, out_at, lane_dots, statistics);
    case 3:
      return fused_entries<dtype, 3, elected>(merge, select, at, n, out, out_at, lane_dots, statistics);
    default:
      return fused_entries<dtype, 4, elected>(merge, select, at, n, out, out_at, lane_dots, statistics);
  }
}

template <DType dtype>
inline void fused_by_election(const MergeView& merge, const FusedSelect* select, int64_t at, int64_t n, void* out, int64_t out_at,
                              double* lane_dots, ChunkStatistics* statistics) {
  if (merge.elect == Elect::none) {
    fused_by_count<dtype, false>(merge, select, at, n, out, out_at, lane_dots, statistics);
  } else {
    fused_by_count<dtype, true>(merge, select, at, n, out, out_at, lane_dots, statistics);
  }
}

// What does not change from block to block.
inline bool fused_serves(const MergeView& merge) {
  if (merge.count > most_fused_tasks || merge.vote != Vote::none || merge.elect == Elect::sign_count) return false;
  if (merge.out_dtype == DType::f64) return false;
  if (merge.base != nullptr && merge.base_dtype != merge.out_dtype) return false;
  for (int t = 0; t < merge.count; ++t) {
    if (merge.tasks[t].dtype != merge.out_dtype) return false;
  }
  return merge.count > 0;
}

// Merges entries at .. at + n into `out` from its entry `out_at` on; false, with nothing done, where the general blocks must.
inline bool fused_block(const MergeView& merge, int64_t at, int64_t n, void* out, int64_t out_at, double* lane_dots,
                        ChunkStatistics* statistics) {
  FusedSelect select[most_fused_tasks];
  for (int t = 0; t < merge.count; ++t) {
    if (!fused_select(merge, merge.tasks[t], at, n, &select[t])) return false;
  }
  switch (merge.out_dtype) {
    case DType::bf16:
      fused_by_election<DType::bf16>(merge, select, at, n, out, out_at, lane_dots, statistics);
      return true;
    case DType::f16:
      fused_by_election<DType::f16>(merge, select, at, n, out, out_at, lane_dots, statistics);
      return true;
    case DType::f32:
      fused_by_election<DType::f32>(merge, select, at, n, out, out_at, lane_dots, statistics);
      return true;
    default:
      return false;
  }
}

// The order of absolute_sum: lanes first, then one after the other.
inline double sum_of_lanes(__m512 lanes) {
  alignas(64) float values[lane_count];
  _mm512_store_ps(values, lanes);
  double total = 0;
  for (const float value : values) total += static_cast<double>(value);
  return total;
}

// One task's L1 norms before and after dropout over entries at .. at + n, and the bits of what it kept.
template <DType dtype>
inline void dropout_norms(const MergeView& merge, const MergeTask& task, int64_t limit, int64_t at, int64_t n, uint32_t* words,
                          double* before, double* after) {
  const bool keeps_all = limit >= int64_t{1} << 32;
  // The random words take about as long to make as the entries to arrive.
  Storage<dtype>::prefetch(task.tuned, at, n);
  if (!keeps_all) philox_words(merge.seed, task.key, at, n, words);
  const __m512i bound = _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(limit)));
  __m512 sum_before = _mm512_setzero_ps(), sum_after = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += lane_count) {
    const __mmask16 inside = lanes_inside(n - i);
    const __m512 tuned = Storage<dtype>::load(task.tuned, at + i, inside);
    const __m512 base = merge.base == nullptr ? _mm512_setzero_ps() : Storage<dtype>::load(merge.base, at + i, inside);
    const __m512 size = _mm512_abs_ps(_mm512_sub_ps(tuned, base));
    const __mmask16 keep = keeps_all ? inside : _mm512_mask_cmplt_epu32_mask(inside, _mm512_loadu_si512(words + i), bound);
    sum_before = _mm512_add_ps(sum_before, size);
    sum_after = _mm512_mask_add_ps(sum_after, keep, sum_after, size);
    if (task.record == nullptr) continue;
    task.record[(at + i) / 8] = static_cast<uint8_t>(keep);
    if (n - i > 8) task.record[(at + i) / 8 + 1] = static_cast<uint8_t>(keep >> 8);
  }
  *before += sum_of_lanes(sum_before);
  *after += sum_of_lanes(sum_after);
}

// The pass that finds l1 factors, for dropout, where fused_serves.
inline void fused_dropout_norms(const MergeView& merge, int64_t at, int64_t n, uint32_t* words, ChunkStatistics* statistics) {
  for (int t = 0; t < merge.count; ++t) {
    const MergeTask& task = merge.tasks[t];
    double* before = statistics->before + t;
    double* after = statistics->after + t;
    switch (merge.out_dtype) {
      case DType::bf16:
        dropout_norms<DType::bf16>(merge, task, keep_limit(task.density), at, n, words, before, after);
        break;
      case DType::f16:
        dropout_norms<DType::f16>(merge, task, keep_limit(task.density), at, n, words, before, after);
        break;
      default:
        dropout_norms<DType::f32>(merge, task, keep_limit(task.density), at, n, words, before, after);
    }
  }
}

}  // namespace
}  // namespace taskloom

#else

#include "masked/sparse_merge.h"

namespace taskloom {
namespace {

inline bool fused_serves(const MergeView&) { return false; }
inline bool fused_block(const MergeView&, int64_t, int64_t, void*, int64_t, double*, ChunkStatistics*) { return false; }
inline void fused_dropout_norms(const MergeView&, int64_t, int64_t, uint32_t*, ChunkStatistics*) {}

}  // namespace
}  // namespace taskloom

#endif
