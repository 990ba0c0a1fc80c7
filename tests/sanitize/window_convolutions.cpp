// Cases of the loops of window_conv2d: input, weights and scratch of exactly their sizes, and parts divided among threads.
#include <algorithm>
#include <vector>

#include "check.h"
#include "groups.h"
#include "routed/window_conv2d.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

constexpr DType stored[] = {DType::f32, DType::bf16, DType::f16};

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

Sizes2d below(int64_t most, int64_t least, Random& random) { return {least + random.below(most), least + random.below(most)}; }

// The numbers of a convolution, without its memory.
WindowConv2d random_shape(Random& random) {
  WindowConv2d conv{};
  conv.dtype = random.pick(stored);
  conv.samples = 1 + random.below(3);
  conv.channels = 1 + random.below(random.below(4) == 0 ? 120 : 9);
  conv.weight_channels = conv.channels + random.below(2);
  conv.outputs = 1 + random.below(100);
  conv.kernel = below(3, 1, random);
  conv.turned = random.below(3) == 0;
  conv.stride = below(3, 1, random);
  conv.dilation = below(2, 1, random);
  conv.padding = below(4, 0, random);
  conv.size = below(34, 1, random);
  conv.size.down = std::max((conv.size.down + 1) / 3, conv.dilation.down * (conv.kernel.down - 1) + 1 - 2 * conv.padding.down);
  conv.size.across = std::max(conv.size.across, conv.dilation.across * (conv.kernel.across - 1) + 1 - 2 * conv.padding.across);
  conv.size = {std::max<int64_t>(conv.size.down, 1), std::max<int64_t>(conv.size.across, 1)};
  conv.out = {out_size(conv.size.down, conv.kernel.down, conv.stride.down, conv.padding.down, conv.dilation.down),
              out_size(conv.size.across, conv.kernel.across, conv.stride.across, conv.padding.across, conv.dilation.across)};
  return conv;
}

std::vector<ChannelWindow> random_windows(const WindowConv2d& conv, Random& random) {
  std::vector<ChannelWindow> windows;
  for (int64_t n = 0; n < conv.samples; ++n) {
    const int64_t first = random.below(conv.channels + 1), output = random.below(2) * random.below(conv.outputs + 1);
    windows.push_back({first, random.below(conv.channels - first + 1), output, random.below(conv.outputs - output + 1)});
  }
  return windows;
}

void one_shape(Random& random) {
  WindowConv2d conv = random_shape(random);
  const Placement placement = random.pick(placements);
  begin_case("window_conv2d samples=%ld channels=%ld outputs=%ld size=%ldx%ld kernel=%ldx%ld stride=%ldx%ld turned=%d %s placement=%d",
             conv.samples, conv.channels, conv.outputs, conv.size.down, conv.size.across, conv.kernel.down, conv.kernel.across,
             conv.stride.down, conv.stride.across, conv.turned, dtype_name(conv.dtype), static_cast<int>(placement));
  const std::vector<ChannelWindow> windows = random_windows(conv, random);
  const int64_t inputs = conv.samples * conv.channels * conv.size.down * conv.size.across;
  const int64_t entries = conv.outputs * conv.weight_channels * conv.kernel.down * conv.kernel.across;
  const Buffer x = values(conv.dtype, inputs, Kind::plain, placement, random);
  const Buffer weight = values(conv.dtype, entries, Kind::plain, placement, random);
  const Buffer bias = values(conv.dtype, conv.outputs, Kind::plain, placement, random);
  conv.x = x.data();
  conv.weight = weight.data();
  conv.bias = random.below(2) == 0 ? nullptr : bias.data();
  conv.windows = windows.data();
  const int64_t plane = conv.out.down * conv.out.across * element_size(conv.dtype);
  agree(conv.dtype, conv.samples * conv.outputs * conv.out.down * conv.out.across, placement, [&](char* out) {
    // What is outside of the windows of outputs is the caller's.
    for (int64_t n = 0; n < conv.samples; ++n) {
      const ChannelWindow& window = windows[static_cast<size_t>(n)];
      for (int64_t o = 0; o < conv.outputs; ++o) {
        const bool written = o >= window.first_output && o < window.first_output + window.outputs;
        if (!written) std::memset(out + (n * conv.outputs + o) * plane, 0, static_cast<size_t>(plane));
      }
    }
    WindowConv2d whole = conv;
    whole.y = out;
    const int64_t blocks = chunk_count(conv.outputs, window_conv2d_outputs);
    team()(blocks * conv.samples, [&](int64_t index) {
      const int64_t output = index % blocks * window_conv2d_outputs;
      const WindowConv2dPart part{index / blocks, 1, output, std::min(window_conv2d_outputs, conv.outputs - output)};
      const Buffer scratch((window_conv2d_loops().scratch(whole, part) + 63) / 64 * 64, Placement::page);
      window_conv2d_loops().run(whole, part, scratch.data());
    });
  });
}

}  // namespace

void window_convolutions() {
  Random random(29);
  for (int repeat = 0; repeat < 150; ++repeat) one_shape(random);
}

}  // namespace taskloom::sanitize
