// A row of logits in a warp: lane l has experts l, 32 + l, 64 + l and so on, in registers where `per_lane` of each are enough, else read
// from memory each time. For the CUDA kernels of the gating family. Everything here has internal linkage.
#pragma once

#include "common/cuda_entries.h"
#include "common/cuda_launch.h"
#include "gating/exact_exp.h"

namespace taskloom {
namespace {

template <class Acc>
using KeyOf = std::conditional_t<sizeof(Acc) == 8, uint64_t, uint32_t>;

inline __device__ uint32_t warp_largest(uint32_t key) { return __reduce_max_sync(whole_warp, key); }

inline __device__ uint64_t warp_largest(uint64_t key) {
  for (int apart = warp_size / 2; apart > 0; apart /= 2) {
    const uint64_t other = __shfl_xor_sync(whole_warp, key, apart);
    key = other > key ? other : key;
  }
  return key;
}

// The sum of 32 lanes, in all of them: halves onto each other, as the CPU adds.
template <class Acc>
__device__ inline Acc warp_sum(Acc value) {
#pragma unroll
  for (int apart = warp_size / 2; apart > 0; apart /= 2) value = value + __shfl_xor_sync(whole_warp, value, apart);
  return value;
}

// Calls body(i, expert) for a lane's experts.
template <int per_lane, class Body>
__device__ inline void each_expert(int experts, int lane, const Body& body) {
  if constexpr (per_lane > 0) {
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (warp_size * i + lane < experts) body(i, warp_size * i + lane);
    }
  } else {
    for (int expert = lane; expert < experts; expert += warp_size) body(0, expert);
  }
}

// The logits of one row.
template <class Acc, int per_lane>
struct WarpRow {
  const DeviceValues& logits;
  int64_t first;
  int experts, lane;
  Acc x[per_lane > 0 ? per_lane : 1];

  __device__ WarpRow(const DeviceValues& from, int64_t begin, int count, int own) : logits(from), first(begin), experts(count), lane(own) {
    if constexpr (per_lane > 0) {
      with_storage(logits.dtype, [&](auto storage) {
        DeviceValues known = logits;
        known.dtype = storage.dtype_of_entries;
#pragma unroll
        for (int i = 0; i < per_lane; ++i) {
          const int expert = warp_size * i + lane;
          x[i] = expert < experts ? load_entry<Acc>(known, first + expert) : Acc{0};
        }
      });
    }
  }

  __device__ Acc logit(int i, int expert) const {
    if constexpr (per_lane > 0) {
      return x[i];
    } else {
      return load_entry<Acc>(logits, first + expert);
    }
  }

  // The largest logit; NaN or any where there is a NaN.
  __device__ Acc largest() const {
    KeyOf<Acc> most = 0;
    each_expert<per_lane>(experts, lane, [&](int i, int expert) {
      const KeyOf<Acc> key = ordered_key(logit(i, expert));
      most = key > most ? key : most;
    });
    return key_value(warp_largest(most));
  }

  __device__ Acc sum_exponentials(Acc factor, Acc center) const {
    Acc sum = 0;
    each_expert<per_lane>(experts, lane, [&](int i, int expert) { sum = sum + exact_exp(logit(i, expert) * factor - center); });
    return warp_sum(sum);
  }
};

// Calls launcher(integral_constant<int, per_lane>) with as many registers a lane as `experts` need; 0 where that is too many.
template <class Launcher>
void with_registers(int64_t experts, bool in_registers, const Launcher& launcher) {
  const int64_t needed = in_registers ? (experts + warp_size - 1) / warp_size : 33;
  if (needed <= 1) return launcher(std::integral_constant<int, 1>{});
  if (needed <= 2) return launcher(std::integral_constant<int, 2>{});
  if (needed <= 4) return launcher(std::integral_constant<int, 4>{});
  if (needed <= 6) return launcher(std::integral_constant<int, 6>{});
  if (needed <= 8) return launcher(std::integral_constant<int, 8>{});
  if (needed <= 12) return launcher(std::integral_constant<int, 12>{});
  if (needed <= 16) return launcher(std::integral_constant<int, 16>{});
  if (needed <= 32) return launcher(std::integral_constant<int, 32>{});
  launcher(std::integral_constant<int, 0>{});
}

}  // namespace
}  // namespace taskloom
