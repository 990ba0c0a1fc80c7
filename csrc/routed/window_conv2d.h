// Convolutions that see a window of each sample's channels. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// Outputs that share a tile of the input.
constexpr int64_t window_conv2d_outputs = 64;

// Down and across.
struct Sizes2d {
  int64_t down, across;
};

// What one sample sees, and what is written of it.
struct ChannelWindow {
  int64_t first, channels, first_output, outputs;
};

struct WindowConv2d {
  DType dtype;         // of x, weight, bias and y; not f64
  const void* x;       // [samples, channels, size.down, size.across]
  const void* weight;  // [outputs, weight_channels, kernel.down, kernel.across]
  const void* bias;    // [outputs], or null
  void* y;             // [samples, outputs, out.down, out.across]
  int64_t samples, channels, weight_channels, outputs;
  Sizes2d size, kernel, stride, padding, dilation, out;
  const ChannelWindow* windows;  // of each sample; within channels, weight_channels and outputs
  bool turned;                   // the kernel's taps last to first: the gradient of an input from that of its output
};

// Samples and outputs of one piece of work; `outputs` is at most window_conv2d_outputs.
struct WindowConv2dPart {
  int64_t first_sample, samples, first_output, outputs;
};

struct WindowConv2dLoops {
  // Bytes that `part` needs, at an address that suits any vector.
  int64_t (*scratch)(const WindowConv2d& conv, const WindowConv2dPart& part);
  // Each output is a chain of fused multiply-adds over the channels' taps in their order, at every level; of every run of about
  // 512 of them the sum is added to the bias. y is written where the part's samples and outputs are within the windows.
  void (*run)(const WindowConv2d& conv, const WindowConv2dPart& part, void* scratch);
};

TASKLOOM_LOOPS(WindowConv2dLoops, window_conv2d_loops)

}  // namespace taskloom
