// The tensors of a fused optimiser step as the wrappers get them: checked, contiguous, and cut into pieces that threads take.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "masked/masked_compress.h"
#include "masked/masked_step.h"

namespace taskloom {

// Nothing is written before every check has passed: make one, check_state() for each state, then run().
class StepTensors {
 public:
  StepTensors(std::vector<Tensor> params, const std::vector<Tensor>& grads, const std::vector<Tensor>& active)
      : params_(std::move(params)) {
    check_length(grads, "grads");
    check_length(active, "active");
    for (size_t i = 0; i < params_.size(); ++i) add(params_[i], grads[i], active[i]);
    count();
  }

  size_t size() const { return params_.size(); }

  // `state` holds one contiguous vector per parameter, with an element for each active entry.
  std::vector<void*> check_state(const std::vector<Tensor>& state, const char* name) {
    check_length(state, name);
    std::vector<void*> data;
    for (size_t i = 0; i < state.size(); ++i) {
      const bool wide = views_[i].dtype == DType::f64;
      check_dtype(state[i], wide ? ScalarType::Double : ScalarType::Float, name, wide ? "float64" : "float32");
      STD_TORCH_CHECK(state[i].numel() == counts_[i], name, "[", i, "]: expected ", counts_[i],
                      " elements, one for each active entry, got ", state[i].numel());
      STD_TORCH_CHECK(state[i].is_contiguous(), name, "[", i, "]: expected a contiguous tensor");
      note(state[i], true);
      data.push_back(state[i].mutable_data_ptr());
    }
    return data;
  }

  // Calls step(parameter's index, parameter, piece) for all pieces.
  template <class Step>
  void run(const Step& step) {
    check_apart();
    each_piece([&](size_t index) {
      const auto& [of, piece] = pieces_[index];
      step(of, views_[of], piece);
    });
    for (size_t i = 0; i < params_.size(); ++i) {
      if (!params_[i].is_contiguous()) torch::stable::copy_(params_[i], flat_[i]);
    }
  }

 private:
  static constexpr int64_t chunk = 1 << 18, index_chunk = 1 << 16;

  struct Span {
    uintptr_t begin, end;
    bool written;
  };

  // Threads take the next piece when they are free: pieces are as unequal as parameters, and as the density of their masks.
  template <class Body>
  void each_piece(const Body& body) const {
    std::atomic<size_t> next{0};
    torch_parallel()(static_cast<int64_t>(pieces_.size()), [&](int64_t) {
      for (size_t index = next++; index < pieces_.size(); index = next++) body(index);
    });
  }

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

  // Whether indices begin .. begin + n ascend, and follow the one before them.
  template <class Index>
  static bool ascending(const void* data, int64_t begin, int64_t n) {
    const auto* indices = static_cast<const Index*>(data);
    bool fine = true;
    for (int64_t i = std::max<int64_t>(begin, 1); i < begin + n; ++i) fine = fine & (indices[i - 1] < indices[i]);
    return fine;
  }

  template <class Index>
  static bool inside(const void* data, int64_t n, int64_t numel) {
    const auto* indices = static_cast<const Index*>(data);
    return n == 0 || (indices[0] >= 0 && indices[n - 1] < numel);
  }

  // Cuts parameters into pieces and finds the place of each piece's first entry among the active ones.
  void count() {
    for (size_t i = 0; i < params_.size(); ++i) {
      const bool indexed = views_[i].kind == ActiveKind::index32 || views_[i].kind == ActiveKind::index64;
      const int64_t n = indexed ? kept_[2 * i + 1].numel() : params_[i].numel(), step = indexed ? index_chunk : chunk;
      for (int64_t begin = 0; begin < n; begin += step) {
        const int64_t size = std::min(step, n - begin);
        pieces_.push_back({i, {begin, size, begin, size}});
      }
      counts_.push_back(views_[i].kind == ActiveKind::packed ? 0 : n);
    }
    // The number of a packed piece's active entries; of indices, whether they are in order.
    std::vector<int64_t> found(pieces_.size());
    each_piece([&](size_t index) {
      const auto& [of, piece] = pieces_[index];
      const MaskedParameter& view = views_[of];
      if (view.kind == ActiveKind::packed) {
        found[index] = masked_compress_loops().count(static_cast<const uint8_t*>(view.active), piece.begin, piece.n);
      } else if (view.kind == ActiveKind::index32) {
        found[index] = ascending<int32_t>(view.active, piece.begin, piece.n);
      } else if (view.kind == ActiveKind::index64) {
        found[index] = ascending<int64_t>(view.active, piece.begin, piece.n);
      }
    });
    std::vector<bool> fine(params_.size(), true);
    for (size_t index = 0; index < pieces_.size(); ++index) {
      auto& [of, piece] = pieces_[index];
      if (views_[of].kind == ActiveKind::packed) {
        piece.place = counts_[of];
        piece.active = found[index];
        counts_[of] += piece.active;
      } else if (views_[of].kind != ActiveKind::all) {
        fine[of] = fine[of] && found[index] != 0;
      }
    }
    for (size_t i = 0; i < params_.size(); ++i) {
      const MaskedParameter& view = views_[i];
      const int64_t numel = params_[i].numel();
      if (view.kind == ActiveKind::index32) fine[i] = fine[i] && inside<int32_t>(view.active, counts_[i], numel);
      if (view.kind == ActiveKind::index64) fine[i] = fine[i] && inside<int64_t>(view.active, counts_[i], numel);
      STD_TORCH_CHECK(fine[i], "active[", i, "]: expected ascending indices without repeats, from 0 to below ", numel);
    }
  }

  void note(const Tensor& tensor, bool written) {
    if (tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    spans_.push_back({begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size(), written});
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

  std::vector<Tensor> params_, flat_, kept_;
  std::vector<MaskedParameter> views_;
  std::vector<int64_t> counts_;
  std::vector<std::pair<size_t, MaskedPiece>> pieces_;
  std::vector<Span> spans_;
};

}  // namespace taskloom
