// The stages of sparse_merge for eight entries of one task, in registers. Arithmetic is Acc, each product rounded before its add.
#pragma once

#include "common/philox.h"
#include "masked/sparse_merge_cuda.h"

namespace taskloom {

template <class Acc>
constexpr bool is_wide_acc = sizeof(Acc) == 8;
template <class Acc>
using Bits = MagnitudeBits<is_wide_acc<Acc>>;

// The largest magnitude bits of a task's deltas.
template <class Acc>
__device__ inline Bits<Acc> most_bits(const DeviceMerge& merge, const DeviceTask& task) {
  return most_magnitude<is_wide_acc<Acc>>({task.tuned, merge.base});
}

// Bits of the entries of a vector that lie before `end`.
__device__ inline uint32_t entries_before(int64_t begin, int64_t end) {
  return end - begin >= vector_entries ? 0xffu : end <= begin ? 0u : (1u << (end - begin)) - 1u;
}

template <class Acc>
__device__ inline void load_delta(const DeviceMerge& merge, const DeviceTask& task, int64_t begin, const Acc (&base)[vector_entries],
                                  Acc (&delta)[vector_entries]) {
  load_eight(task.tuned, begin, merge.numel, delta);
  // Subtracting zero would change the bits of a signaling NaN, which rank it.
  if (merge.base.data == nullptr) return;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) delta[i] -= base[i];
}

template <class Acc>
__device__ inline void load_base(const DeviceMerge& merge, int64_t begin, Acc (&base)[vector_entries]) {
  if (merge.base.data != nullptr) {
    load_eight(merge.base, begin, merge.numel, base);
    return;
  }
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) base[i] = Acc(0);
}

// Entries whose rank is below a cut's.
template <class Acc>
__device__ inline uint32_t above_cut(const DeviceCut& cut, int64_t begin, Bits<Acc> most, const Acc (&delta)[vector_entries]) {
  const auto bound = static_cast<Bits<Acc>>(cut.bits);
  const uint32_t ties = entries_before(begin, cut.tie_end);
  uint32_t above = 0;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    const Bits<Acc> bits = magnitude_bits(delta[i], most);
    above |= (bits > bound || (bits == bound && (ties >> i & 1u)) ? 1u : 0u) << i;
  }
  return above;
}

// Entries whose random word is below `limit`.
__device__ inline uint32_t below_limit(uint64_t seed, uint64_t key, int64_t begin, int64_t limit) {
  if (limit >= int64_t{1} << 32) return 0xffu;
  const auto bound = static_cast<uint32_t>(limit);
  uint32_t below = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const PhiloxBlock random = philox_4x32_10(seed, key, (static_cast<uint64_t>(begin) >> 2) + half);
#pragma unroll
    for (int word = 0; word < 4; ++word) below |= (random.word[word] < bound ? 1u : 0u) << (4 * half + word);
  }
  return below;
}

// A word below this keeps an entry of probability p; 2^32 keeps it always.
__device__ inline int64_t word_limit(double probability) { return static_cast<int64_t>(rint(probability * 4294967296.0)); }

// Which of entries begin .. begin + 8 survive, where they are not selected by multipliers.
template <class Acc>
__device__ inline uint32_t kept_entries(const DeviceMerge& merge, int t, int64_t begin, const Acc (&delta)[vector_entries]) {
  const DeviceTask& task = merge.tasks[t];
  switch (merge.select) {
    case DeviceSelect::cuts:
      return above_cut(merge.cuts[2 * t + 1], begin, most_bits<Acc>(merge, task), delta) &
             ~above_cut(merge.cuts[2 * t], begin, most_bits<Acc>(merge, task), delta);
    case DeviceSelect::bits:
      return task.mask[(begin - merge.first) / vector_entries];
    case DeviceSelect::dropout:
      return below_limit(merge.seed, task.key, begin, task.limit);
    default:
      return 0xffu;
  }
}

// Leaves part = weight * (factor * selected delta), and returns which entries are selected.
template <class Acc>
__device__ inline uint32_t contribution(const DeviceMerge& merge, int t, int64_t begin, const Acc (&delta)[vector_entries],
                                        Acc (&part)[vector_entries]) {
  const DeviceTask& task = merge.tasks[t];
  const auto weight = static_cast<Acc>(task.weight), factor = static_cast<Acc>(task.factor);
  if (merge.select == DeviceSelect::multipliers) {
    Acc multipliers[vector_entries];
    load_eight(multipliers_of<Acc>(merge, t), begin - merge.first, merge.end - merge.first, multipliers);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      const bool keep = multipliers[i] != Acc(0);
      kept |= (keep ? 1u : 0u) << i;
      part[i] = weight * (multipliers[i] * (keep ? delta[i] : Acc(0)));
    }
    return kept;
  }
  const uint32_t kept = kept_entries(merge, t, begin, delta);
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) part[i] = weight * (factor * (kept >> i & 1u ? delta[i] : Acc(0)));
  return kept;
}

// Adds what one task brings to the election.
template <class Acc>
__device__ inline void add_to_election(Elect elect, const Acc (&part)[vector_entries], Acc (&sum)[vector_entries]) {
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    sum[i] += elect == Elect::sign_sum ? part[i] : (part[i] > Acc(0) ? Acc(1) : Acc(0)) - (part[i] < Acc(0) ? Acc(1) : Acc(0));
  }
}

// The sums whose signs are elected.
template <class Acc>
__device__ inline void election(const DeviceMerge& merge, int64_t begin, const Acc (&base)[vector_entries], Acc (&sum)[vector_entries]) {
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) sum[i] = Acc(0);
  for (int t = 0; t < merge.count; ++t) {
    Acc delta[vector_entries];
    load_delta(merge, merge.tasks[t], begin, base, delta);
    contribution(merge, t, begin, delta, delta);
    add_to_election(merge.elect, delta, sum);
  }
}

// The sign that a sum of zero elects.
__device__ inline bool zero_is_positive(const DeviceMerge& merge) {
  return merge.sign_sum == nullptr ? merge.zero_sign > 0 : *merge.sign_sum >= 0;
}

// Entries that elect a positive sign; a sum that is NaN has no sign either.
template <class Acc>
__device__ inline uint32_t elected_positive(const Acc (&sum)[vector_entries], bool zero_positive) {
  uint32_t positive = 0;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    const bool up = sum[i] > Acc(0) || (zero_positive && !(sum[i] < Acc(0)));
    positive |= (up ? 1u : 0u) << i;
  }
  return positive;
}

}  // namespace taskloom
