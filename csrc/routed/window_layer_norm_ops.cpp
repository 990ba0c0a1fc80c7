// window_layer_norm and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/thread_scratch.h"
#include "routed/run_sums.h"
#include "routed/window_layer_norm.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

// Entries of a piece of a sample's rows: it depends on the shape alone, so that sums do not depend on the threads.
constexpr int64_t entries_per_piece = 1 << 16;

// The rows of every sample in pieces.
struct Pieces {
  int64_t rows, step, each, count;

  Pieces(int64_t samples, int64_t rows, int64_t channels)
      : rows(rows), step(std::max<int64_t>(1, entries_per_piece / channels)), each(chunk_count(rows, step)), count(samples * each) {}

  int64_t sample(int64_t piece) const { return piece / each; }
  int64_t begin(int64_t piece) const { return piece % each * step; }
  int64_t size(int64_t piece) const { return std::min(step, rows - begin(piece)); }
};

void check_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected three dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.size(2) > 0, "x: expected at least one channel, got none");
}

std::tuple<Tensor, Tensor, Tensor> window_layer_norm_cpu(const Tensor& x, OptionalTensor shift, OptionalTensor scale, const Tensor& start,
                                                         int64_t width, OptionalTensor widths, double eps, bool outside) {
  check_rows(x);
  const int64_t samples = x.size(0), rows = x.size(1), channels = x.size(2);
  const SampleWindows windows(start, width, widths, samples, channels);
  const OptionalElements shifts(shift, samples * channels, "shift"), scales(scale, samples * channels, "scale");
  const Tensor values = contiguous_of(x);
  const bool wide = x.scalar_type() == ScalarType::Double || is_double(shift) || is_double(scale);
  Tensor y = empty_of_shape(x, x.scalar_type());
  Tensor mean = empty_cpu({samples, rows}, arithmetic_type(wide)), rstd = empty_cpu({samples, rows}, arithmetic_type(wide));
  const WindowLayerNorm view{
      elements_of(values, "x"), windows.view(),         rows, channels, shifts.view(), scales.view(), eps, outside, y.mutable_data_ptr(),
      mean.mutable_data_ptr(),  rstd.mutable_data_ptr()};
  const Pieces pieces(samples, rows, channels);
  torch_parallel()(pieces.count, [&](int64_t piece) {
    const ThreadScratch scratch(ScratchUse::positions, 4 * channels * (wide ? 8 : 4));
    window_layer_norm_loops().forward(wide, view, pieces.sample(piece), pieces.begin(piece), pieces.size(piece), scratch.data());
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> window_layer_norm_backward_cpu(const Tensor& gradient, const Tensor& x, OptionalTensor shift,
                                                                  OptionalTensor scale, const Tensor& start, int64_t width,
                                                                  OptionalTensor widths, const Tensor& mean, const Tensor& rstd,
                                                                  OptionalTensor for_mean, OptionalTensor for_rstd, bool outside,
                                                                  bool for_x, bool for_modulation) {
  check_rows(x);
  const int64_t samples = x.size(0), rows = x.size(1), channels = x.size(2);
  const SampleWindows windows(start, width, widths, samples, channels);
  const bool wide = mean.scalar_type() == ScalarType::Double;
  check_numel(gradient, x.numel(), "gradient", "x");
  const OptionalElements scales(scale, samples * channels, "scale");
  const OptionalSums means(mean, wide, samples * rows, "mean"), rstds(rstd, wide, samples * rows, "rstd");
  const OptionalSums for_means(for_mean, wide, samples * rows, "for_mean"), for_rstds(for_rstd, wide, samples * rows, "for_rstd");
  const Tensor slopes = contiguous_of(gradient), values = contiguous_of(x);
  const bool for_shift = for_modulation && shift.has_value(), for_scale = for_modulation && scale.has_value(),
             sums_wanted = for_shift || for_scale;
  const Pieces pieces(samples, rows, channels);
  Tensor dx = for_x ? empty_of_shape(x, x.scalar_type()) : empty_cpu({0}, x.scalar_type());
  Tensor dshift = for_shift ? empty_cpu({samples, channels}, shift->scalar_type()) : empty_cpu({0}, x.scalar_type());
  Tensor dscale = for_scale ? empty_cpu({samples, channels}, scale->scalar_type()) : empty_cpu({0}, x.scalar_type());
  const int64_t element = wide ? 8 : 4, stride = 2 * channels;
  Tensor sums = empty_cpu({sums_wanted ? std::max(pieces.count, samples) : 0, stride}, arithmetic_type(wide));
  auto* const all_sums = static_cast<char*>(sums.mutable_data_ptr());
  const WindowLayerNormBackward view{elements_of(slopes, "gradient"),
                                     elements_of(values, "x"),
                                     windows.view(),
                                     rows,
                                     channels,
                                     scales.view(),
                                     means.data(),
                                     rstds.data(),
                                     for_means.data(),
                                     for_rstds.data(),
                                     outside,
                                     for_x ? dx.mutable_data_ptr() : nullptr};
  torch_parallel()(pieces.count, [&](int64_t piece) {
    const ThreadScratch scratch(ScratchUse::positions, 4 * channels * element);
    window_layer_norm_loops().backward(wide, view, pieces.sample(piece), pieces.begin(piece), pieces.size(piece),
                                       sums_wanted ? all_sums + piece * stride * element : nullptr, scratch.data());
  });
  if (!sums_wanted) return {dx, dshift, dscale};
  if (pieces.each == 0) return {dx, torch::stable::zero_(dshift), torch::stable::zero_(dscale)};
  void *const to_shift = for_shift ? dshift.mutable_data_ptr() : nullptr, *const to_scale = for_scale ? dscale.mutable_data_ptr() : nullptr;
  torch_parallel()(samples, [&](int64_t sample) {
    char* const first = all_sums + sample * pieces.each * stride * element;
    const auto add_up = [&](char* from, const Tensor& like, void* to) {
      run_sums_loops().add_up(wide, from, pieces.each, stride, channels, dtype_of(like, "shift, scale"), to, sample * channels);
    };
    if (for_shift) add_up(first, dshift, to_shift);
    if (for_scale) add_up(first + channels * element, dscale, to_scale);
  });
  return {dx, dshift, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("window_layer_norm", TORCH_BOX(&window_layer_norm_cpu));
  m.impl("window_layer_norm_backward", TORCH_BOX(&window_layer_norm_backward_cpu));
}

}  // namespace taskloom
