// CPU loops of block_scale_merge and its backward, compiled once per CPU level.
#include <type_traits>

#include "common/convert.h"
#include "masked/block_scale_factors.h"
#include "masked/block_scale_merge.h"
#include "masked/storage_vectors.h"

namespace taskloom {
namespace {

constexpr int64_t step = 512;
constexpr int64_t most_groups = 256;

// Calls body with the dtype as a constant, out of those that arithmetic in Acc meets.
template <class Acc, class F>
inline void with_dtype(DType dtype, const F& body) {
  switch (dtype) {
    case DType::f32:
      return body(std::integral_constant<DType, DType::f32>{});
    case DType::bf16:
      return body(std::integral_constant<DType, DType::bf16>{});
    case DType::f16:
      return body(std::integral_constant<DType, DType::f16>{});
    case DType::f64:
      if constexpr (sizeof(Acc) == 8) body(std::integral_constant<DType, DType::f64>{});
  }
}

// Of a count that it knows, gcc 12 takes the loops of load_block and store_block for what is left over to be endless, and warns.
inline int64_t opaque(int64_t count) {
  __asm__("" : "+r"(count));
  return count;
}

int32_t largest_group(const ScaleBlock& block, int64_t at, int64_t n) {
  if (block.partition == nullptr) return 0;
  const uint8_t* __restrict__ group = block.partition + at;
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = group[i] > largest ? group[i] : largest;
  return largest;
}

// group[] of entries at .. at + n, kept below the number of groups.
inline void load_groups(const ScaleBlock& block, int64_t at, int64_t n, int32_t* __restrict__ group) {
  const uint8_t* __restrict__ from = block.partition + at;
  const auto last = static_cast<int32_t>(block.groups - 1);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t value = from[i];
    group[i] = value < last ? value : last;
  }
}

// The end of the tasks from `first` on that are read side by side: of one dtype, and where those are many, in equal shares.
int64_t end_of_streams(const ScaleBlock& block, int64_t first) {
  const DType dtype = block.deltas[first * block.delta_stride].dtype;
  int64_t end = first + 1;
  while (end < block.tasks && block.deltas[end * block.delta_stride].dtype == dtype) ++end;
  const int64_t shares = (end - first + scale_streams - 1) / scale_streams;
  return first + (end - first + shares - 1) / shares;
}

// base + sum for n <= step entries of any dtype. `sum` is lost.
template <class Acc>
__attribute__((noinline)) void finish_step(const ScaleBlock& block, int64_t at, int64_t n, Acc* sum) {
  alignas(64) Acc base[step];
  load_block(block.base.dtype, block.base.data, at, n, base);
  for (int64_t i = 0; i < n; ++i) sum[i] = base[i] + sum[i];
  store_block(block.base.dtype, sum, n, block.out, at);
}

// base + sum for one run.
template <class Acc>
inline __attribute__((always_inline)) void finish_run(const ScaleBlock& block, int64_t at, const Vector<Acc> (&sum)[run_vectors]) {
  constexpr int64_t width = vector_size<Acc>, size = sizeof(Acc);
  if (block.base.dtype == (sizeof(Acc) == 8 ? DType::f64 : DType::f32)) {
    const char* base = static_cast<const char*>(block.base.data) + at * size;
    char* out = static_cast<char*>(block.out) + at * size;
    for (int v = 0; v < run_vectors; ++v) put_vector<Acc>(out + v * width * size, vector_at<Acc>(base + v * width * size) + sum[v]);
    return;
  }
  alignas(64) Acc values[run_entries<Acc>];
  for (int v = 0; v < run_vectors; ++v) put_vector<Acc>(values + v * width, sum[v]);
  finish_step(block, at, opaque(run_entries<Acc>), values);
}

// Adds tasks first .. last to the sums of whole runs, which come from `partial` and go back there as long as tasks are left.
template <class Acc, DType dtype, class Factors>
void merge_runs(const ScaleBlock& block, int64_t first, int64_t last, int64_t begin, int64_t n, Acc* partial) {
  constexpr int64_t width = vector_size<Acc>;
  const Elements* const deltas = block.deltas;
  const Acc* const coef = static_cast<const Acc*>(block.coef);
  const int64_t delta_stride = block.delta_stride, coef_stride = block.coef_stride, tasks = block.tasks;
  Factors factors(block);
  for (int64_t done = 0; done < n; done += run_entries<Acc>) {
    const int64_t at = begin + done;
    Vector<Acc> sum[run_vectors];
    for (int v = 0; v < run_vectors; ++v) sum[v] = first == 0 ? Vector<Acc>{} : vector_at<Acc>(partial + done + v * width);
    factors.enter_run(at);
    for (int64_t t = first; t < last; ++t) {
      const char* from = static_cast<const char*>(deltas[t * delta_stride].data) + at * stored_bytes<dtype>;
      factors.enter_task(coef + t * coef_stride);
      for (int v = 0; v < run_vectors; ++v) {
        const Vector<Acc> product = factors.of(v) * stored_vector<Acc, dtype>(from + v * width * stored_bytes<dtype>);
        sum[v] = sum[v] + product;
      }
    }
    if (last < tasks) {
      for (int v = 0; v < run_vectors; ++v) put_vector<Acc>(partial + done + v * width, sum[v]);
    } else {
      finish_run<Acc>(block, at, sum);
    }
  }
}

// Any entries, by way of memory: what is left of the runs, and groups whose coefficients do not fit in registers.
template <class Acc>
void merge_steps(const ScaleBlock& block, int64_t begin, int64_t n) {
  alignas(64) Acc delta[step], sum[step];
  alignas(64) int32_t group[step];
  for (int64_t done = 0; done < n; done += step) {
    const int64_t at = begin + done, size = n - done < step ? n - done : step;
    if (block.partition != nullptr) load_groups(block, at, size, group);
    for (int64_t i = 0; i < size; ++i) sum[i] = Acc{0};
    for (int64_t t = 0; t < block.tasks; ++t) {
      const Elements& task = block.deltas[t * block.delta_stride];
      const Acc* __restrict__ coef = static_cast<const Acc*>(block.coef) + t * block.coef_stride;
      const int64_t ahead = n - done - size < step ? n - done - size : step;
      prefetch_block(task.dtype, task.data, at + size, ahead);
      load_block(task.dtype, task.data, at, size, delta);
      if (block.partition == nullptr || block.groups == 1) {
        const Acc factor = coef[0];
        for (int64_t i = 0; i < size; ++i) {
          const Acc product = factor * delta[i];
          sum[i] += product;
        }
      } else {
        for (int64_t i = 0; i < size; ++i) {
          const Acc product = coef[group[i]] * delta[i];
          sum[i] += product;
        }
      }
    }
    finish_step(block, at, size, sum);
  }
}

template <class Acc>
int32_t merge_of(const ScaleBlock& block, int64_t begin, int64_t n, Acc* partial) {
  constexpr int64_t piece = scale_piece_bytes / static_cast<int64_t>(sizeof(Acc));
  const bool grouped = block.partition != nullptr && block.groups > 1;
  int32_t largest = 0;
  for (int64_t done = 0; done < n; done += piece) {
    const int64_t at = begin + done, size = n - done < piece ? n - done : piece;
    const int32_t here = largest_group(block, at, size);
    largest = here > largest ? here : largest;
    const bool in_registers = !grouped || (sizeof(Acc) == 4 && block.groups <= register_groups && here < block.groups);
    const int64_t whole = in_registers ? size / run_entries<Acc> * run_entries<Acc> : 0;
    for (int64_t first = 0, last = 0; whole > 0 && first < block.tasks; first = last) {
      last = end_of_streams(block, first);
      with_dtype<Acc>(block.deltas[first * block.delta_stride].dtype, [&](auto dtype) {
#ifdef __AVX2__
        if constexpr (sizeof(Acc) == 4) {
          if (grouped) return merge_runs<Acc, dtype.value, GroupFactors>(block, first, last, at, whole, partial);
        }
#endif
        merge_runs<Acc, dtype.value, OneFactor<Acc>>(block, first, last, at, whole, partial);
      });
    }
    merge_steps<Acc>(block, at + whole, size - whole);
  }
  return largest;
}

int32_t merge(bool wide, const ScaleBlock& block, int64_t begin, int64_t n, void* scratch) {
  return wide ? merge_of(block, begin, n, static_cast<double*>(scratch)) : merge_of(block, begin, n, static_cast<float*>(scratch));
}

// Entries of one visit to a task's delta: longer visits make a core wait for memory, shorter ones load and store sums more often.
constexpr int64_t dot_run = 128;

// Adds the products of gradients and deltas, a multiple of dot_lanes, to the running sums of one task.
template <DType dtype, bool exact>
inline __attribute__((always_inline)) void add_products(const double* gradient, const char* delta, int64_t n, double* sums) {
  constexpr int64_t width = vector_size<double>;
  constexpr int parts = static_cast<int>(dot_lanes / width);
  Vector<double> sum[parts];
  for (int v = 0; v < parts; ++v) sum[v] = vector_at<double>(sums + v * width);
  for (int64_t i = 0; i < n; i += dot_lanes) {
    for (int v = 0; v < parts; ++v) {
      const Vector<double> a = vector_at<double>(gradient + i + v * width);
      const Vector<double> b = stored_vector<double, dtype>(delta + (i + v * width) * stored_bytes<dtype>);
      if constexpr (exact) {
        sum[v] = plus_exact_product(sum[v], a, b);
      } else {
        const Vector<double> product = a * b;
        sum[v] = sum[v] + product;
      }
    }
  }
  for (int v = 0; v < parts; ++v) put_vector<double>(sums + v * width, sum[v]);
}

// A product of two floats is exact in double: rounded before the add or not, the sum has the same bits.
template <DType dtype>
void dot_runs(const ScaleBlock& block, int64_t first, int64_t last, int64_t begin, int64_t n, double* lanes) {
  alignas(64) double gradient[dot_run];
  const Elements* const deltas = block.deltas;
  const int64_t stride = block.delta_stride;
  const bool exact = dtype != DType::f64 && block.base.dtype != DType::f64;
  for (int64_t at = begin; at < begin + n; at += dot_run) {
    load_block(block.base.dtype, block.base.data, at, opaque(dot_run), gradient);
    for (int64_t t = first; t < last; ++t) {
      const char* from = static_cast<const char*>(deltas[t * stride].data) + at * stored_bytes<dtype>;
      if constexpr (stored_bytes<dtype> == 2 && !converts_halves) {
        alignas(64) double delta[dot_run];
        load_block(dtype, from, 0, opaque(dot_run), delta);
        add_products<DType::f64, false>(gradient, reinterpret_cast<const char*>(delta), dot_run, lanes + t * dot_lanes);
      } else if (exact) {
        add_products<dtype, dtype != DType::f64>(gradient, from, dot_run, lanes + t * dot_lanes);
      } else {
        add_products<dtype, false>(gradient, from, dot_run, lanes + t * dot_lanes);
      }
    }
  }
}

// The last entries of a block, with zeros behind them.
void dot_rest(const ScaleBlock& block, int64_t begin, int64_t n, double* lanes) {
  alignas(64) double gradient[dot_run], delta[dot_run];
  const int64_t padded = (n + dot_lanes - 1) / dot_lanes * dot_lanes;
  load_block(block.base.dtype, block.base.data, begin, n, gradient);
  for (int64_t i = n; i < padded; ++i) gradient[i] = delta[i] = 0;
  for (int64_t t = 0; t < block.tasks; ++t) {
    const Elements& task = block.deltas[t * block.delta_stride];
    load_block(task.dtype, task.data, begin, n, delta);
    add_products<DType::f64, false>(gradient, reinterpret_cast<const char*>(delta), padded, lanes + t * dot_lanes);
  }
}

void dots_of_blocks(const ScaleBlock& block, int64_t begin, int64_t n, double* sums, double* lanes) {
  constexpr int64_t piece = 1 << 15;
  const int64_t tasks = block.tasks, whole = n / dot_run * dot_run;
  for (int64_t i = 0; i < tasks * dot_lanes; ++i) lanes[i] = 0;
  for (int64_t done = 0; done < whole; done += piece) {
    const int64_t size = whole - done < piece ? whole - done : piece;
    for (int64_t first = 0, last = 0; first < tasks; first = last) {
      last = end_of_streams(block, first);
      with_dtype<double>(block.deltas[first * block.delta_stride].dtype,
                         [&](auto dtype) { dot_runs<dtype.value>(block, first, last, begin + done, size, lanes); });
    }
  }
  dot_rest(block, begin + whole, n - whole, lanes);
  for (int64_t t = 0; t < tasks; ++t) {
    double total = 0;
    for (int64_t lane = 0; lane < dot_lanes; ++lane) total += lanes[t * dot_lanes + lane];
    sums[t] = total;
  }
}

// sum + a * b; `exact` says that the product is.
template <bool exact>
inline double plus_product(double sum, double a, double b) {
#ifdef __FMA__
  if constexpr (exact) return __builtin_fma(a, b, sum);
#endif
  const double product = a * b;
  return sum + product;
}

constexpr int64_t group_run = 256;
constexpr int64_t side_by_side = 8;

// Entries of a run, those of a group behind each other in their order, and each one's gradient.
struct SortedRun {
  alignas(64) double gradient[group_run];
  int32_t place[group_run];
  int32_t start[most_groups + 1];

