// window_group_norm_silu and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/thread_scratch.h"
#include "routed/run_sums.h"
#include "routed/window_group_norm.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

// One call's tensors, contiguous, and its windows.
struct Given {
  int64_t samples, channels, places, groups;
  Tensor x;
  OptionalElements weight, bias;
  SampleWindows windows;
  bool wide;

  Given(const Tensor& values, const OptionalTensor& factors, const OptionalTensor& addends, int64_t groups, const Tensor& start,
        int64_t width, const OptionalTensor& widths)
      : samples(checked_samples(values, groups)),
        channels(values.size(1)),
        places(values.size(2)),
        groups(groups),
        x(contiguous_of(values)),
        weight(factors, channels, "weight"),
        bias(addends, channels, "bias"),
        windows(start, width, widths, samples, channels),
        wide(values.scalar_type() == ScalarType::Double || is_double(factors) || is_double(addends)) {}

  static int64_t checked_samples(const Tensor& values, int64_t groups) {
    STD_TORCH_CHECK(values.dim() == 3, "x: expected three dimensions, got ", values.dim());
    STD_TORCH_CHECK(values.size(1) > 0 && values.size(2) > 0, "x: expected at least one channel and one place in it");
    STD_TORCH_CHECK(groups >= 1 && values.size(1) % groups == 0, "groups: expected a divisor of ", values.size(1), " channels, got ",
                    groups);
    return values.size(0);
  }

  int64_t scratch_bytes() const { return (3 * group_norm_block + 2 * (channels / groups)) * (wide ? 8 : 4); }

  WindowGroupNorm view(double eps, bool outside, void* y, void* mean, void* rstd) const {
    return {elements_of(x, "x"), windows.view(), channels, places, groups, weight.view(), bias.view(), eps, outside, y, mean, rstd};
  }
};

std::tuple<Tensor, Tensor, Tensor> window_group_norm_silu_cpu(const Tensor& x, OptionalTensor weight, OptionalTensor bias, int64_t groups,
                                                              const Tensor& start, int64_t width, OptionalTensor widths, double eps,
                                                              bool outside) {
  const Given given(x, weight, bias, groups, start, width, widths);
  Tensor y = empty_of_shape(x, x.scalar_type());
  Tensor mean = empty_cpu({given.samples, groups}, arithmetic_type(given.wide)),
         rstd = empty_cpu({given.samples, groups}, arithmetic_type(given.wide));
  const WindowGroupNorm view = given.view(eps, outside, y.mutable_data_ptr(), mean.mutable_data_ptr(), rstd.mutable_data_ptr());
  torch_parallel()(given.samples * groups, [&](int64_t index) {
    const ThreadScratch scratch(ScratchUse::positions, given.scratch_bytes());
    window_group_norm_loops().forward(given.wide, view, index / groups, index % groups, scratch.data());
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> window_group_norm_silu_backward_cpu(const Tensor& gradient, const Tensor& x, OptionalTensor weight,
                                                                       OptionalTensor bias, int64_t groups, const Tensor& start,
                                                                       int64_t width, OptionalTensor widths, const Tensor& mean,
                                                                       const Tensor& rstd, OptionalTensor for_mean, OptionalTensor for_rstd,
                                                                       bool outside, bool for_x, bool for_affine) {
  const Given given(x, weight, bias, groups, start, width, widths);
  check_numel(gradient, x.numel(), "gradient", "x");
  const int64_t statistics = given.samples * groups;
  const Tensor slopes = contiguous_of(gradient);
  const OptionalSums means(mean, given.wide, statistics, "mean"), rstds(rstd, given.wide, statistics, "rstd");
  const OptionalSums for_means(for_mean, given.wide, statistics, "for_mean"), for_rstds(for_rstd, given.wide, statistics, "for_rstd");
  const bool for_weight = for_affine && weight.has_value(), for_bias = for_affine && bias.has_value();
  Tensor dx = for_x ? empty_of_shape(x, x.scalar_type()) : empty_cpu({0}, x.scalar_type());
  Tensor dweight = for_weight ? empty_cpu({given.channels}, weight->scalar_type()) : empty_cpu({0}, x.scalar_type());
  Tensor dbias = for_bias ? empty_cpu({given.channels}, bias->scalar_type()) : empty_cpu({0}, x.scalar_type());
  if (given.samples == 0) return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
  Tensor sums = empty_cpu({given.samples, 2, given.channels}, arithmetic_type(given.wide));
  const WindowGroupNormBackward view{
      given.view(0, outside, for_x ? dx.mutable_data_ptr() : nullptr, const_cast<void*>(means.data()), const_cast<void*>(rstds.data())),
      elements_of(slopes, "gradient"), for_means.data(), for_rstds.data(), sums.mutable_data_ptr()};
  torch_parallel()(statistics, [&](int64_t index) {
    const ThreadScratch scratch(ScratchUse::positions, given.scratch_bytes());
    window_group_norm_loops().backward(given.wide, view, index / groups, index % groups, scratch.data());
  });
  const auto add_up = [&](int64_t place, const Tensor& to) {
    char* const from = static_cast<char*>(sums.mutable_data_ptr()) + place * given.channels * (given.wide ? 8 : 4);
    run_sums_loops().add_up(given.wide, from, given.samples, 2 * given.channels, given.channels, dtype_of(to, "weight, bias"),
                            to.mutable_data_ptr(), 0);
  };
  if (for_weight) add_up(0, dweight);
  if (for_bias) add_up(1, dbias);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("window_group_norm_silu", TORCH_BOX(&window_group_norm_silu_cpu));
  m.impl("window_group_norm_silu_backward", TORCH_BOX(&window_group_norm_silu_backward_cpu));
}

}  // namespace taskloom
