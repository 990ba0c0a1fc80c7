// window_linear on the CPU: one product of masked rows where that is faster than products of windows, and the rows are few; else what is
// composed of torch's products. Where a product takes a millisecond, Python between its parts would take a fifth of it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "common/stable_gaps.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

// Entries of rows that are masked at a time.
constexpr int64_t tile = 1 << 20;

// First channel and width of each sample.
using SampleKeys = std::vector<std::pair<int64_t, int64_t>>;

// Rows of a large product that take as long as a product of so few: what benchmarks/bench_window_crossover.py showed.
int64_t rows_paid(int64_t rows) { return std::min({5 * rows, rows + 14, std::max<int64_t>(rows, 32)}); }

// What the products of the windows cost, one for each distinct window, and what a product of all rows does, in the same unit.
std::tuple<int64_t, int64_t> costs_of(SampleKeys keys, int64_t positions, int64_t channels) {
  std::sort(keys.begin(), keys.end());
  int64_t own = 0;
  const auto samples = static_cast<int64_t>(keys.size());
  for (int64_t first = 0, next = 0; first < samples; first = next) {
    const auto& window = keys[static_cast<size_t>(first)];
    for (next = first + 1; next < samples && keys[static_cast<size_t>(next)] == window; ++next) {
    }
    own += window.second * rows_paid((next - first) * positions);
  }
  return {own, channels * rows_paid(samples * positions)};
}

std::tuple<int64_t, int64_t> window_linear_costs(const Tensor& keys, int64_t positions, int64_t channels) {
  check_dtype(keys, ScalarType::Long, "keys", "int64");
  STD_TORCH_CHECK(keys.is_contiguous() && keys.dim() == 2 && keys.size(1) >= 2, "keys: expected a contiguous tensor [N, 2 or more]");
  SampleKeys found(static_cast<size_t>(keys.size(0)));
  const auto* entry = static_cast<const int64_t*>(keys.const_data_ptr());
  for (auto& key : found) {
    key = {entry[0], entry[1]};
    entry += keys.size(1);
  }
  return costs_of(std::move(found), positions, channels);
}

bool multiplies_own_dtype(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double) return true;
  if (x.scalar_type() != ScalarType::BFloat16) return false;
  static const bool found = [&] {
    std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("taskloom_loops::multiplies_own_dtype", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<bool>(stack[0]);
  }();
  return found;
}

// The windows of a batch; raises where one leaves the channels.
SampleKeys keys_of(const OptionalTensor& start, int64_t width, const OptionalTensor& widths, int64_t samples, int64_t channels) {
  const SampleWindows windows(start, width, widths, samples, channels);
  SampleKeys keys(static_cast<size_t>(samples));
  for (size_t n = 0; n < keys.size(); ++n) keys[n] = {windows.view().start[n], windows.view().width[n]};
  return keys;
}

// x [N, P, C] with zeros outside of the windows, whatever x holds there.
Tensor masked_rows(const Tensor& x, const SampleKeys& keys) {
  const int64_t positions = x.size(1), size = static_cast<int64_t>(x.element_size()), row = x.size(2) * size;
  Tensor masked = empty_cpu(std::array<int64_t, 2>{x.size(0) * positions, x.size(2)}, x.scalar_type());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* const to = static_cast<char*>(masked.mutable_data_ptr());
  constexpr int64_t piece = 16;
  torch_parallel()(chunk_count(masked.size(0), piece), [&](int64_t index) {
    for (int64_t r = index * piece; r < std::min((index + 1) * piece, masked.size(0)); ++r) {
      const auto& key = keys[static_cast<size_t>(r / positions)];
      const int64_t begin = key.first * size, end = begin + key.second * size;
      std::memset(to + r * row, 0, static_cast<size_t>(begin));
      std::memcpy(to + r * row + begin, from + r * row + begin, static_cast<size_t>(end - begin));
      std::memset(to + r * row + end, 0, static_cast<size_t>(row - end));
    }
  });
  return masked;
}

Tensor dense(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const SampleKeys& keys) {
  const Tensor rows = masked_rows(x, keys);
  Tensor y = empty_cpu(std::array<int64_t, 3>{x.size(0), x.size(1), weight.size(0)}, x.scalar_type());
  const Tensor out = torch::stable::view(y, std::array<int64_t, 2>{rows.size(0), weight.size(0)});
  const Tensor right = torch::stable::transpose(weight, 0, 1);
  if (bias) {
    const Tensor start = torch::stable::from_blob(bias->mutable_data_ptr(), {rows.size(0), weight.size(0)}, {0, bias->stride(0)},
                                                  bias->device(), bias->scalar_type());
    multiply_from(start, out, rows, right);
  } else {
    multiply(out, rows, right, false);
  }
  return y;
}

Tensor compose(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& start, int64_t width,
               const OptionalTensor& widths, const OptionalTensor& out_start, int64_t out_width, const OptionalTensor& out_widths) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),      from(weight),    from(bias),      from(start),     from(width),
                                    from(widths), from(out_start), from(out_width), from(out_widths)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("taskloom_loops::window_linear_composed", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor window_linear_cpu(const Tensor& x, const Tensor& weight, OptionalTensor bias, const Tensor& start, int64_t width,
                         OptionalTensor widths, OptionalTensor out_start, int64_t out_width, OptionalTensor out_widths) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(1) == x.size(2), "x, weight: expected [N, P, C] and [O, C]");
  const SampleKeys keys = keys_of(start, width, widths, x.size(0), x.size(2));
  if (out_start) keys_of(out_start, out_width, out_widths, x.size(0), weight.size(0));
  const bool few = !out_start && x.numel() > 0 && x.numel() <= tile && weight.numel() > 0;
  if (few && multiplies_own_dtype(x) && x.is_contiguous() && weight.is_contiguous()) {
    const auto [own, all] = costs_of(keys, x.size(1), x.size(2));
    if (own > all) return dense(x, weight, bias, keys);
  }
  return compose(x, weight, bias, start, width, widths, out_start, out_width, out_widths);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taskloom_loops, m) {
  m.def("window_linear_costs(Tensor keys, int positions, int channels) -> (int, int)");
  m.def("multiplies_own_dtype(Tensor x) -> bool");
  m.def(
      "window_linear_composed(Tensor x, Tensor weight, Tensor? bias, Tensor start, int width, Tensor? widths, Tensor? out_start, int "
      "out_width, Tensor? out_widths) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taskloom_loops, CPU, m) { m.impl("window_linear_costs", TORCH_BOX(&window_linear_costs)); }

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("window_linear", TORCH_BOX(&window_linear_cpu)); }

}  // namespace taskloom
