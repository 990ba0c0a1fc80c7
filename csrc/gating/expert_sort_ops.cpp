// expert_sort: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "common/checks.h"
#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "gating/expert_sort.h"
#include "gating/index_tensors.h"

namespace taskloom {
namespace {

using Sorted = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Sorted expert_sort_cpu(const Tensor& ids, int64_t num_experts, int64_t block) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const int64_t entries = ids.numel();
  STD_TORCH_CHECK(num_experts >= 1 && num_experts < most, "num_experts: expected 1 or more, fewer than 2^31, got ", num_experts);
  STD_TORCH_CHECK(block >= 0 && block < most, "block: expected 0 or more, fewer than 2^31, got ", block);
  const int64_t size = block == 0 ? 0 : padded_size(entries, num_experts, block);
  STD_TORCH_CHECK(entries <= most && size <= most, "ids: expected fewer than 2^31 entries, with what fills blocks up, got ", entries);
  const Tensor given = contiguous_of(ids);
  const auto made = [](torch::headeronly::IntHeaderOnlyArrayRef sizes) { return empty_cpu(sizes, ScalarType::Int); };
  Tensor order = made({entries}), inverse = made(ids.sizes()), offsets = made({num_experts + 1});
  const int64_t padded_experts = block == 0 ? 0 : num_experts + 1;
  Tensor padded_order = made({size}), padded_offsets = made({padded_experts}), block_expert = made({block == 0 ? 0 : size / block});
  const auto filled = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  const ExpertSort sort{indices_of(given, "ids"), entries, num_experts, filled(order), filled(inverse), filled(offsets)};
  const int64_t chunks = chunk_count(entries, expert_sort_chunk(num_experts));
  const ThreadScratch counts(ScratchUse::stages, chunks * num_experts * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t wrong = sort_by_expert(torch_parallel(), sort, counts.as<int32_t>());
  STD_TORCH_CHECK(wrong < 0, "ids: expected 0 to ", num_experts - 1, ", the number of an expert, got ", index_at(sort.ids, wrong),
                  " at entry ", wrong);
  if (block != 0) fill_blocks(torch_parallel(), sort, {block, size, filled(padded_order), filled(padded_offsets), filled(block_expert)});
  return {order, inverse, offsets, padded_order, padded_offsets, block_expert};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("expert_sort", TORCH_BOX(&expert_sort_cpu)); }

}  // namespace taskloom
