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

// 0 where the kernel does not fit: a quotient would be rounded up to 0 then, and one output left.
int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

const ChannelWindow* windows_of(const Tensor& windows, const WindowConv2d& conv) {
  check_dtype(windows, ScalarType::Long, "windows", "int64");
  STD_TORCH_CHECK(windows.is_contiguous() && windows.dim() == 2 && windows.size(0) == conv.samples && windows.size(1) == 4,
                  "windows: expected a contiguous tensor [", conv.samples, ", 4]");
  const auto* found = static_cast<const ChannelWindow*>(windows.const_data_ptr());
  for (int64_t n = 0; n < conv.samples; ++n) {
    const ChannelWindow& one = found[n];
    STD_TORCH_CHECK(one.first >= 0 && one.channels >= 0 && one.first <= std::min(conv.channels, conv.weight_channels) - one.channels,
                    "windows: expected those of inputs within the channels");
    STD_TORCH_CHECK(one.first_output >= 0 && one.outputs >= 0 && one.first_output <= conv.outputs - one.outputs,
                    "windows: expected those of outputs within the channels");
  }
  return found;
}

bool same_outputs(const ChannelWindow& a, const ChannelWindow& b) { return a.first_output == b.first_output && a.outputs == b.outputs; }

// Appends parts of these samples: `end` - `begin` outputs, in blocks.
void add_blocks(int64_t sample, int64_t samples, int64_t begin, int64_t end, std::vector<WindowConv2dPart>& parts) {
  for (int64_t output = begin; output < end; output += window_conv2d_outputs) {
    parts.push_back({sample, samples, output, std::min(window_conv2d_outputs, end - output)});
  }
}

// Whether each sample's outputs had better be packed for it alone, from their first on: blocks of all outputs are packed once, but have
// outputs on both sides of a window's edges. Packing a panel takes as long as computing it for 16 pixels.
bool have_own_blocks(const WindowConv2d& conv) {
  if (!conv.turned) return false;
  constexpr int64_t packing = 16, panel = 32;
  const int64_t pixels = conv.out.down * conv.out.across;
  return std::all_of(conv.windows, conv.windows + conv.samples,
                     [&](const ChannelWindow& window) { return packing * window.outputs < panel * pixels; });
}

// All outputs of all samples, unless threads would have nothing to do: each part packs its weights anew.
std::vector<WindowConv2dPart> parts_of(const WindowConv2d& conv) {
  std::vector<WindowConv2dPart> parts;
  if (have_own_blocks(conv)) {
    for (int64_t n = 0, samples = 1; n < conv.samples; n += samples) {
      const ChannelWindow& window = conv.windows[n];
      for (samples = 1; n + samples < conv.samples && same_outputs(window, conv.windows[n + samples]); ++samples) {
      }
      add_blocks(n, samples, window.first_output, window.first_output + window.outputs, parts);
    }
    return parts;
  }
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t blocks = chunk_count(conv.outputs, window_conv2d_outputs);
  const bool whole = threads <= 1 || blocks >= 4 * threads;
  const int64_t samples = whole ? conv.samples : chunk_count(conv.samples, std::min(chunk_count(2 * threads, blocks), conv.samples));
  for (int64_t n = 0; n < conv.samples; n += samples) add_blocks(n, std::min(samples, conv.samples - n), 0, conv.outputs, parts);
  return parts;
}

// Writes into y what windows [N, 4] of (first channel, channels, first output, outputs) see, and nothing outside their outputs. A turned
// weight [channels, outputs, kh, kw] gives x's gradient from that of the output.
void window_conv2d_into(const Tensor& x, const Tensor& weight, Optional bias, const Tensor& windows, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, bool turned, Tensor y) {
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
  conv.outputs = weight.size(turned ? 1 : 0);
  conv.weight_channels = weight.size(turned ? 0 : 1);
  conv.turned = turned;
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
    check_numel(*bias, conv.outputs, "bias", "weight's outputs");
    STD_TORCH_CHECK(bias->is_contiguous(), "bias: expected a contiguous tensor");
    conv.bias = bias->const_data_ptr();
  }
  conv.windows = windows_of(windows, conv);
  if (conv.samples == 0 || conv.outputs == 0) return;
  conv.x = x.const_data_ptr();
  conv.weight = weight.const_data_ptr();
  conv.y = y.mutable_data_ptr();
  const std::vector<WindowConv2dPart> parts = parts_of(conv);
  torch_parallel()(static_cast<int64_t>(parts.size()), [&](int64_t index) {
    const WindowConv2dPart& part = parts[static_cast<size_t>(index)];
    const ThreadScratch scratch(ScratchUse::weight, window_conv2d_loops().scratch(conv, part));
    window_conv2d_loops().run(conv, part, scratch.data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(taskloom_loops, m) {
  m.def(
      "window_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor windows, int[] stride, int[] padding, int[] dilation, bool turned, "
      "Tensor(a!) y) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(taskloom_loops, CPU, m) { m.impl("window_conv2d", TORCH_BOX(&window_conv2d_into)); }

}  // namespace taskloom
