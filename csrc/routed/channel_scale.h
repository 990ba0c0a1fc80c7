// channel_scale and its backward: an activation of scaled channels, in a window of them. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "routed/activation.h"
#include "routed/windows.h"

namespace taskloom {

struct ChannelScale {
  Elements x;  // [samples, channels, places]
  Windows windows;
  int64_t channels, places;
  Elements scale, bias;  // [samples, channels]; [channels], or no data
  Activation activation;
  void* y;  // as x
};

struct ChannelScaleBackward {
  ChannelScale forward;  // its y is the gradient of x, or null
  Elements gradient;     // as x
  void* for_scale;       // [samples, channels] in the dtype of scale, or null
  void* for_bias;        // [samples, channels] in the dtype of the arithmetic, or null: each sample's part
};

// Entries that are worked on at once.
constexpr int64_t channel_scale_block = 1024;

struct ChannelScaleLoops {
  // Channels begin .. begin + n of a sample. `scratch` holds 4 blocks and 2 n accumulators.
  void (*forward)(bool wide, const ChannelScale& view, int64_t sample, int64_t begin, int64_t n, void* scratch);
  // The same; `scratch` holds 7 blocks and 4 n accumulators.
  void (*backward)(bool wide, const ChannelScaleBackward& view, int64_t sample, int64_t begin, int64_t n, void* scratch);
};

TASKLOOM_LOOPS(ChannelScaleLoops, channel_scale_loops)

}  // namespace taskloom
