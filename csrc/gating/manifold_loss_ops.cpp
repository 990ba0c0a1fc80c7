// manifold_loss and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/checks.h"
#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "gating/index_tensors.h"
#include "gating/manifold_loss.h"

namespace taskloom {
namespace {

constexpr int64_t entries_per_piece = 1 << 16;

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// One call's tensors, contiguous and checked.
struct Given {
  int64_t rows, width, neighbours;
  Tensor r, reference, ids, weight;
  bool wide;

  Given(const Tensor& vectors, const Tensor& known, const Tensor& chosen, const Tensor& weights)
      : rows(sizes_of(vectors, known, chosen)),
        width(vectors.size(1)),
        neighbours(chosen.size(1)),
        r(contiguous_of(vectors)),
        reference(contiguous_of(known)),
        ids(contiguous_of(chosen)),
        weight(contiguous_of(weights)),
        wide(is_wide(vectors) || is_wide(known) || is_wide(weights)) {
    check_numel(weight, ids.numel(), "weight", "ids");
    check_inside(indices_of(ids, "ids"), ids.numel(), -1, reference.size(0), "ids", "a row of reference or -1 for none");
  }

  static int64_t sizes_of(const Tensor& vectors, const Tensor& known, const Tensor& chosen) {
    STD_TORCH_CHECK(vectors.dim() == 2 && known.dim() == 2 && chosen.dim() == 2, "r, reference, ids: expected two dimensions each, got ",
                    vectors.dim(), ", ", known.dim(), " and ", chosen.dim());
    STD_TORCH_CHECK(known.size(1) == vectors.size(1), "reference: expected rows of ", vectors.size(1), " entries as r, got ",
                    known.size(1));
    STD_TORCH_CHECK(chosen.size(0) == vectors.size(0), "ids: expected ", vectors.size(0), " rows as r, got ", chosen.size(0));
    return vectors.size(0);
  }

  ManifoldLoss view() const {
    return {elements_of(r, "r"),
            elements_of(reference, "reference"),
            indices_of(ids, "ids"),
            elements_of(weight, "weight"),
            reference.size(0),
            neighbours,
            width};
  }

  // Calls body(begin, end) for pieces of the rows.
  template <class F>
  void over_pieces(const F& body) const {
    const int64_t step = std::clamp<int64_t>(entries_per_piece / std::max<int64_t>(1, (neighbours + 1) * width), 1, 1024);
    torch_parallel()(chunk_count(rows, step), [&](int64_t piece) { body(piece * step, std::min(piece * step + step, rows)); });
  }
};

Tensor manifold_loss_cpu(const Tensor& r, const Tensor& reference, const Tensor& ids, const Tensor& weight) {
  const Given given(r, reference, ids, weight);
  Tensor loss = empty_cpu({given.rows}, given.wide ? ScalarType::Double : ScalarType::Float);
  const ManifoldLoss view = given.view();
  void* const to = loss.mutable_data_ptr();
  const int64_t accumulators = 2 * manifold_block + given.neighbours;
  given.over_pieces([&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(ScratchUse::positions, accumulators * (given.wide ? 8 : 4) + given.neighbours * 8);
    manifold_loss_loops().forward(given.wide, view, begin, end, to, scratch.data());
  });
  return loss;
}

Tensor manifold_loss_backward_cpu(const Tensor& gradient, const Tensor& r, const Tensor& reference, const Tensor& ids,
                                  const Tensor& weight) {
  const Given given(r, reference, ids, weight);
  check_numel(gradient, given.rows, "gradient", "the rows of r");
  const Tensor slopes = contiguous_of(gradient);
  Tensor dr = empty_of_shape(r, r.scalar_type());
  const ManifoldLoss view = given.view();
  const Elements slope = elements_of(slopes, "gradient");
  void* const to = dr.mutable_data_ptr();
  const int64_t accumulators = 3 * manifold_block + given.neighbours;
  given.over_pieces([&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(ScratchUse::positions, accumulators * (given.wide ? 8 : 4));
    manifold_loss_loops().backward(given.wide, view, slope, begin, end, to, scratch.data());
  });
  return dr;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("manifold_loss", TORCH_BOX(&manifold_loss_cpu));
  m.impl("manifold_loss_backward", TORCH_BOX(&manifold_loss_backward_cpu));
}

}  // namespace taskloom