  void sort(const ScaleBlock& block, int64_t at, int64_t n) {
    alignas(64) double unsorted[group_run];
    alignas(64) int32_t group[group_run];
    load_groups(block, at, n, group);
    load_block(block.base.dtype, block.base.data, at, n, unsorted);
    int32_t next[most_groups] = {};
    for (int64_t i = 0; i < n; ++i) ++next[group[i]];
    start[0] = 0;
    for (int64_t k = 0; k < block.groups; ++k) {
      start[k + 1] = start[k] + next[k];
      next[k] = start[k];
    }
    for (int64_t i = 0; i < n; ++i) {
      const int32_t to = next[group[i]]++;
      place[to] = static_cast<int32_t>(i);
      gradient[to] = unsorted[i];
    }
  }
};

// Adds a run's products of `count` tasks to their sums, group by group: the sums stay in registers and do not wait for one another.
template <bool exact, int count>
void add_sorted(const SortedRun& run, const double* delta, int64_t groups, double* sums) {
  for (int64_t k = 0; k < groups; ++k) {
    double sum[count];
    for (int t = 0; t < count; ++t) sum[t] = sums[t * groups + k];
    for (int32_t i = run.start[k]; i < run.start[k + 1]; ++i) {
      const double gradient = run.gradient[i];
      const double* entry = delta + run.place[i];
      for (int t = 0; t < count; ++t) sum[t] = plus_product<exact>(sum[t], gradient, entry[t * group_run]);
    }
    for (int t = 0; t < count; ++t) sums[t * groups + k] = sum[t];
  }
}

template <bool exact>
void dots_of_groups(const ScaleBlock& block, int64_t begin, int64_t n, double* sums) {
  alignas(64) double delta[side_by_side * group_run];
  SortedRun run;
  const int64_t groups = block.groups, tasks = block.tasks;
  for (int64_t i = 0; i < tasks * groups; ++i) sums[i] = 0;
  for (int64_t done = 0; done < n; done += group_run) {
    const int64_t at = begin + done, size = n - done < group_run ? n - done : group_run;
    run.sort(block, at, size);
    for (int64_t first = 0, count = 0; first < tasks; first += count) {
      count = tasks - first >= side_by_side ? side_by_side : tasks - first >= 4 ? 4 : 1;
      for (int64_t t = 0; t < count; ++t) {
        const Elements& task = block.deltas[(first + t) * block.delta_stride];
        load_block(task.dtype, task.data, at, size, delta + t * group_run);
      }
      double* of_first = sums + first * groups;
      if (count == side_by_side) {
        add_sorted<exact, side_by_side>(run, delta, groups, of_first);
      } else if (count == 4) {
        add_sorted<exact, 4>(run, delta, groups, of_first);
      } else {
        add_sorted<exact, 1>(run, delta, groups, of_first);
      }
    }
  }
}

int32_t dots(const ScaleBlock& block, int64_t begin, int64_t n, double* sums, double* scratch) {
  if (block.partition == nullptr || block.groups == 1) {
    dots_of_blocks(block, begin, n, sums, scratch);
  } else {
    bool narrow = block.base.dtype != DType::f64;
    for (int64_t t = 0; t < block.tasks; ++t) narrow = narrow && block.deltas[t * block.delta_stride].dtype != DType::f64;
    narrow ? dots_of_groups<true>(block, begin, n, sums) : dots_of_groups<false>(block, begin, n, sums);
  }
  return largest_group(block, begin, n);
}

const BlockScaleMergeLoops table = {merge, dots};

}  // namespace

TASKLOOM_EXPORT_LOOPS(BlockScaleMergeLoops, block_scale_merge_loops, table)

}  // namespace taskloom
