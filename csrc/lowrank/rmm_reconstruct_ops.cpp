// rmm_reconstruct: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/checks.h"
#include "common/thread_scratch.h"
#include "lowrank/rmm_reconstruct.h"

namespace taskloom {
namespace {

constexpr int64_t entries_per_chunk = 1 << 16;

Tensor rmm_reconstruct_cpu(const Tensor& mean, const Tensor& basis, const Tensor& coefficients) {
  STD_TORCH_CHECK(mean.dim() == 2 && basis.dim() == 3, "mean, basis: expected two and three dimensions, got ", mean.dim(), " and ",
                  basis.dim());
  const int64_t positions = mean.size(0), width = mean.size(1), rank = basis.size(1);
  check_numel(basis, positions * rank * width, "basis", "positions, directions and mean's columns");
  check_numel(coefficients, positions * rank, "coefficients", "positions and directions");
  const Tensor flat_mean = contiguous_of(mean), flat_basis = contiguous_of(basis), flat_coefficients = contiguous_of(coefficients);
  Tensor out = empty_of_shape(mean, mean.scalar_type());
  const RmmReconstruct view{
      elements_of(flat_mean, "mean"), elements_of(flat_basis, "basis"), elements_of(flat_coefficients, "coefficients"), width, rank,
      out.mutable_data_ptr()};
  const bool wide = view.mean.dtype == DType::f64 || view.basis.dtype == DType::f64 || view.coefficients.dtype == DType::f64;
  const int64_t chunk = std::max<int64_t>(1, entries_per_chunk / std::max<int64_t>(1, (rank + 2) * width));
  torch_parallel()(chunk_count(positions, chunk), [&](int64_t index) {
    const ThreadScratch scratch(ScratchUse::positions, (2 * width + rank) * (wide ? 8 : 4));
    const int64_t begin = index * chunk;
    rmm_reconstruct_loops().reconstruct(wide, view, begin, std::min(chunk, positions - begin), scratch.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("rmm_reconstruct", TORCH_BOX(&rmm_reconstruct_cpu)); }

}  // namespace taskloom
