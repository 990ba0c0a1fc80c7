// channel_scale and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "routed/channel_scale.h"
#include "routed/run_sums.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

constexpr int64_t entries_per_piece = 1 << 16;
// Channels of a piece at most, for which there is scratch.
constexpr int64_t most_channels = 4096;

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "activation: expected none, relu, gelu or silu, got ", name);
  return Activation::none;
}

// One call's tensors, contiguous, and its windows.
struct Given {
  int64_t samples, channels, places;
  Tensor x, scale;
  OptionalElements bias;
  SampleWindows windows;
  Activation activation;
  bool wide;

  Given(const Tensor& values, const Tensor& factors, const OptionalTensor& addends, const OptionalTensor& start, int64_t width,
        const OptionalTensor& widths, const std::string& name)
      : samples(sizes_of(values)),
        channels(values.size(1)),
        places(values.size(2)),
        x(contiguous_of(values)),
        scale(contiguous_of(factors)),
        bias(addends, channels, "bias"),
        windows(start, width, widths, samples, channels),
        activation(activation_of(name)),
        wide(values.scalar_type() == ScalarType::Double || factors.scalar_type() == ScalarType::Double || is_double(addends)) {
    check_numel(scale, samples * channels, "scale", "x's first two dimensions");
  }

  static int64_t sizes_of(const Tensor& values) {
    STD_TORCH_CHECK(values.dim() == 3, "x: expected three dimensions, got ", values.dim());
    STD_TORCH_CHECK(values.size(1) > 0, "x: expected at least one channel, got none");
    return values.size(0);
  }

  ChannelScale view(void* to) const {
    return {elements_of(x, "x"), windows.view(), channels, places, elements_of(scale, "scale"), bias.view(), activation, to};
  }
};

// Channels of each sample in pieces.
struct Pieces {
  int64_t channels, step, each, count;

  explicit Pieces(const Given& given)
      : channels(given.channels),
        step(std::clamp<int64_t>(entries_per_piece / std::max<int64_t>(1, given.places), 1, most_channels)),
        each(given.places == 0 ? 0 : chunk_count(channels, step)),
        count(given.samples * each) {}

  int64_t sample(int64_t piece) const { return piece / each; }
  int64_t begin(int64_t piece) const { return piece % each * step; }
  int64_t size(int64_t piece) const { return std::min(step, channels - begin(piece)); }
};

Tensor channel_scale_cpu(const Tensor& x, const Tensor& scale, OptionalTensor bias, OptionalTensor start, int64_t width,
                         OptionalTensor widths, Text activation) {
  const Given given(x, scale, bias, start, width, widths, activation.value);
  Tensor y = empty_of_shape(x, x.scalar_type());
  const ChannelScale view = given.view(y.mutable_data_ptr());
  const Pieces pieces(given);
  torch_parallel()(pieces.count, [&](int64_t piece) {
    const int64_t n = pieces.size(piece);
    const ThreadScratch scratch(ScratchUse::positions, (4 * channel_scale_block + 2 * n) * (given.wide ? 8 : 4));
    channel_scale_loops().forward(given.wide, view, pieces.sample(piece), pieces.begin(piece), n, scratch.data());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channel_scale_backward_cpu(const Tensor& gradient, const Tensor& x, const Tensor& scale,
                                                              OptionalTensor bias, OptionalTensor start, int64_t width,
                                                              OptionalTensor widths, Text activation, bool for_x, bool for_scale,
                                                              bool for_bias) {
  const Given given(x, scale, bias, start, width, widths, activation.value);
  check_numel(gradient, x.numel(), "gradient", "x");
  for_bias = for_bias && bias.has_value();
  const Tensor slopes = contiguous_of(gradient);
  Tensor dx = for_x ? empty_of_shape(x, x.scalar_type()) : empty_cpu({0}, x.scalar_type());
  Tensor dscale = for_scale ? empty_of_shape(scale, scale.scalar_type()) : empty_cpu({0}, scale.scalar_type());
  Tensor dbias = for_bias ? empty_cpu({given.channels}, bias->scalar_type()) : empty_cpu({0}, x.scalar_type());
  Tensor sums = empty_cpu({for_bias ? given.samples : 0, given.channels}, arithmetic_type(given.wide));
  const Pieces pieces(given);
  if (pieces.count == 0) return {dx, torch::stable::zero_(dscale), torch::stable::zero_(dbias)};
  const ChannelScaleBackward view{given.view(for_x ? dx.mutable_data_ptr() : nullptr), elements_of(slopes, "gradient"),
                                  for_scale ? dscale.mutable_data_ptr() : nullptr, for_bias ? sums.mutable_data_ptr() : nullptr};
  torch_parallel()(pieces.count, [&](int64_t piece) {
    const int64_t n = pieces.size(piece);
    const ThreadScratch scratch(ScratchUse::positions, (7 * channel_scale_block + 4 * n) * (given.wide ? 8 : 4));
    channel_scale_loops().backward(given.wide, view, pieces.sample(piece), pieces.begin(piece), n, scratch.data());
  });
  if (for_bias) {
    run_sums_loops().add_up(given.wide, sums.mutable_data_ptr(), given.samples, given.channels, given.channels, dtype_of(dbias, "bias"),
                            dbias.mutable_data_ptr(), 0);
  }
  return {dx, dscale, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("channel_scale", TORCH_BOX(&channel_scale_cpu));
  m.impl("channel_scale_backward", TORCH_BOX(&channel_scale_backward_cpu));
}

}  // namespace taskloom
