// CPU loops of multi_task_vector, compiled once per CPU level.
#include "common/convert.h"
#include "masked/multi_task_vector.h"

namespace taskloom {
namespace {

constexpr int64_t block = 512;

template <class Acc>
void sum_of(const MultiTaskVector& view, int64_t begin, int64_t n, Acc* out) {
  alignas(64) Acc base[block], tuned[block];
  for (int64_t done = 0; done < n; done += block) {
    const int64_t size = n - done < block ? n - done : block;
    Acc* __restrict__ sum = out + begin + done;
    load_block(view.base.dtype, view.base.data, begin + done, size, base);
    for (int64_t i = 0; i < size; ++i) sum[i] = Acc{0};
    for (int64_t t = 0; t < view.tasks; ++t) {
      const Acc weight = static_cast<Acc>(view.weight[t]);
      load_block(view.tuned[t].dtype, view.tuned[t].data, begin + done, size, tuned);
      for (int64_t i = 0; i < size; ++i) {
        const Acc product = weight * (tuned[i] - base[i]);
        sum[i] += product;
      }
    }
  }
}

void sum(bool wide, const MultiTaskVector& view, int64_t begin, int64_t n, void* out) {
  if (wide) {
    sum_of(view, begin, n, static_cast<double*>(out));
  } else {
    sum_of(view, begin, n, static_cast<float*>(out));
  }
}

const MultiTaskVectorLoops table = {sum};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MultiTaskVectorLoops, multi_task_vector_loops, table)

}  // namespace taskloom
