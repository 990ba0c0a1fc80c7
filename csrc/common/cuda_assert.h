// What only the device knows to be wrong: the device stops at an assertion, before any kernel that is queued after it, and nobody waits (as
// where an index is out of range in torch). In the tests' emulator the call raises.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

#include "common/checks.h"
#include "common/cuda_launch.h"

namespace taskloom {
namespace {

__global__ void __launch_bounds__(warp_size)
    compare_value_kernel(const int64_t* __restrict__ value, int64_t least, int64_t most, uint8_t* __restrict__ fine) {
  if (threadIdx.x == 0) *fine = *value >= least && *value <= most;
}

}  // namespace

// `fine` is one bool on the device.
inline void assert_on_device(const torch::stable::Tensor& fine, const std::string& message) {
#ifdef TASKLOOM_CUDA_EMULATED
  STD_TORCH_CHECK(*static_cast<const bool*>(fine.const_data_ptr()), message);
#else
  std::array<StableIValue, 2> stack{torch::stable::detail::from(fine), torch::stable::detail::from(message)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_assert_async", "msg", stack.data(), TORCH_ABI_VERSION));
#endif
}

// The first entry of an int64 tensor on the device has to be least .. most.
inline void assert_between(const torch::stable::Tensor& value, int64_t least, int64_t most, const std::string& message) {
  const torch::stable::Tensor fine = torch::stable::new_empty(value, {1}, ScalarType::Bool);
  launch(value, {dim3(1), warp_size}, compare_value_kernel, static_cast<const int64_t*>(value.const_data_ptr()), least, most,
         static_cast<uint8_t*>(fine.mutable_data_ptr()));
  assert_on_device(fine, message);
}

}  // namespace taskloom
