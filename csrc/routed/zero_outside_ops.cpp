// Zeros outside of windows, in place, as an op of no public name: what dense layers of masked samples are made with.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/checks.h"

namespace taskloom {
namespace {

// Bytes that one piece of work goes over at least.
constexpr int64_t piece_bytes = 1 << 16;

// values [N, P, C, ...]: each row [C, ...] keeps channels windows[n, 0] to windows[n, 0] + windows[n, 1] - 1. Bytes are written, not
// multiplied: no NaN outside of a window stays.
void zero_outside(Tensor values, const Tensor& windows) {
  STD_TORCH_CHECK(values.is_contiguous() && values.dim() >= 3, "values: expected a contiguous tensor [N, P, C, ...]");
  check_dtype(windows, ScalarType::Long, "windows", "int64");
  const int64_t samples = values.size(0), positions = values.size(1), channels = values.size(2);
  STD_TORCH_CHECK(windows.is_contiguous() && windows.dim() == 2 && windows.size(0) == samples && windows.size(1) >= 2,
                  "windows: expected a contiguous tensor [", samples, ", 2 or more]");
  if (values.numel() == 0) return;
  const auto* window = static_cast<const int64_t*>(windows.const_data_ptr());
  const int64_t columns = windows.size(1);
  for (int64_t n = 0; n < samples; ++n) {
    const int64_t start = window[n * columns], width = window[n * columns + 1];
    STD_TORCH_CHECK(start >= 0 && width >= 0 && width <= channels && start <= channels - width, "windows: expected those within ", channels,
                    " channels");
  }
  const int64_t rows = samples * positions;
  const int64_t channel = values.numel() / rows / channels * static_cast<int64_t>(values.element_size()), row = channels * channel;
  auto* const data = static_cast<char*>(values.mutable_data_ptr());
  const int64_t piece = std::max<int64_t>(piece_bytes / row, 1);
  torch_parallel()(chunk_count(rows, piece), [&](int64_t index) {
    for (int64_t r = index * piece; r < std::min((index + 1) * piece, rows); ++r) {
      const int64_t* const one = window + r / positions * columns;
      const int64_t begin = one[0] * channel, end = begin + one[1] * channel;
      std::memset(data + r * row, 0, static_cast<size_t>(begin));
      std::memset(data + r * row + end, 0, static_cast<size_t>(row - end));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taskloom_loops, m) { m.def("zero_outside(Tensor(a!) values, Tensor windows) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(taskloom_loops, CPU, m) { m.impl("zero_outside", TORCH_BOX(&zero_outside)); }

}  // namespace taskloom
