// pack_mask, unpack_mask: CUDA kernels. Bytes moved: n + n / 8 either way; each thread handles the 8 entries of one packed byte.
#include <vector>

#include "common/checks.h"
#include "common/cuda_launch.h"
#include "common/cuda_mask.h"

namespace taskloom {
namespace {

bool __device__ aligned_to_8(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 7) == 0; }

__global__ void __launch_bounds__(cuda_threads) pack_mask_kernel(DeviceMask mask, int64_t numel, uint8_t* __restrict__ packed) {
  const int64_t groups = (numel + 7) / 8;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    packed[group] = static_cast<uint8_t>(load_mask(mask, group, numel));
  }
}

__global__ void __launch_bounds__(cuda_threads)
    unpack_mask_kernel(const uint8_t* __restrict__ packed, int64_t n, uint8_t* __restrict__ mask) {
  const int64_t bytes = (n + 7) / 8;
  const bool aligned = aligned_to_8(mask);
  for (int64_t byte = grid_index(); byte < bytes; byte += grid_stride()) {
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
  launch_striding(flat, (numel + 7) / 8, pack_mask_kernel, device_mask(flat), numel, static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor unpack_mask_cuda(const Tensor& packed, std::vector<int64_t> shape) {
  const int64_t numel = check_packed_shape(packed, shape);
  const Tensor flat = torch::stable::contiguous(packed);
  Tensor mask = torch::stable::new_empty(flat, shape, ScalarType::Bool);
  launch_striding(flat, (numel + 7) / 8, unpack_mask_kernel, static_cast<const uint8_t*>(flat.const_data_ptr()), numel,
                  static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return mask;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask_cuda));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask_cuda));
}

}  // namespace taskloom
