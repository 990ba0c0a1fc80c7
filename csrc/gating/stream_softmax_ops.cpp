// stream_softmax_mix: its stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/checks.h"
#include "common/thread_scratch.h"
#include "gating/stream_softmax.h"

namespace taskloom {
namespace {

constexpr int64_t pieces_at_once = 64;

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

std::tuple<Tensor, Tensor> stream_softmax_mix_cpu(const Tensor& x, const Tensor& y, const Tensor& experts, double sigma) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "x: expected shape [B, K, D] with D of at least 1");
  STD_TORCH_CHECK(experts.dim() == 2 && experts.size(0) > 0 && experts.size(1) == x.size(2),
                  "experts: expected shape [M, D] with at least one expert of x's D");
  STD_TORCH_CHECK(sigma > 0, "sigma: expected a number above 0, got ", sigma);
  const int64_t batch = x.size(0), pairs = x.size(1), dims = x.size(2), count = experts.size(0);
  check_numel(y, batch * pairs, "y", "x's sequences and pairs");
  const bool wide = is_wide(x) || is_wide(y) || is_wide(experts);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor pred = empty_cpu({batch, pairs}, dtype), lse = empty_cpu({batch, pairs}, dtype);
  if (batch * pairs == 0) return {pred, lse};
  const Tensor inputs = contiguous_of(x), targets = contiguous_of(y), pool = contiguous_of(experts);
  const StreamSoftmax view{
      elements_of(inputs, "x"), elements_of(targets, "y"), elements_of(pool, "experts"), batch, pairs, dims, count, sigma};
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("stream_softmax_mix", TORCH_BOX(&stream_softmax_mix_cpu)); }

}  // namespace taskloom
