// Selection inside a block: the k-th largest of magnitudes that its threads hold in registers, digit by digit from the highest.
#pragma once

#include "common/cuda_launch.h"
#include "masked/magnitude_ranks_cuda.h"

namespace taskloom {

constexpr int digit_bits = 11;
constexpr int digit_bins = 1 << digit_bits;

// What a block shares between its threads.
struct BlockWords {
  int64_t warps[32];
  int64_t digit, above, count;
};

// Sum of the values of the threads up to this one, of a block of `threads`.
template <int threads>
__device__ inline int64_t block_scan(int64_t value, BlockWords* words) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const int64_t other = __shfl_up_sync(whole_warp, value, step);
    if (lane >= step) value += other;
  }
  __syncthreads();
  if (lane == warp_size - 1) words->warps[warp] = value;
  __syncthreads();
  for (int i = 0; i < threads / warp_size; ++i) {
    if (i < warp) value += words->warps[i];
  }
  return value;
}

struct FoundDigit {
  int64_t digit, above, count;
};

// The digit at which the entries from the highest digit down reach `left` (at least 1), how many lie above it and how many in it. All
// threads of the block call it after a barrier, and pass one before the histogram changes.
template <int threads, class Count>
__device__ inline FoundDigit find_digit(const Count* histogram, int64_t left, BlockWords* words) {
  constexpr int per_thread = digit_bins / threads;
  const int top = digit_bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < per_thread; ++i) sum += static_cast<int64_t>(histogram[top - i]);
  int64_t above = block_scan<threads>(sum, words) - sum;
  if (above < left && left <= above + sum) {
    int digit = top;
    while (above + static_cast<int64_t>(histogram[digit]) < left) above += static_cast<int64_t>(histogram[digit--]);
    words->digit = digit;
    words->above = above;
    words->count = static_cast<int64_t>(histogram[digit]);
  }
  __syncthreads();
  return {words->digit, words->above, words->count};
}

// A rank's magnitude, how many entries equal it, and how many of those are of that rank or above.
struct Selected {
  int64_t bits, kept, equal;
};

// The rank-th largest (1 <= rank <= how many there are) of the magnitudes in the registers of a block's threads.
template <bool wide, int groups, int threads>
__device__ inline Selected block_select(const MagnitudeBits<wide> (&bits)[groups][vector_entries], int64_t rank, uint32_t* histogram,
                                        BlockWords* words) {
  MagnitudeBits<wide> prefix = 0;
  int64_t left = rank, equal = 0;
  for (int width = wide ? 63 : 31; width > 0;) {
    const int size = min(digit_bits, width), shift = width - size;
    for (int bin = threadIdx.x; bin < digit_bins; bin += threads) histogram[bin] = 0;
    __syncthreads();
#pragma unroll
    for (int group = 0; group < groups; ++group) {
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) {
        const MagnitudeBits<wide> value = bits[group][i];
        // The shift keeps the sign: an entry that is none shares no prefix.
        if (value >> width == prefix) atomicAdd(&histogram[static_cast<int>(value >> shift) & ((1 << size) - 1)], 1u);
      }
    }
    __syncthreads();
    const FoundDigit found = find_digit<threads>(histogram, left, words);
    // Everyone has read what was found before the next digit's histogram and words are written: block_scan waits first.
    prefix = (prefix << size) | static_cast<MagnitudeBits<wide>>(found.digit);
    left -= found.above;
    equal = found.count;
    width = shift;
    __syncthreads();
  }
  return {static_cast<int64_t>(prefix), left, equal};
}

}  // namespace taskloom
