// The one way in which an op may look at a value on the device: by a copy, for which the host waits. While a CUDA graph is captured torch
// refuses it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "common/checks.h"

namespace taskloom {

// The first entry of an int64 tensor on a device.
inline int64_t host_value(const torch::stable::Tensor& on_device) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const torch::stable::Tensor copy = torch::stable::to(on_device, cpu, /*non_blocking=*/false, /*copy=*/true);
  return *static_cast<const int64_t*>(copy.const_data_ptr());
}

}  // namespace taskloom
