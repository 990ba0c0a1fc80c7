// pack_mask, unpack_mask: CUDA kernels. Bytes moved: n + n / 8 either way; each thread handles the 8 entries of one packed byte.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/checks.h"
#include "common/cuda_launch.h"

namespace taskloom {
namespace {

constexpr uint64_t every_byte = 0x0101010101010101u;
constexpr uint64_t low_seven_bits = 0x7f * every_byte;

// 1 in each byte of `bytes` that is not zero.
__device__ uint64_t nonzero_bytes(uint64_t bytes) { return ((((bytes & low_seven_bits) + low_seven_bits) | bytes) >> 7) & every_byte; }

// Byte i (0 or 1) becomes bit i: the product moves it to bit 56 + i, and no two of its partial products share a bit.
__device__ uint8_t gather_bits(uint64_t bytes) { return static_cast<uint8_t>((bytes * 0x0102040810204080u) >> 56); }

__device__ uint64_t scatter_bits(uint8_t bits) { return nonzero_bytes((bits * every_byte) & 0x8040201008040201u); }

__device__ bool aligned_to_8(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 7) == 0; }

__global__ void __launch_bounds__(cuda_threads)
    pack_mask_kernel(const uint8_t* __restrict__ mask, int64_t n, uint8_t* __restrict__ packed) {
  const int64_t bytes = (n + 7) / 8;
  const bool aligned = aligned_to_8(mask);
  for (int64_t byte = grid_index(); byte < bytes; byte += grid_size()) {
    const int64_t begin = 8 * byte;
    if (aligned && begin + 8 <= n) {
      packed[byte] = gather_bits(nonzero_bytes(*reinterpret_cast<const uint64_t*>(mask + begin)));
      continue;
    }
    uint32_t bits = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (begin + bit < n && mask[begin + bit] != 0) bits |= 1u << bit;
    }
    packed[byte] = static_cast<uint8_t>(bits);
  }
}

__global__ void __launch_bounds__(cuda_threads)
    unpack_mask_kernel(const uint8_t* __restrict__ packed, int64_t n, uint8_t* __restrict__ mask) {
  const int64_t bytes = (n + 7) / 8;
  const bool aligned = aligned_to_8(mask);
  for (int64_t byte = grid_index(); byte < bytes; byte += grid_size()) {
    const int64_t begin = 8 * byte;
    const uint64_t entries = scatter_bits(packed[byte]);
    if (aligned && begin + 8 <= n) {
      *reinterpret_cast<uint64_t*>(mask + begin) = entries;
      continue;
    }
    for (int bit = 0; bit < 8; ++bit) {
      if (begin + bit < n) mask[begin + bit] = static_cast<uint8_t>(entries >> (8 * bit)) & 1;
    }
  }
}

Tensor pack_mask_cuda(const Tensor& mask) {
  check_dtype(mask, ScalarType::Bool, "mask", "bool");
  const Tensor flat = torch::stable::contiguous(mask);
  const int64_t numel = flat.numel();
  Tensor packed = torch::stable::new_empty(flat, {(numel + 7) / 8}, ScalarType::Byte);
  launch(flat, (numel + 7) / 8, pack_mask_kernel, static_cast<const uint8_t*>(flat.const_data_ptr()), numel,
         static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor unpack_mask_cuda(const Tensor& packed, std::vector<int64_t> shape) {
  const int64_t numel = check_packed_shape(packed, shape);
  const Tensor flat = torch::stable::contiguous(packed);
  Tensor mask = torch::stable::new_empty(flat, shape, ScalarType::Bool);
  launch(flat, (numel + 7) / 8, unpack_mask_kernel, static_cast<const uint8_t*>(flat.const_data_ptr()), numel,
         static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CUDA, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask_cuda));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask_cuda));
}

}  // namespace taskloom
