// rmm_fit: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/checks.h"
#include "common/thread_scratch.h"
#include "lowrank/rmm_fit.h"

namespace taskloom {
namespace {

std::tuple<Tensor, Tensor, Tensor> rmm_fit_cpu(const Tensor& vectors, int64_t rank, bool center) {
  STD_TORCH_CHECK(vectors.dim() == 3, "vectors: expected three dimensions, got ", vectors.dim());
  const int64_t tasks = vectors.size(0), positions = vectors.size(1), width = vectors.size(2);
  STD_TORCH_CHECK(rank >= 1 && rank <= std::min(tasks, width), "rank: expected 1 to ", std::min(tasks, width), ", got ", rank);
  const Tensor flat = contiguous_of(vectors);
  const ScalarType dtype = vectors.scalar_type();
  Tensor mean = empty_cpu({positions, width}, dtype), basis = empty_cpu({positions, rank, width}, dtype);
  Tensor coefficients = empty_cpu({tasks, positions, rank}, dtype);
  const RmmFit view{
      elements_of(flat, "vectors"),   tasks, positions, width, rank, center, mean.mutable_data_ptr(), basis.mutable_data_ptr(),
      coefficients.mutable_data_ptr()};
  torch_parallel()(chunk_count(positions, fit_lanes), [&](int64_t index) {
    const int64_t first = index * fit_lanes;
    const ThreadScratch scratch(ScratchUse::positions, rmm_fit_loops().scratch(view));
    rmm_fit_loops().fit(view, first, std::min(fit_lanes, positions - first), scratch.data());
  });
  return {mean, basis, coefficients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("rmm_fit", TORCH_BOX(&rmm_fit_cpu)); }

}  // namespace taskloom
