// Launches of grid-stride kernels on torch's current device and stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "common/stable_gaps.h"

namespace taskloom {

constexpr int cuda_threads = 256;
// Enough blocks to fill the largest GPU several times over; what is left is done by the grid stride.
constexpr int64_t cuda_max_blocks = 1 << 13;

inline __device__ int64_t grid_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
inline __device__ int64_t grid_size() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Runs kernel(arguments...) with one thread per item, fewer where the kernel's grid stride has to cover them, on the device of `where`.
template <class Kernel, class... Arguments>
void launch(const torch::stable::Tensor& where, int64_t items, Kernel kernel, Arguments... arguments) {
  if (items == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  const int64_t blocks = std::min((items + cuda_threads - 1) / cuda_threads, cuda_max_blocks);
  kernel<<<static_cast<unsigned>(blocks), cuda_threads, 0, current_cuda_stream(where.get_device_index())>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace taskloom
