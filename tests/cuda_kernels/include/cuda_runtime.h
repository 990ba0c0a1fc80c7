// What our kernels use of CUDA, for a host compiler. Stands in for CUDA's own header of this name when kernels are compiled for the
// emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (cuda_emulator::thread_index())
#define blockIdx (cuda_emulator::block_index())
#define gridDim (cuda_emulator::grid_size())
#define blockDim (cuda_emulator::block_size())
constexpr int warpSize = 32;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

using std::max;
using std::min;

template <class To, class From>
To emulated_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float value) { return emulated_bits<unsigned>(value); }
inline int __float_as_int(float value) { return emulated_bits<int>(value); }
inline float __uint_as_float(unsigned value) { return emulated_bits<float>(value); }
inline float __int_as_float(int value) { return emulated_bits<float>(value); }
inline long long __double_as_longlong(double value) { return emulated_bits<long long>(value); }
inline double __longlong_as_double(long long value) { return emulated_bits<double>(value); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits)); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

inline void __threadfence() {}
inline void __syncthreads() { cuda_emulator::block_barrier(); }
inline int __syncthreads_count(int predicate) { return static_cast<int>(cuda_emulator::block_sum(predicate != 0)); }
inline int __syncthreads_or(int predicate) { return cuda_emulator::block_sum(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return cuda_emulator::block_sum(predicate == 0) == 0; }

// Whole warps alone: collectives of some lanes are not emulated, so a kernel that has one fails here.
constexpr unsigned every_lane = 0xffffffffu;
struct EmulatedLanes {
  explicit EmulatedLanes(unsigned mask) {
    if (mask != every_lane) __builtin_trap();
  }
};
inline unsigned emulated_lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <class T>
uint64_t emulated_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}
template <class T>
T emulated_value(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void __syncwarp(unsigned mask = every_lane) {
  const EmulatedLanes whole(mask);
  cuda_emulator::warp_exchange(0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const EmulatedLanes whole(mask);
  const unsigned own = emulated_lane();
  const uint64_t* all = cuda_emulator::warp_exchange(emulated_word(value));
  return emulated_value<T>(all[own / width * width + static_cast<unsigned>(lane) % width]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const EmulatedLanes whole(mask);
  const unsigned own = emulated_lane();
  const uint64_t* all = cuda_emulator::warp_exchange(emulated_word(value));
  return own % width >= delta ? emulated_value<T>(all[own - delta]) : value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const EmulatedLanes whole(mask);
  const unsigned own = emulated_lane();
  const uint64_t* all = cuda_emulator::warp_exchange(emulated_word(value));
  return own % width + delta < static_cast<unsigned>(width) ? emulated_value<T>(all[own + delta]) : value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const EmulatedLanes whole(mask);
  const unsigned other = emulated_lane() ^ static_cast<unsigned>(bits);
  const unsigned own = emulated_lane();
  const uint64_t* all = cuda_emulator::warp_exchange(emulated_word(value));
  return own / width == other / width ? emulated_value<T>(all[other]) : value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const EmulatedLanes whole(mask);
  const uint64_t* all = cuda_emulator::warp_exchange(predicate != 0);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == every_lane; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const EmulatedLanes whole(mask);
  const uint64_t word = emulated_word(value);
  const uint64_t* all = cuda_emulator::warp_exchange(word);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane] == word) << lane;
  return bits;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const EmulatedLanes whole(mask);
  const uint64_t* all = cuda_emulator::warp_exchange(value);
  unsigned sum = 0;
  for (unsigned lane = 0; lane < 32; ++lane) sum += static_cast<unsigned>(all[lane]);
  return sum;
}
inline int __reduce_add_sync(unsigned mask, int value) { return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value))); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const EmulatedLanes whole(mask);
  const uint64_t* all = cuda_emulator::warp_exchange(value);
  return static_cast<unsigned>(*std::max_element(all, all + 32));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  const EmulatedLanes whole(mask);
  const uint64_t* all = cuda_emulator::warp_exchange(value);
  return static_cast<unsigned>(*std::min_element(all, all + 32));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  const EmulatedLanes whole(mask);
  const uint64_t* all = cuda_emulator::warp_exchange(value);
  uint64_t bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= all[lane];
  return static_cast<unsigned>(bits);
}

// One thread runs at a time, so these are plain.
template <class T, class U>
T atomicAdd(T* at, U value) {
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
template <class T, class U>
T atomicMax(T* at, U value) {
  const T before = *at;
  *at = std::max<T>(before, value);
  return before;
}
template <class T, class U>
T atomicMin(T* at, U value) {
  const T before = *at;
  *at = std::min<T>(before, value);
  return before;
}
template <class T, class U>
T atomicOr(T* at, U value) {
  const T before = *at;
  *at = before | static_cast<T>(value);
  return before;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

// Two multiprocessors, so that small tensors already need several blocks and several rounds of each.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
