// A delta's tensors as kernels take them.
#pragma once

#include "masked/delta_tensors.h"
#include "masked/magnitude_ranks_cuda.h"

namespace taskloom {

inline DeviceDelta device_delta(const DeltaTensors& tensors) {
  return {device_values(tensors.tuned, "tuned"), tensors.base.has_value() ? device_values(*tensors.base, "base") : DeviceValues{}};
}

}  // namespace taskloom
