// The tensors of a fused optimiser step as its wrappers get them, on any device: checked as far as their values need not be read, and
// contiguous.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "masked/masked_step.h"

namespace taskloom {

// Make one, note_state() for each state, then check_apart(): nothing is to be written before.
class StepArguments {
 public:
  StepArguments(std::vector<Tensor> params, const std::vector<Tensor>& grads, const std::vector<Tensor>& active)
      : params_(std::move(params)) {
    check_length(grads, "grads");
    check_length(active, "active");
    for (size_t i = 0; i < params_.size(); ++i) add(params_[i], grads[i], active[i]);
  }

  size_t size() const { return params_.size(); }

 protected:
  // The number of a parameter's active entries, where its kind tells; else -1.
  int64_t known_count(size_t index) const {
    switch (views_[index].kind) {
      case ActiveKind::all:
        return params_[index].numel();
      case ActiveKind::packed:
        return -1;
      default:
        return kept_[2 * index + 1].numel();
    }
  }

  // `state` holds one contiguous vector per parameter, with an element for each of counts[i] active entries (-1: not known here).
  std::vector<void*> note_state(const std::vector<Tensor>& state, const char* name, const std::vector<int64_t>& counts) {
    check_length(state, name);
    std::vector<void*> data;
    for (size_t i = 0; i < state.size(); ++i) {
      const bool wide = views_[i].dtype == DType::f64;
      check_dtype(state[i], wide ? ScalarType::Double : ScalarType::Float, name, wide ? "float64" : "float32");
      STD_TORCH_CHECK(counts[i] < 0 || state[i].numel() == counts[i], name, "[", i, "]: expected ", counts[i],
                      " elements, one for each active entry, got ", state[i].numel());
      STD_TORCH_CHECK(state[i].is_contiguous(), name, "[", i, "]: expected a contiguous tensor");
      note(state[i], true);
      data.push_back(state[i].mutable_data_ptr());
    }
    return data;
  }

  void check_apart() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    uintptr_t any = 0, written = 0;
    for (const Span& span : spans_) {
      STD_TORCH_CHECK(span.begin >= (span.written ? any : written), "params and state must not share memory with another argument");
      any = std::max(any, span.end);
      if (span.written) written = std::max(written, span.end);
    }
  }

  // Where a parameter is not contiguous, what was changed is a copy of it.
  void put_back() {
    for (size_t i = 0; i < params_.size(); ++i) {
      if (!params_[i].is_contiguous()) torch::stable::copy_(params_[i], flat_[i]);
    }
  }

  std::vector<Tensor> params_, flat_;
  std::vector<Tensor> kept_;  // a gradient, then active entries, for each parameter
  std::vector<MaskedParameter> views_;

 private:
  struct Span {
    uintptr_t begin, end;
    bool written;
  };

  void check_length(const std::vector<Tensor>& list, const char* name) const {
    STD_TORCH_CHECK(list.size() == params_.size(), name, ": expected ", params_.size(), " tensors as in params, got ", list.size());
  }

  Tensor& keep(const Tensor& tensor) {
    kept_.push_back(contiguous_of(tensor));
    return kept_.back();
  }

  void add(const Tensor& param, const Tensor& grad, const Tensor& active) {
    const DType dtype = dtype_of(param, "params");
    STD_TORCH_CHECK(dtype_of(grad, "grads") == dtype, "grads: expected the dtype of its parameter");
    check_numel(grad, param.numel(), "grads", "params");
    note(param, true);
    note(grad, false);
    note(active, false);
    flat_.push_back(contiguous_of(param));
    const ActiveKind kind = kind_of(active, param.numel());
    const void* gradient = keep(grad).const_data_ptr();
    const void* entries = keep(active).const_data_ptr();
    views_.push_back({flat_.back().mutable_data_ptr(), gradient, dtype, kind, entries});
  }

  static ActiveKind kind_of(const Tensor& active, int64_t numel) {
    switch (active.scalar_type()) {
      case ScalarType::Bool:
        STD_TORCH_CHECK(active.numel() == 0, "active: expected an empty bool tensor (all entries), packed bits or indices");
        return ActiveKind::all;
      case ScalarType::Byte:
        check_packed(active, numel, "active");
        return ActiveKind::packed;
      case ScalarType::Int:
        return ActiveKind::index32;
      case ScalarType::Long:
        return ActiveKind::index64;
      default:
        STD_TORCH_CHECK(false, "active: expected packed uint8, int32 or int64 indices, got ScalarType ",
                        static_cast<int>(active.scalar_type()));
    }
    return ActiveKind::all;
  }

  void note(const Tensor& tensor, bool written) {
    if (tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    spans_.push_back({begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size(), written});
  }

  std::vector<Span> spans_;
};

}  // namespace taskloom
