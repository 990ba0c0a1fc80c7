// CPU loops of task_mask, compiled once per CPU level.
#include "common/convert.h"
#include "masked/mask_words.h"
#include "masked/task_mask.h"

namespace taskloom {
namespace {

template <class Acc>
inline Acc magnitude(Acc value) {
  return value < 0 ? -value : value;
}

template <class Acc>
void mask_of(const TaskMask& task, int64_t begin, int64_t n, uint8_t* packed) {
  alignas(64) Acc base[mask_block], tuned[mask_block], sum[mask_block];
  alignas(64) uint8_t flags[mask_block];
  uint64_t words[mask_block_words];
  const Acc lambda = static_cast<Acc>(task.lambda);
  for (int64_t done = 0; done < n; done += mask_block) {
    const int64_t size = n - done < mask_block ? n - done : mask_block;
    load_block(task.base.dtype, task.base.data, begin + done, size, base);
    load_block(task.tuned.dtype, task.tuned.data, begin + done, size, tuned);
    load_block(task.multi_task_vector.dtype, task.multi_task_vector.data, begin + done, size, sum);
    for (int64_t i = 0; i < size; ++i) {
      const Acc delta = tuned[i] - base[i];
      const Acc rest = sum[i] - delta;
      const Acc bound = lambda * magnitude(rest);
      flags[i] = magnitude(delta) > bound ? 1 : 0;
    }
    pack_words(flags, size, words);
    store_words(words, begin + done, size, packed);
  }
}

void mask(bool wide, const TaskMask& task, int64_t begin, int64_t n, uint8_t* packed) {
  if (wide) {
    mask_of<double>(task, begin, n, packed);
  } else {
    mask_of<float>(task, begin, n, packed);
  }
}

const TaskMaskLoops table = {mask};

}  // namespace

TASKLOOM_EXPORT_LOOPS(TaskMaskLoops, task_mask_loops, table)

}  // namespace taskloom
