// stream_softmax_mix and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/checks.h"
#include "common/thread_scratch.h"
#include "gating/stream_softmax.h"
#include "routed/run_sums.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

constexpr int64_t pieces_at_once = 64;

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// One call's tensors, contiguous.
struct Given {
  Tensor x, y, experts;
  int64_t batch, pairs, dims, count;
  bool wide;
  double sigma;

  Given(const Tensor& inputs, const Tensor& targets, const Tensor& pool, double deviation)
      : x(contiguous_of(inputs)), y(contiguous_of(targets)), experts(contiguous_of(pool)), sigma(deviation) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "x: expected shape [B, K, D] with D of at least 1");
    STD_TORCH_CHECK(experts.dim() == 2 && experts.size(0) > 0 && experts.size(1) == x.size(2),
                    "experts: expected shape [M, D] with at least one expert of x's D");
    STD_TORCH_CHECK(sigma > 0, "sigma: expected a number above 0, got ", sigma);
    batch = x.size(0);
    pairs = x.size(1);
    dims = x.size(2);
    count = experts.size(0);
    check_numel(y, batch * pairs, "y", "x's sequences and pairs");
    wide = is_wide(x) || is_wide(y) || is_wide(experts);
  }

  StreamSoftmax view() const {
    return {elements_of(x, "x"), elements_of(y, "y"), elements_of(experts, "experts"), batch, pairs, dims, count, sigma};
  }
};

std::tuple<Tensor, Tensor> stream_softmax_mix_cpu(const Tensor& x, const Tensor& y, const Tensor& experts, double sigma) {
  const Given given(x, y, experts, sigma);
  const int64_t batch = given.batch, pairs = given.pairs, dims = given.dims, count = given.count;
  const bool wide = given.wide;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor pred = empty_cpu({batch, pairs}, dtype), lse = empty_cpu({batch, pairs}, dtype);
  if (batch * pairs == 0) return {pred, lse};
  const StreamSoftmax view = given.view();
  const int64_t chunks = chunk_count(count, stream_chunk), groups = chunk_count(batch, stream_sequences), entries = batch * pairs;
  // Chunks are worked on in waves, so that memory does not grow with their number; the results do not depend on how many a wave has.
  const int64_t wave = std::clamp<int64_t>(pieces_at_once / groups, 1, chunks);
  Tensor partials = empty_cpu({3, wave + 1, batch, pairs}, dtype);
  const int64_t part = (wave + 1) * entries * (wide ? 8 : 4);
  char* const data = static_cast<char*>(partials.mutable_data_ptr());
  const StreamPartial partial{data, data + part, data + 2 * part};
  for (int64_t first = 0; first < chunks; first += wave) {
    const int64_t together = std::min(wave, chunks - first);
    torch_parallel()(groups * together, [&](int64_t piece) {
      const int64_t begin = piece / together * stream_sequences, n = std::min(stream_sequences, batch - begin), slot = piece % together;
      const ThreadScratch scratch(ScratchUse::positions, stream_scratch(pairs, dims) * (wide ? 8 : 4));
      stream_softmax_loops().partial(wide, view, partial, 1 + slot, first + slot, begin, n, scratch.data());
    });
    stream_softmax_loops().fold(wide, partial, first == 0, together, entries);
  }
  stream_softmax_loops().finish(wide, partial, entries, pred.mutable_data_ptr(), lse.mutable_data_ptr());
  return {pred, lse};
}

std::tuple<Tensor, Tensor, Tensor> stream_softmax_mix_backward_cpu(OptionalTensor for_pred, OptionalTensor for_lse, const Tensor& x,
                                                                   const Tensor& y, const Tensor& experts, const Tensor& pred,
                                                                   const Tensor& lse, double sigma, bool for_x, bool for_y,
                                                                   bool for_experts) {
  const Given given(x, y, experts, sigma);
  const int64_t entries = given.batch * given.pairs;
  const OptionalSums by_pred(for_pred, given.wide, entries, "for_pred"), by_lse(for_lse, given.wide, entries, "for_lse");
  const OptionalSums predicted(pred, given.wide, entries, "pred"), logarithms(lse, given.wide, entries, "lse");
  const auto made = [](bool wanted, const Tensor& like) {
    return wanted ? empty_of_shape(like, like.scalar_type()) : empty_cpu({0}, like.scalar_type());
  };
  Tensor dx = made(for_x, x), dy = made(for_y, y), dexperts = made(for_experts, experts);
  if (entries == 0) return {dx, dy, torch::stable::zero_(dexperts)};
  const StreamParts parts(given.count, given.dims);
  Tensor to_x = empty_cpu({for_x ? parts.count : 0, entries, given.dims}, arithmetic_type(given.wide));
  Tensor to_y = empty_cpu({for_y ? parts.count : 0, entries}, arithmetic_type(given.wide));
  const StreamBackward view{given.view(),
                            by_pred.data(),
                            by_lse.data(),
                            predicted.data(),
                            logarithms.data(),
                            for_x ? to_x.mutable_data_ptr() : nullptr,
                            for_y ? to_y.mutable_data_ptr() : nullptr,
                            for_experts ? dexperts.mutable_data_ptr() : nullptr};
  torch_parallel()(parts.count, [&](int64_t part) {
    const ThreadScratch scratch(ScratchUse::positions, parts.scratch(given.pairs, given.dims) * (given.wide ? 8 : 4));
    stream_softmax_backward_loops().part(given.wide, view, parts, part, scratch.data());
  });
  const auto add_up = [&](Tensor& sums, int64_t numel, Tensor& to, const char* name) {
    run_sums_loops().add_up(given.wide, sums.mutable_data_ptr(), parts.count, numel, numel, dtype_of(to, name), to.mutable_data_ptr(), 0);
  };
  if (for_x) add_up(to_x, entries * given.dims, dx, "x");
  if (for_y) add_up(to_y, entries, dy, "y");
  return {dx, dy, dexperts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("stream_softmax_mix", TORCH_BOX(&stream_softmax_mix_cpu));
  m.impl("stream_softmax_mix_backward", TORCH_BOX(&stream_softmax_mix_backward_cpu));
}

}  // namespace taskloom
