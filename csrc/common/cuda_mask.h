// Masks as kernels read them: packed bits, or a byte an entry; eight entries at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/checks.h"
#include "common/cuda_launch.h"

namespace taskloom {

struct DeviceMask {
  const uint8_t* data = nullptr;
  int32_t packed = 1;
  int32_t aligned = 0;  // whether data is a multiple of 8 bytes
};

inline DeviceMask device_mask(const Tensor& contiguous) {
  check_on_device(contiguous);
  const auto* const data = static_cast<const uint8_t*>(contiguous.const_data_ptr());
  return {data, contiguous.scalar_type() == ScalarType::Byte, (reinterpret_cast<uintptr_t>(data) & 7) == 0};
}

constexpr uint64_t every_byte = 0x0101010101010101u;
constexpr uint64_t low_seven_bits = 0x7f * every_byte;

// 1 in each byte of `bytes` that is not zero.
__device__ inline uint64_t nonzero_bytes(uint64_t bytes) {
  return ((((bytes & low_seven_bits) + low_seven_bits) | bytes) >> 7) & every_byte;
}

// Byte i (0 or 1) becomes bit i: the product moves it to bit 56 + i, and no two of its partial products share a bit.
__device__ inline uint32_t gather_bits(uint64_t bytes) { return static_cast<uint32_t>((bytes * 0x0102040810204080u) >> 56); }

// Bit i of `bits` becomes byte i.
__device__ inline uint64_t scatter_bits(uint32_t bits) { return nonzero_bytes((bits * every_byte) & 0x8040201008040201u); }

// Bits of the entries 8 * group .. 8 * group + 8; those at `numel` and beyond are 0.
__device__ inline uint32_t load_mask(const DeviceMask& mask, int64_t group, int64_t numel) {
  const int64_t begin = 8 * group, left = numel - begin;
  const uint32_t inside = left >= 8 ? 0xffu : (1u << left) - 1u;
  if (mask.packed) return mask.data[group] & inside;
  if (mask.aligned && left >= 8) return gather_bits(nonzero_bytes(*reinterpret_cast<const uint64_t*>(mask.data + begin)));
  uint32_t bits = 0;
  for (int i = 0; i < 8 && i < left; ++i) bits |= (mask.data[begin + i] != 0 ? 1u : 0u) << i;
  return bits;
}

}  // namespace taskloom
