// The tensors of a fused optimiser step on the CPU: checked, their active entries counted, and cut into pieces that threads take.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "masked/masked_compress.h"
#include "masked/masked_step_arguments.h"

namespace taskloom {

// Nothing is written before every check has passed: make one, check_state() for each state, then run().
class StepTensors : public StepArguments {
 public:
  StepTensors(std::vector<Tensor> params, const std::vector<Tensor>& grads, const std::vector<Tensor>& active)
      : StepArguments(std::move(params), grads, active) {
    count();
  }

  std::vector<void*> check_state(const std::vector<Tensor>& state, const char* name) { return note_state(state, name, counts_); }

  // Calls step(parameter's index, parameter, piece) for all pieces.
  template <class Step>
  void run(const Step& step) {
    check_apart();
    each_piece([&](size_t index) {
      const auto& [of, piece] = pieces_[index];
      step(of, views_[of], piece);
    });
    put_back();
  }

 private:
  static constexpr int64_t chunk = 1 << 18, index_chunk = 1 << 16;

  // Threads take the next piece when they are free: pieces are as unequal as parameters, and as the density of their masks.
  template <class Body>
  void each_piece(const Body& body) const {
    std::atomic<size_t> next{0};
    torch_parallel()(static_cast<int64_t>(pieces_.size()), [&](int64_t) {
      for (size_t index = next++; index < pieces_.size(); index = next++) body(index);
    });
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

  std::vector<int64_t> counts_;
  std::vector<std::pair<size_t, MaskedPiece>> pieces_;
};

}  // namespace taskloom
