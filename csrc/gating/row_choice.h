// The k best entries of a row, best first and equal ones by place. The k-th of a few lanes' maxima is a bound that the k best reach and
// few others do: those are collected in the order of their places and then ranked. For NAME_loops.cpp files. Torch-free, internal linkage.
#pragma once

#include "gating/gate_rows.h"

namespace taskloom {
namespace {

// What is collected, in the order of places; room for a row and a vector beyond it.
template <class Acc>
struct Candidates {
  Acc* value;
  int32_t* place;
};

// The k-th largest of `count` values.
template <class Acc>
inline Acc kth_largest(const Acc* values, int count, int64_t k) {
  Acc found = bits_infinity<Acc>();
  for (int i = 0; i < count; ++i) {
    int above = 0;
    for (int j = 0; j < count; ++j) above += values[j] > values[i] ? 1 : 0;
    if (above < k && values[i] < found) found = values[i];
  }
  return found;
}

// The k best of `count` candidates by insertion into a list that is kept in order.
template <class Acc>
inline void insert_candidates(const Candidates<Acc>& from, int64_t count, int64_t k, int32_t* place) {
  Acc best[most_chosen];
  int64_t held = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Acc value = from.value[i];
    if (held == k && !(value > best[k - 1])) continue;
    int64_t at = held < k ? held++ : k - 1;
    for (; at > 0 && value > best[at - 1]; --at) {
      best[at] = best[at - 1];
      place[at] = place[at - 1];
    }
    best[at] = value;
    place[at] = from.place[i];
  }
}

// The k best places of n entries, a multiple of the step that -inf fills up; at least k are real. False where an entry is NaN.
template <class Acc>
inline bool choose_best(const Acc* x, int64_t n, int64_t k, const Candidates<Acc>& room, int32_t* place) {
  Lanes<Acc> even = every_lane(lowest_value<Acc>()), odd = even, nan = every_lane(Acc{0});
  const Lanes<Acc> one = every_lane(Acc{1});
  for (int64_t at = 0; at < n; at += gate_row_step) {
    const Lanes<Acc> first = load_whole(x + at), second = load_whole(x + at + lanes);
    nan = where_nan(first, one, nan);
    nan = where_nan(second, one, nan);
    even = larger(first, even);
    odd = larger(second, odd);
  }
  if (sum_of_lanes(nan) != 0) return false;
  Acc most[2 * lanes];
  const bool few = k <= lanes;
  store_whole(most, few ? larger(even, odd) : even);
  store_whole(most + lanes, odd);
  const Acc bound = few ? kth_largest(most, lanes, k) : kth_largest(most, 2 * lanes, k);
  int64_t count = 0;
  for (int64_t at = 0; at < n; ++at) {
    room.value[count] = x[at];
    room.place[count] = static_cast<int32_t>(at);
    count += x[at] >= bound ? 1 : 0;
  }
  insert_candidates(room, count, k, place);
  return true;
}

#ifdef __AVX512BW__

inline __m512 by_lane(__m512 values, __m512i from) { return _mm512_permutexvar_ps(from, values); }

// The k-th largest of sixteen lanes, by a bitonic sort that falls from lane 0 on.
inline float kth_largest_lane(__m512 v, int64_t k) {
  const __m512i own = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  constexpr int distance[] = {1, 3, 1, 7, 2, 1, 15, 4, 2, 1};
  // Lanes that keep the larger of a pair: those whose bit of this number is not set.
  constexpr int bit[] = {1, 2, 1, 4, 2, 1, 8, 4, 2, 1};
#pragma GCC unroll 10
  for (int step = 0; step < 10; ++step) {
    const __m512 other = by_lane(v, _mm512_xor_si512(own, _mm512_set1_epi32(distance[step])));
    const __mmask16 lower = _mm512_test_epi32_mask(own, _mm512_set1_epi32(bit[step]));
    v = _mm512_mask_min_ps(_mm512_max_ps(v, other), lower, v, other);
  }
  return _mm512_cvtss_f32(by_lane(v, _mm512_set1_epi32(static_cast<int>(k - 1))));
}

// Ranks of 16 candidates in each of `parts` vectors: how many come before each.
template <int parts>
inline void rank_candidates(const Candidates<float>& from, int64_t count, int32_t* place) {
  const __m512i own = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i one = _mm512_set1_epi32(1);
  __m512 v[parts];
  __m512i rank[parts];
  for (int part = 0; part < parts; ++part) {
    v[part] = _mm512_loadu_ps(from.value + 16 * part);
    rank[part] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < count; ++i) {
    const __m512 each = _mm512_set1_ps(from.value[i]);
    for (int part = 0; part < parts; ++part) {
      // Those after it by place fall behind where they are equal too.
      const __mmask16 after = _mm512_cmp_epi32_mask(own, _mm512_set1_epi32(static_cast<int>(i) - 16 * part), _MM_CMPINT_NLE);
      const __mmask16 behind =
          static_cast<__mmask16>(_mm512_cmp_ps_mask(each, v[part], _CMP_GT_OQ) | _mm512_mask_cmp_ps_mask(after, each, v[part], _CMP_EQ_OQ));
      rank[part] = _mm512_mask_add_epi32(rank[part], behind, rank[part], one);
    }
  }
  alignas(64) int32_t ranks[16 * parts];
  for (int part = 0; part < parts; ++part) _mm512_store_si512(ranks + 16 * part, rank[part]);
  for (int64_t i = 0; i < count; ++i) place[ranks[i]] = from.place[i];
}

// The same in fewer instructions.
template <>
inline bool choose_best<float>(const float* x, int64_t n, int64_t k, const Candidates<float>& room, int32_t* place) {
  __m512 even = _mm512_set1_ps(lowest_value<float>()), odd = even;
  __mmask16 nan = 0;
  for (int64_t at = 0; at < n; at += gate_row_step) {
    const __m512 first = _mm512_loadu_ps(x + at), second = _mm512_loadu_ps(x + at + lanes);
    nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q));
    even = _mm512_max_ps(even, first);
    odd = _mm512_max_ps(odd, second);
  }
  if (nan != 0) return false;
  float bound;
  if (k <= lanes) {
    bound = kth_largest_lane(_mm512_max_ps(even, odd), k);
  } else {
    float most[2 * lanes];
    _mm512_storeu_ps(most, even);
    _mm512_storeu_ps(most + lanes, odd);
    bound = kth_largest(most, 2 * lanes, k);
  }
  const __m512 bounds = _mm512_set1_ps(bound);
  __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += lanes) {
    const __m512 values = _mm512_loadu_ps(x + at);
    const __mmask16 reach = _mm512_cmp_ps_mask(values, bounds, _CMP_GE_OQ);
    // Whole stores: a store of the chosen lanes alone is slow on some processors.
    _mm512_storeu_ps(room.value + count, _mm512_maskz_compress_ps(reach, values));
    _mm512_storeu_si512(room.place + count, _mm512_maskz_compress_epi32(reach, places));
    count += __builtin_popcount(reach);
    places = _mm512_add_epi32(places, _mm512_set1_epi32(lanes));
  }
  if (count <= 16) {
    rank_candidates<1>(room, count, place);
  } else if (count <= 32) {
    rank_candidates<2>(room, count, place);
  } else {
    insert_candidates(room, count, k, place);
  }
  return true;
}

#endif

}  // namespace
}  // namespace taskloom
