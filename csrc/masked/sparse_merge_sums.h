// Sums of a block's threads in a fixed order, and counts of a grid's.
#pragma once

#include "common/cuda_launch.h"

namespace taskloom {

// The sum over a block of cuda_threads threads, in its first thread; every thread takes part.
template <class T>
__device__ inline T block_sum(T value) {
  constexpr int warps = cuda_threads / warp_size;
  TASKLOOM_SHARED(T, of_warps, warps);
#pragma unroll
  for (int lanes = warp_size / 2; lanes > 0; lanes /= 2) value += __shfl_down_sync(whole_warp, value, lanes);
  // A sum that came before may still be read.
  __syncthreads();
  if (threadIdx.x % warp_size == 0) of_warps[threadIdx.x / warp_size] = value;
  __syncthreads();
  T total = of_warps[0];
  for (int warp = 1; warp < warps; ++warp) total += of_warps[warp];
  return total;
}

// The sum over the threads before this one, and over all; every thread of a block of cuda_threads takes part.
template <class T>
__device__ inline T block_sum_before(T value, T* total) {
  constexpr int warps = cuda_threads / warp_size;
  TASKLOOM_SHARED(T, of_warps, warps);
  const unsigned lane = threadIdx.x % warp_size;
  T sum = value;
#pragma unroll
  for (int lanes = 1; lanes < warp_size; lanes *= 2) {
    const T other = __shfl_up_sync(whole_warp, sum, lanes);
    if (lane >= static_cast<unsigned>(lanes)) sum += other;
  }
  __syncthreads();
  if (lane == warp_size - 1) of_warps[threadIdx.x / warp_size] = sum;
  __syncthreads();
  T before = sum - value, all = 0;
  for (unsigned warp = 0; warp < warps; ++warp) {
    if (warp < threadIdx.x / warp_size) before += of_warps[warp];
    all += of_warps[warp];
  }
  *total = all;
  return before;
}

// Adds a block's counts to a number in global memory.
__device__ inline void add_block_count(int64_t value, int64_t* to) {
  const int64_t sum = block_sum(value);
  // Two's complement: what is added may be negative.
  if (threadIdx.x == 0 && sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(sum));
}

}  // namespace taskloom
