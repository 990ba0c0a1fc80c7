// expert_combine and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "gating/expert_combine.h"
#include "gating/index_tensors.h"

namespace taskloom {
namespace {

constexpr int64_t entries_per_piece = 1 << 16;

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// One call's tensors, contiguous and checked.
struct Given {
  int64_t slots, tokens, width;
  Tensor y, weight, inverse;
  bool wide;

  Given(const Tensor& rows, const Tensor& weights, const Tensor& places)
      : slots(weights.dim() > 0 ? weights.size(-1) : 0),
        tokens(tokens_of(weights)),
        width(width_of(rows, weights)),
        y(contiguous_of(rows)),
        weight(contiguous_of(weights)),
        inverse(contiguous_of(places)),
        wide(is_wide(rows) || is_wide(weights)) {
    check_numel(inverse, weights.numel(), "inverse", "weight");
    check_inside(indices_of(inverse, "inverse"), inverse.numel(), 0, y.size(0), "inverse", "a row of y");
  }

  static int64_t tokens_of(const Tensor& weights) {
    STD_TORCH_CHECK(weights.dim() > 0, "weight: expected at least one dimension, got none");
    int64_t tokens = 1;
    for (int64_t dim = 0; dim + 1 < weights.dim(); ++dim) tokens *= weights.size(dim);
    return tokens;
  }

  static int64_t width_of(const Tensor& rows, const Tensor& weights) {
    STD_TORCH_CHECK(rows.dim() == 2, "y: expected two dimensions, got ", rows.dim());
    STD_TORCH_CHECK(rows.size(0) == weights.numel(), "y: expected ", weights.numel(), " rows, one for each entry of weight, got ",
                    rows.size(0));
    return rows.size(1);
  }

  // The shape of the result.
  std::vector<int64_t> sizes() const {
    std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
    sizes.back() = width;
    return sizes;
  }

  ExpertCombine view(void* out) const {
    return {elements_of(y, "y"), elements_of(weight, "weight"), indices_of(inverse, "inverse"), y.size(0), slots, width, out};
  }

  int64_t tokens_per_piece() const { return std::clamp<int64_t>(entries_per_piece / std::max<int64_t>(1, slots * width), 1, 1024); }

  // Calls body(begin, end) for pieces of the tokens.
  template <class F>
  void over_pieces(const F& body) const {
    const int64_t step = tokens_per_piece();
    torch_parallel()(chunk_count(tokens, step), [&](int64_t piece) { body(piece * step, std::min(piece * step + step, tokens)); });
  }
};

// Every row has to be named once: one that is not would have no gradient.
void check_once(const Indices& inverse, int64_t rows) {
  std::vector<bool> named(static_cast<size_t>(rows), false);
  for (int64_t entry = 0; entry < rows; ++entry) {
    const auto row = static_cast<size_t>(index_at(inverse, entry));
    STD_TORCH_CHECK(!named[row], "inverse: expected each row of y once, got ", static_cast<int64_t>(row), " again at entry ", entry);
    named[row] = true;
  }
}

Tensor expert_combine_cpu(const Tensor& y, const Tensor& weight, const Tensor& inverse) {
  const Given given(y, weight, inverse);
  Tensor out = empty_cpu(given.sizes(), y.scalar_type());
  const ExpertCombine view = given.view(out.mutable_data_ptr());
  const int64_t accumulators = (expert_combine_rows + 1) * expert_combine_block + given.slots;
  given.over_pieces([&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(ScratchUse::positions, accumulators * (given.wide ? 8 : 4));
    expert_combine_loops().forward(given.wide, view, begin, end, scratch.data());
  });
  return out;
}

std::tuple<Tensor, Tensor> expert_combine_backward_cpu(const Tensor& gradient, const Tensor& y, const Tensor& weight, const Tensor& inverse,
                                                       bool for_y, bool for_weight) {
  const Given given(y, weight, inverse);
  check_numel(gradient, given.tokens * given.width, "gradient", "the result");
  const Tensor slopes = contiguous_of(gradient);
  Tensor dy = for_y ? empty_of_shape(y, y.scalar_type()) : empty_cpu({0}, y.scalar_type());
  Tensor dweight = for_weight ? empty_of_shape(weight, weight.scalar_type()) : empty_cpu({0}, weight.scalar_type());
  const ExpertCombineBackward view{given.view(nullptr), elements_of(slopes, "gradient"), for_y ? dy.mutable_data_ptr() : nullptr,
                                   for_weight ? dweight.mutable_data_ptr() : nullptr};
  if (for_y) check_once(view.forward.inverse, y.size(0));
  const int64_t accumulators = (expert_dot_rows + 2) * expert_combine_block + given.slots;
  given.over_pieces([&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(ScratchUse::positions, accumulators * (given.wide ? 8 : 4) + given.slots * 8);
    expert_combine_loops().backward(given.wide, view, begin, end, scratch.data());
  });
  return {dy, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("expert_combine", TORCH_BOX(&expert_combine_cpu));
  m.impl("expert_combine_backward", TORCH_BOX(&expert_combine_backward_cpu));
}

}  // namespace taskloom
