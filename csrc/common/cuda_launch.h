// How CUDA kernels are launched on torch's current device and stream, and registered. In the tests' emulator, which runs kernels on the
// CPU (tests/cuda_kernels), the same ops are registered in a namespace of their own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "common/stable_gaps.h"

#ifdef TASKLOOM_CUDA_EMULATED
#define TASKLOOM_CUDA_OPS(library) STABLE_TORCH_LIBRARY_IMPL(taskloom_emulated, CPU, library)
// An array of a block's shared memory. Its content is undefined at first (set bits in the emulator).
#define TASKLOOM_SHARED(type, name, count) \
  static const char name##_key = 0;        \
  type* const name = static_cast<type*>(cuda_emulator::shared(&name##_key, (count) * sizeof(type)))
// The shared memory whose size the launch gives.
#define TASKLOOM_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_emulator::dynamic_shared())
#else
#define TASKLOOM_CUDA_OPS(library) STABLE_TORCH_LIBRARY_IMPL(taskloom, CUDA, library)
#define TASKLOOM_SHARED(type, name, count) __shared__ type name[count]
#define TASKLOOM_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace taskloom {

constexpr int cuda_threads = 256;
constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;
// Blocks of 256 threads that a multiprocessor holds at once: where a kernel strides over its items, more would only queue.
constexpr int64_t resident_blocks = 8;

inline __device__ int64_t grid_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
inline __device__ int64_t grid_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Raises where a call of the CUDA runtime failed. The runtime is linked in statically, so nobody else clears its last error: it would be
// taken for that of the next launch.
inline void check_cuda(cudaError_t error) {
#ifdef TASKLOOM_CUDA_EMULATED
  static_cast<void>(error);
#else
  if (error != cudaSuccess) STD_CUDA_CHECK(cudaGetLastError());
  STD_CUDA_CHECK(error);
#endif
}

// A pointer of the host's would end the device's context, where an error can be raised.
inline void check_on_device(const torch::stable::Tensor& tensor) {
#ifdef TASKLOOM_CUDA_EMULATED
  static_cast<void>(tensor);
#else
  STD_TORCH_CHECK(tensor.is_cuda(), "expected all tensors on one CUDA device, got one that is on another kind of device");
#endif
}

inline int64_t multiprocessor_count(const torch::stable::Tensor& where) {
  int multiprocessors = 1;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, where.get_device_index()));
  return multiprocessors;
}

// Blocks for a kernel that strides over `items`, of which a block takes `per_block` at a time: as many as there is work for, and no more
// than the device runs at once.
inline int64_t striding_blocks(const torch::stable::Tensor& where, int64_t items, int64_t per_block) {
  return std::min((items + per_block - 1) / per_block, multiprocessor_count(where) * resident_blocks);
}

struct Launch {
  dim3 grid;
  unsigned threads = cuda_threads;
  unsigned shared_bytes = 0;  // dynamic; at most 48 KiB
};

// Runs kernel(arguments...) on the device of `where`, on torch's current stream.
template <class Kernel, class... Arguments>
void launch(const torch::stable::Tensor& where, const Launch& shape, Kernel kernel, Arguments... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
#ifdef TASKLOOM_CUDA_EMULATED
  static_cast<void>(where);
  cuda_emulator::run(shape.grid, dim3(shape.threads), shape.shared_bytes, [=] { kernel(arguments...); });
#else
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  const cudaStream_t stream = current_cuda_stream(where.get_device_index());
  // The formatter would part the closing brackets of a launch.
  // clang-format off
  kernel<<<shape.grid, shape.threads, shape.shared_bytes, stream>>>(arguments...);
  // clang-format on
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// The same over `items`, a thread each, striding where there are more than the device runs at once.
template <class Kernel, class... Arguments>
void launch_striding(const torch::stable::Tensor& where, int64_t items, Kernel kernel, Arguments... arguments) {
  launch(where, {dim3(static_cast<unsigned>(striding_blocks(where, items, cuda_threads)))}, kernel, arguments...);
}

// Sets bytes on the device to zero, on torch's current stream.
inline void clear(const torch::stable::Tensor& tensor) {
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
#ifdef TASKLOOM_CUDA_EMULATED
  cudaMemsetAsync(tensor.mutable_data_ptr(), 0, bytes, nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  check_cuda(cudaMemsetAsync(tensor.mutable_data_ptr(), 0, bytes, current_cuda_stream(tensor.get_device_index())));
#endif
}

}  // namespace taskloom
