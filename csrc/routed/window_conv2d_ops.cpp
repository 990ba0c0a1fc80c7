// The loops of window_conv2d as an op of no public name: what the composition of taskloom::window_conv2d calls where they are faster.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/thread_scratch.h"
#include "routed/window_conv2d.h"

namespace taskloom {
namespace {

using Optional = std::optional<Tensor>;

Sizes2d pair_of(const std::vector<int64_t>& values, const char* name, int64_t least) {
  STD_TORCH_CHECK(values.size() == 2, name, ": expected two numbers, got ", values.size());
  STD_TORCH_CHECK(values[0] >= least && values[1] >= least, name, ": expected at least ", least, ", got ", values[0], " and ", values[1]);
  return {values[0], values[1]};
}

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

const ChannelWindow* windows_of(const Tensor& windows, const WindowConv2d& conv) {
  check_dtype(windows, ScalarType::Long, "windows", "int64");
  STD_TORCH_CHECK(windows.is_contiguous() && windows.dim() == 2 && windows.size(0) == conv.samples && windows.size(1) == 4,
                  "windows: expected a contiguous tensor [", conv.samples, ", 4]");
  const auto* found = static_cast<const ChannelWindow*>(windows.const_data_ptr());
  for (int64_t n = 0; n < conv.samples; ++n) {
    const ChannelWindow& one = found[n];
    STD_TORCH_CHECK(one.first >= 0 && one.channels >= 0 && one.first + one.channels <= std::min(conv.channels, conv.weight_channels),
                    "windows: expected those of inputs within the channels");
    STD_TORCH_CHECK(one.first_output >= 0 && one.outputs >= 0 && one.first_output + one.outputs <= conv.outputs,
                    "windows: expected those of outputs within the channels");
  }
  return found;
}

// Samples of one part: all of them, unless threads would have nothing to do; their weights are packed anew for each part.
int64_t samples_of_part(const WindowConv2d& conv, int64_t blocks) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads <= 1 || blocks >= 4 * threads) return conv.samples;
  const int64_t wanted = std::min(chunk_count(2 * threads, blocks), conv.samples);
  return chunk_count(conv.samples, wanted);
}

// Writes into y what windows [N, 4] of (first channel, channels, first output, outputs) see, and nothing outside their outputs.
void window_conv2d_into(const Tensor& x, const Tensor& weight, Optional bias, const Tensor& windows, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, Tensor y) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && y.dim() == 4, "x, weight, y: expected four dimensions");
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && y.is_contiguous(), "x, weight, y: expected contiguous tensors");
  WindowConv2d conv{};
  conv.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(conv.dtype != DType::f64, "x: expected a float32, bfloat16 or float16 tensor, got float64");
  check_dtype(weight, x.scalar_type(), "weight", "tensor of x's dtype");
  check_dtype(y, x.scalar_type(), "y", "tensor of x's dtype");
  conv.samples = x.size(0);
  conv.channels = x.size(1);
  conv.size = {x.size(2), x.size(3)};
  conv.outputs = weight.size(0);
  conv.weight_channels = weight.size(1);
  conv.kernel = {weight.size(2), weight.size(3)};
  conv.stride = pair_of(stride, "stride", 1);
  conv.padding = pair_of(padding, "padding", 0);
  conv.dilation = pair_of(dilation, "dilation", 1);
  conv.out = {out_size(conv.size.down, conv.kernel.down, conv.stride.down, conv.padding.down, conv.dilation.down),
              out_size(conv.size.across, conv.kernel.across, conv.stride.across, conv.padding.across, conv.dilation.across)};
  STD_TORCH_CHECK(conv.kernel.down >= 1 && conv.kernel.across >= 1 && conv.out.down >= 1 && conv.out.across >= 1,
                  "x: expected a padded input that holds the kernel, and a kernel that is not empty");
  STD_TORCH_CHECK(y.size(0) == conv.samples && y.size(1) == conv.outputs && y.size(2) == conv.out.down && y.size(3) == conv.out.across,
                  "y: expected [", conv.samples, ", ", conv.outputs, ", ", conv.out.down, ", ", conv.out.across, "]");
  if (bias) {
    check_dtype(*bias, x.scalar_type(), "bias", "tensor of x's dtype");
    check_numel(*bias, conv.outputs, "bias", "weight's first dimension");
    STD_TORCH_CHECK(bias->is_contiguous(), "bias: expected a contiguous tensor");
    conv.bias = bias->const_data_ptr();
  }
  conv.windows = windows_of(windows, conv);
  if (conv.samples == 0 || conv.outputs == 0) return;
  conv.x = x.const_data_ptr();
  conv.weight = weight.const_data_ptr();
  conv.y = y.mutable_data_ptr();
  const int64_t blocks = chunk_count(conv.outputs, window_conv2d_outputs), samples = samples_of_part(conv, blocks);
  torch_parallel()(blocks * chunk_count(conv.samples, samples), [&](int64_t index) {
    const int64_t output = index % blocks * window_conv2d_outputs, sample = index / blocks * samples;
    const WindowConv2dPart part{sample, std::min(samples, conv.samples - sample), output, std::min(window_conv2d_outputs, conv.outputs - output)};
    const ThreadScratch scratch(ScratchUse::weight, window_conv2d_loops().scratch(conv, part));
    window_conv2d_loops().run(conv, part, scratch.data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(taskloom_loops, m) {
  m.def(
      "window_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor windows, int[] stride, int[] padding, int[] dilation, Tensor(a!) y) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(taskloom_loops, CPU, m) { m.impl("window_conv2d", TORCH_BOX(&window_conv2d_into)); }

}  // namespace taskloom
