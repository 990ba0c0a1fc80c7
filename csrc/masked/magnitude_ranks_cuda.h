// Exact ranks of magnitudes on a GPU: the cuts of ranks of any number of deltas, found without waiting for the device, and the test
// whether an entry lies inside a cut. Magnitudes are compared as the bits of |tuned - base| in float32 (float64 where wide).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "common/cuda_entries.h"
#include "masked/magnitude_threshold.h"

namespace taskloom {

// Contiguous device tensors of one delta; base.data null: the values of `tuned` themselves.
struct DeviceDelta {
  DeviceValues tuned, base;
};

// Of magnitudes: int32 bits of a float, int64 bits of a double.
template <bool wide>
using MagnitudeBits = std::conditional_t<wide, int64_t, int32_t>;
template <bool wide>
using MagnitudeValue = std::conditional_t<wide, double, float>;

// Entries beyond the end of a tensor have these bits, which lie below every magnitude.
constexpr int no_magnitude = -1;

// The bits of |value|. A NaN that CUDA's arithmetic made has bits of its own, where the CPU's has the bits of a quiet NaN; `most` makes
// them the same (see most_magnitude).
__device__ inline int32_t magnitude_bits(float value, int32_t most) {
  return min(static_cast<int32_t>(__float_as_uint(value) & 0x7fffffffu), most);
}
__device__ inline int64_t magnitude_bits(double value, int64_t most) {
  const int64_t bits = static_cast<int64_t>(__double_as_longlong(value)) & INT64_MAX;
  return bits < most ? bits : most;
}

// The largest magnitude of a delta: a quiet NaN where values are computed or converted, whatever the bits of NaN are elsewhere.
template <bool wide>
__host__ __device__ inline MagnitudeBits<wide> most_magnitude(const DeviceDelta& delta) {
  constexpr DType own = wide ? DType::f64 : DType::f32;
  const bool as_stored = delta.base.data == nullptr && (delta.tuned.dtype == own || (!wide && delta.tuned.dtype == DType::bf16));
  if constexpr (wide) return as_stored ? INT64_MAX : 0x7ff8000000000000;
  return static_cast<MagnitudeBits<wide>>(as_stored ? INT32_MAX : 0x7fc00000);
}

// Magnitudes of the entries begin .. begin + 8 (a multiple of 8), no_magnitude at `numel` and beyond.
template <bool wide>
__device__ inline void load_magnitudes(const DeviceDelta& delta, int64_t begin, int64_t numel,
                                       MagnitudeBits<wide> (&bits)[vector_entries]) {
  MagnitudeValue<wide> values[vector_entries];
  load_eight(delta.tuned, begin, numel, values);
  if (delta.base.data != nullptr) {
    MagnitudeValue<wide> origin[vector_entries];
    load_eight(delta.base, begin, numel, origin);
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) values[i] -= origin[i];
  }
  const MagnitudeBits<wide> most = most_magnitude<wide>(delta);
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) bits[i] = begin + i < numel ? magnitude_bits(values[i], most) : no_magnitude;
}

// Loads several groups of 8 entries: load(group, bits) is compiled once, as kernels that hold many entries have no room for its copies, and
// what it loads is moved to where registers can be addressed.
template <int groups, class Bits, class Load>
__device__ inline void load_groups(Bits (&bits)[groups][vector_entries], const Load& load) {
  if constexpr (groups == 1) {
    load(0, bits[0]);
  } else {
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      Bits loaded[vector_entries];
      load(group, loaded);
#pragma unroll
      for (int slot = 0; slot < groups * vector_entries; ++slot) {
        if (slot / vector_entries == group) bits[slot / vector_entries][slot % vector_entries] = loaded[slot % vector_entries];
      }
    }
  }
}

// As Cut, in device memory: inside are the entries whose bits exceed `bits`, and of those that equal it the ones with index < tie_end.
struct DeviceCut {
  int64_t bits, tie_end;
};

template <class Bits>
__device__ inline bool inside_cut(Bits bits, int64_t index, const DeviceCut& cut) {
  return static_cast<int64_t>(bits) > cut.bits || (static_cast<int64_t>(bits) == cut.bits && index < cut.tie_end);
}

// A bit for each of eight entries, of which the first has index `index`, that lie inside a cut.
template <class Bits>
__device__ inline uint32_t entries_inside(const Bits (&bits)[vector_entries], int64_t index, const DeviceCut& cut) {
  const auto threshold = static_cast<Bits>(cut.bits);
  const int64_t ties = cut.tie_end - index;
  const uint32_t kept_ties = ties <= 0 ? 0u : ties >= vector_entries ? 0xffu : (1u << ties) - 1u;
  uint32_t above = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    if (bits[i] > threshold) above |= 1u << i;
    if (bits[i] == threshold) equal |= 1u << i;
  }
  return above | (equal & kept_ties);
}

// Cuts of `deltas` of one tensor: int64 of shape [deltas, cuts, 2] on the device of `where`, rows of DeviceCut, for
// ranks[delta * cuts + i] of which any may be 0 (nothing inside) or numel (all inside).
Tensor find_cuts(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t numel, const std::vector<int64_t>& ranks, int cuts,
                 bool wide);

// The cuts of thresholds found elsewhere: contiguous device tensors `threshold` (float32, or float64 where wide) and `equal_kept` (int64)
// of deltas * cuts entries. Same result.
Tensor cuts_of_thresholds(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t numel, const Tensor& threshold,
                          const Tensor& equal_kept, int cuts, bool wide);

// Cuts within each row: [deltas, rows, cuts, 2] for ranks[delta * cuts + i], tie ends counted from the row's start.
Tensor find_row_cuts(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t rows, int64_t row_length,
                     const std::vector<int64_t>& ranks, int cuts, bool wide);

}  // namespace taskloom
