// CPU loops of rmm_reconstruct, compiled once per CPU level.
#include "common/convert.h"
#include "lowrank/rmm_reconstruct.h"

namespace taskloom {
namespace {

template <class Acc>
void reconstruct_as(const RmmReconstruct& view, int64_t begin, int64_t n, Acc* scratch) {
  const int64_t width = view.width, rank = view.rank;
  Acc* __restrict__ const sum = scratch;
  Acc* __restrict__ const direction = sum + width;
  Acc* const coefficients = direction + width;
  for (int64_t q = begin; q < begin + n; ++q) {
    load_block(view.coefficients.dtype, view.coefficients.data, q * rank, rank, coefficients);
    for (int64_t j = 0; j < width; ++j) sum[j] = Acc{0};
    for (int64_t k = 0; k < rank; ++k) {
      const Acc coefficient = coefficients[k];
      load_block(view.basis.dtype, view.basis.data, (q * rank + k) * width, width, direction);
      for (int64_t j = 0; j < width; ++j) {
        const Acc product = coefficient * direction[j];
        sum[j] += product;
      }
    }
    load_block(view.mean.dtype, view.mean.data, q * width, width, direction);
    for (int64_t j = 0; j < width; ++j) sum[j] = direction[j] + sum[j];
    store_block(view.mean.dtype, sum, width, view.out, q * width);
  }
}

void reconstruct(bool wide, const RmmReconstruct& view, int64_t begin, int64_t n, void* scratch) {
  if (wide) {
    reconstruct_as(view, begin, n, static_cast<double*>(scratch));
  } else {
    reconstruct_as(view, begin, n, static_cast<float*>(scratch));
  }
}

const RmmReconstructLoops table = {reconstruct};

}  // namespace

TASKLOOM_EXPORT_LOOPS(RmmReconstructLoops, rmm_reconstruct_loops, table)

}  // namespace taskloom
