// Windows out of tensors, checked; and what the wrappers of the routed norms share.
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/unaligned.h"
#include "routed/windows.h"

namespace taskloom {

using OptionalTensor = std::optional<Tensor>;

// An entry of a contiguous tensor of integers.
inline int64_t integer_at(const Tensor& tensor, int64_t place) {
  switch (tensor.scalar_type()) {
    case ScalarType::Long:
      return load_at<int64_t>(tensor.const_data_ptr(), place);
    case ScalarType::Int:
      return load_at<int32_t>(tensor.const_data_ptr(), place);
    case ScalarType::Short:
      return load_at<int16_t>(tensor.const_data_ptr(), place);
    case ScalarType::Char:
      return load_at<int8_t>(tensor.const_data_ptr(), place);
    default:
      return load_at<uint8_t>(tensor.const_data_ptr(), place);
  }
}

inline bool holds_integers(const Tensor& tensor) {
  constexpr ScalarType integers[] = {ScalarType::Long, ScalarType::Int, ScalarType::Short, ScalarType::Char, ScalarType::Byte};
  return std::find(std::begin(integers), std::end(integers), tensor.scalar_type()) != std::end(integers);
}

// One for each sample, or one for all.
inline std::vector<int64_t> integers_of(const Tensor& tensor, int64_t samples, const char* name) {
  STD_TORCH_CHECK(holds_integers(tensor), name, ": expected integers");
  const bool one = tensor.dim() == 0;
  STD_TORCH_CHECK(one || (tensor.dim() == 1 && tensor.size(0) == samples), name, ": expected shape (", samples, ",) or ()");
  const Tensor flat = contiguous_of(tensor);
  std::vector<int64_t> values(static_cast<size_t>(samples));
  for (int64_t n = 0; n < samples; ++n) values[static_cast<size_t>(n)] = integer_at(flat, one ? 0 : n);
  return values;
}

// The windows of a batch, each within the channels; where there is no start, all channels.
class SampleWindows {
 public:
  SampleWindows(const OptionalTensor& start, int64_t width, const OptionalTensor& widths, int64_t samples, int64_t channels)
      : start_(start ? integers_of(*start, samples, "start") : std::vector<int64_t>(static_cast<size_t>(samples), 0)) {
    width_ = !start   ? std::vector<int64_t>(static_cast<size_t>(samples), channels)
             : widths ? integers_of(*widths, samples, "width")
                      : std::vector<int64_t>(static_cast<size_t>(samples), width);
    for (size_t n = 0; n < start_.size(); ++n) {
      STD_TORCH_CHECK(start_[n] >= 0 && width_[n] >= 0 && width_[n] <= channels && start_[n] <= channels - width_[n],
                      "start: expected windows within ", channels, " channels, got start ", start_[n], " and width ", width_[n],
                      " for sample ", n);
    }
  }

  Windows view() const { return {start_.data(), width_.data()}; }

 private:
  std::vector<int64_t> start_, width_;
};

inline bool is_double(const OptionalTensor& tensor) { return tensor && tensor->scalar_type() == ScalarType::Double; }

inline ScalarType arithmetic_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

// An optional tensor's entries next to each other, kept while this lives.
class OptionalElements {
 public:
  OptionalElements(const OptionalTensor& tensor, int64_t numel, const char* name) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->numel() == numel, name, ": expected ", numel, " entries, got ", tensor->numel());
    kept_ = contiguous_of(*tensor);
    view_ = elements_of(*kept_, name);
  }

  const Elements& view() const { return view_; }
  const void* data() const { return view_.data; }

 private:
  OptionalTensor kept_;
  Elements view_;
};

// An optional tensor of accumulators.
class OptionalSums : public OptionalElements {
 public:
  OptionalSums(const OptionalTensor& tensor, bool wide, int64_t numel, const char* name) : OptionalElements(tensor, numel, name) {
    STD_TORCH_CHECK(!tensor || tensor->scalar_type() == arithmetic_type(wide), name, ": expected the dtype of the arithmetic");
  }
};

}  // namespace taskloom
