// What only the device knows to be wrong: the device stops at an assertion, before any kernel that is queued after it, and nobody waits.
// In the tests' emulator the call raises.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

#include "common/checks.h"

namespace taskloom {

// `fine` is one bool on the device.
inline void assert_on_device(const torch::stable::Tensor& fine, const std::string& message) {
#ifdef TASKLOOM_CUDA_EMULATED
  STD_TORCH_CHECK(*static_cast<const bool*>(fine.const_data_ptr()), message);
#else
  std::array<StableIValue, 2> stack{torch::stable::detail::from(fine), torch::stable::detail::from(message)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_assert_async", "msg", stack.data(), TORCH_ABI_VERSION));
#endif
}

}  // namespace taskloom
