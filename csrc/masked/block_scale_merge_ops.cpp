// block_scale_merge, block_scale_merge_backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/thread_scratch.h"
#include "masked/block_scale_merge.h"
#include "masked/block_scale_merge_checks.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

// The blocks of one call: contiguous copies where needed, and their pieces, small ones in spans of about a chunk that threads take.
struct Blocks {
  struct Piece {
    int64_t block, begin, n;
  };

  std::vector<Tensor> kept;
  std::vector<Elements> deltas;
  std::vector<ScaleBlock> blocks;
  std::vector<Piece> pieces;
  std::vector<size_t> spans{0};  // where each begins among the pieces, and the end of all
  int64_t tasks = 0;

  Elements keep(const Tensor& tensor, const char* name) {
    kept.push_back(contiguous_of(tensor));
    return elements_of(kept.back(), name);
  }

  Blocks(const std::vector<Tensor>& base, const char* base_name, const std::vector<Tensor>& tasks_deltas,
         const std::vector<Tensor>& partition, int64_t groups) {
    const auto count = static_cast<int64_t>(base.size());
    tasks = check_scale_blocks(base, base_name, tasks_deltas, partition, groups);
    kept.reserve(base.size() + tasks_deltas.size() + partition.size());
    for (const Tensor& delta : tasks_deltas) deltas.push_back(keep(delta, "deltas"));
    for (int64_t b = 0; b < count; ++b) {
      const Tensor& one = base[static_cast<size_t>(b)];
      const int64_t numel = one.numel();
      ScaleBlock block{keep(one, base_name), deltas.data() + b, count, tasks, nullptr, 0, groups, nullptr, nullptr};
      if (!partition.empty()) {
        kept.push_back(contiguous_of(partition[static_cast<size_t>(b)]));
        block.partition = static_cast<const uint8_t*>(kept.back().const_data_ptr());
      }
      blocks.push_back(block);
      for (int64_t begin = 0; begin < numel; begin += chunk) pieces.push_back({b, begin, std::min(chunk, numel - begin)});
    }
    int64_t entries = 0;
    for (size_t index = 0; index < pieces.size(); ++index) {
      entries += pieces[index].n;
      if (entries < chunk && index + 1 < pieces.size()) continue;
      spans.push_back(index + 1);
      entries = 0;
    }
  }

  bool wide(int64_t b) const {
    const ScaleBlock& block = blocks[static_cast<size_t>(b)];
    bool any = block.base.dtype == DType::f64;
    for (int64_t t = 0; t < tasks; ++t) any = any || block.deltas[t * block.delta_stride].dtype == DType::f64;
    return any;
  }

  // Calls work(piece's index, piece, its block), which returns the largest group that it met.
  template <class Work>
  void run(const Work& work) const {
    std::vector<int32_t> largest(pieces.size());
    torch_parallel()(static_cast<int64_t>(spans.size()) - 1, [&](int64_t span) {
      for (size_t index = spans[static_cast<size_t>(span)]; index < spans[static_cast<size_t>(span) + 1]; ++index) {
        const Piece& piece = pieces[index];
        largest[index] = work(static_cast<int64_t>(index), piece, blocks[static_cast<size_t>(piece.block)]);
      }
    });
    for (const int32_t group : largest) {
      STD_TORCH_CHECK(group < blocks[0].groups, "partition: expected values below ", blocks[0].groups, ", got ", group);
    }
  }
};

std::vector<Tensor> block_scale_merge_cpu(std::vector<Tensor> base, std::vector<Tensor> deltas, const Tensor& coef,
                                          std::vector<Tensor> partition) {
  STD_TORCH_CHECK(coef.dim() == 3, "coef: expected three dimensions, got ", coef.dim());
  const int64_t count = coef.size(1), groups = coef.size(2);
  Blocks all(base, "base", deltas, partition, groups);
  check_scale_coef(coef, all.tasks, static_cast<int64_t>(base.size()));
  const Tensor flat = contiguous_of(coef);
  const DType dtype = dtype_of(coef, "coef");
  std::vector<float> narrow;
  std::vector<double> wide;
  for (int64_t i = 0; i < coef.numel(); ++i) {
    wide.push_back(dtype == DType::f64 ? static_cast<const double*>(flat.const_data_ptr())[i]
                                       : static_cast<double>(static_cast<const float*>(flat.const_data_ptr())[i]));
    narrow.push_back(static_cast<float>(wide.back()));
  }
  std::vector<Tensor> out;
  std::vector<char> is_wide;
  for (int64_t b = 0; b < count; ++b) {
    const Tensor& one = base[static_cast<size_t>(b)];
    out.push_back(empty_of_shape(one, one.scalar_type()));
    is_wide.push_back(dtype == DType::f64 || all.wide(b) ? 1 : 0);
    ScaleBlock& block = all.blocks[static_cast<size_t>(b)];
    block.out = out.back().mutable_data_ptr();
    block.coef = is_wide.back() ? static_cast<const void*>(wide.data() + b * groups) : narrow.data() + b * groups;
    block.coef_stride = count * groups;
  }
  all.run([&](int64_t, const Blocks::Piece& piece, const ScaleBlock& block) {
    const ThreadScratch scratch(ScratchUse::stages, scale_merge_scratch(block.tasks));
    const bool in_double = is_wide[static_cast<size_t>(piece.block)] != 0;
    return block_scale_merge_loops().merge(in_double, block, piece.begin, piece.n, scratch.data());
  });
  return out;
}

Tensor block_scale_merge_backward_cpu(std::vector<Tensor> gradients, std::vector<Tensor> deltas, std::vector<Tensor> partition,
                                      int64_t groups) {
  const Blocks all(gradients, "gradients", deltas, partition, groups);
  const int64_t count = static_cast<int64_t>(gradients.size()), size = all.tasks * groups;
  std::vector<double> parts(all.pieces.size() * static_cast<size_t>(size));
  all.run([&](int64_t index, const Blocks::Piece& piece, const ScaleBlock& block) {
    const ThreadScratch scratch(ScratchUse::stages, scale_dots_scratch(block.tasks) * static_cast<int64_t>(sizeof(double)));
    return block_scale_merge_loops().dots(block, piece.begin, piece.n, parts.data() + index * size, scratch.as<double>());
  });
  Tensor out = empty_cpu({all.tasks, count, groups}, ScalarType::Double);
  auto* sums = static_cast<double*>(out.mutable_data_ptr());
  std::fill(sums, sums + count * size, 0.0);
  for (size_t index = 0; index < all.pieces.size(); ++index) {
    for (int64_t t = 0; t < all.tasks; ++t) {
      double* to = sums + (t * count + all.pieces[index].block) * groups;
      const double* from = parts.data() + static_cast<int64_t>(index) * size + t * groups;
      for (int64_t k = 0; k < groups; ++k) to[k] += from[k];
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("block_scale_merge", TORCH_BOX(&block_scale_merge_cpu));
  m.impl("block_scale_merge_backward", TORCH_BOX(&block_scale_merge_backward_cpu));
}

}  // namespace taskloom
