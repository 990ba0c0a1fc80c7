// stream_softmax_mix: its stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/checks.h"
#include "common/thread_scratch.h"
#include "gating/stream_softmax.h"

namespace taskloom {
namespace {

std::tuple<Tensor, Tensor> stream_softmax_mix_cpu(const Tensor& x, const Tensor& y, const Tensor& experts, double sigma) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "x: expected shape [B, K, D] with D of at least 1");
  STD_TORCH_CHECK(experts.dim() == 2 && experts.size(0) > 0 && experts.size(1) == x.size(2),
                  "experts: expected shape [M, D] with at least one expert of x's D");
  STD_TORCH_CHECK(sigma > 0, "sigma: expected a number above 0, got ", sigma);
  const int64_t batch = x.size(0), pairs = x.size(1), dims = x.size(2), count = experts.size(0);
  check_numel(y, batch * pairs, "y", "x's sequences and pairs");
  const bool wide = std::max({x.scalar_type(), y.scalar_type(), experts.scalar_type()}, [](ScalarType a, ScalarType b) {
                      return (a == ScalarType::Double) < (b == ScalarType::Double);
                    }) == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor pred = empty_cpu({batch, pairs}, dtype), lse = empty_cpu({batch, pairs}, dtype);
  if (batch * pairs == 0) return {pred, lse};
  const Tensor inputs = contiguous_of(x), targets = contiguous_of(y), pool = contiguous_of(experts);
  const StreamSoftmax view{
      elements_of(inputs, "x"), elements_of(targets, "y"), elements_of(pool, "experts"), batch, pairs, dims, count, sigma};
  const int64_t chunks = chunk_count(count, stream_chunk), groups = chunk_count(batch, stream_sequences);
  Tensor partials = empty_cpu({3, chunks, batch, pairs}, dtype);
  const int64_t part = chunks * batch * pairs * (wide ? 8 : 4);
  char* const data = static_cast<char*>(partials.mutable_data_ptr());
  const StreamPartial partial{data, data + part, data + 2 * part};
  torch_parallel()(groups * chunks, [&](int64_t piece) {
    const int64_t begin = piece / chunks * stream_sequences, n = std::min(stream_sequences, batch - begin);
    const ThreadScratch scratch(ScratchUse::positions, stream_scratch(pairs, dims) * (wide ? 8 : 4));
    stream_softmax_loops().partial(wide, view, partial, piece % chunks, begin, n, scratch.data());
  });
  stream_softmax_loops().combine(wide, partial, chunks, batch * pairs, 0, batch * pairs, pred.mutable_data_ptr(), lse.mutable_data_ptr());
  return {pred, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("stream_softmax_mix", TORCH_BOX(&stream_softmax_mix_cpu)); }

}  // namespace taskloom
