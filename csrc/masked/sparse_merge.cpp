// Drivers of sparse_merge: chunks, the passes that come before the merge, and the ordered sums of what the chunks counted.
#include "masked/sparse_merge.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 17;
// mergekit leaves a delta alone where either norm is below this.
constexpr double least_norm = 1e-7;
constexpr double parallel_cosine = 0.9995;
// Random words and row ranks cost more than a bit per entry; above this they are found twice, so that memory stays bounded.
constexpr int64_t most_recorded = 64 << 20;

char* thread_buffer(int which, int64_t bytes) {
  struct Buffer {
    std::unique_ptr<char[]> memory;
    int64_t size = 0;
  };
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[which];
  if (buffer.size < bytes + 64) {
    buffer.memory.reset();
    buffer.memory.reset(new char[static_cast<size_t>(bytes + 64)]);
    buffer.size = bytes + 64;
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.memory.get());
  return buffer.memory.get() + (64 - address % 64) % 64;
}

MergeView view_of(const SparseMerge& merge) {
  const int count = static_cast<int>(merge.tasks.size());
  const int dot_stride = count <= 8 ? 1 : count * count / 64 + 1;
  return {
      merge.base,         merge.base_dtype,
      merge.out_dtype,    merge.by_row() ? merge.row_length : 0,
      merge.tasks.data(), count,
      merge.select,       merge.rescale,
      merge.elect,        merge.zero_sign,
      merge.vote,         merge.consensus_k,
      merge.combine,      merge.scale,
      merge.seed,         merge.statistics,
      dot_stride,
  };
}

int64_t chunk_length(const SparseMerge& merge) {
  if (!merge.by_row() || merge.row_length == 0) return chunk;
  return std::max<int64_t>(1, chunk / merge.row_length) * merge.row_length;
}

struct Totals {
  std::vector<int64_t> kept;
  std::vector<double> dots, before, after;
  int64_t conflicts = 0, sign_sum = 0;
  int32_t nonfinite = 0;

  // Inner products are many where tasks are: there is room for them only where they are counted.
  Totals(size_t tasks, bool statistics) : kept(tasks), dots(statistics ? tasks * (tasks + 1) / 2 : 0), before(tasks), after(tasks) {}

  void add(const Totals& other) {
    for (size_t i = 0; i < kept.size(); ++i) kept[i] += other.kept[i];
    for (size_t i = 0; i < dots.size(); ++i) dots[i] += other.dots[i];
    for (size_t i = 0; i < before.size(); ++i) before[i] += other.before[i];
    for (size_t i = 0; i < after.size(); ++i) after[i] += other.after[i];
    conflicts += other.conflicts;
    sign_sum += other.sign_sum;
    nonfinite |= other.nonfinite;
  }
};

Totals run(const SparseMerge& merge, MergePass pass, const MergeOutput& output, const ParallelFor& parallel) {
  const MergeView view = view_of(merge);
  const bool wide = merge.wide();
  const int64_t length = chunk_length(merge);
  const int64_t chunks = chunk_count(merge.numel, length);
  const int64_t size = element_size(merge.out_dtype);
  std::vector<Totals> totals(static_cast<size_t>(chunks), Totals(merge.tasks.size(), merge.statistics));
  parallel(chunks, [&](int64_t index) {
    const int64_t begin = index * length;
    const int64_t n = std::min(length, merge.numel - begin);
    Totals& own = totals[static_cast<size_t>(index)];
    ChunkStatistics statistics{own.kept.data(), own.dots.data(), own.before.data(), own.after.data(), 0, 0, 0};
    char* scratch = thread_buffer(0, sparse_merge_loops().scratch_bytes(wide, view));
    const bool merging = pass == MergePass::merge;
    char* out = !merging ? nullptr : output.data != nullptr ? static_cast<char*>(output.data) + begin * size : thread_buffer(1, n * size);
    sparse_merge_loops().chunk(wide, pass, view, begin, n, scratch, out, &statistics);
    if (merging && output.data == nullptr) output.write(output.context, begin * size, out, n * size);
    own.conflicts = statistics.conflicts;
    own.sign_sum = statistics.sign_sum;
    own.nonfinite = statistics.nonfinite;
  });
  Totals sum(merge.tasks.size(), merge.statistics);
  for (const Totals& own : totals) sum.add(own);
  return sum;
}

// Room for the bits of every task whose selection is dear, where a thread's bytes are its own.
void make_records(SparseMerge* merge) {
  const bool bytes_apart = merge->select == Select::dropout || (merge->select == Select::rank_dropout && merge->row_length % 8 == 0);
  const int64_t bytes = (merge->numel + 7) / 8;
  const auto tasks = static_cast<int64_t>(merge->tasks.size());
  if (!bytes_apart || bytes * tasks > most_recorded) return;
  merge->records.reset(new uint8_t[static_cast<size_t>(bytes * tasks)]);
  for (int64_t t = 0; t < tasks; ++t) {
    MergeTask& task = merge->tasks[static_cast<size_t>(t)];
    const bool keeps_all = merge->select == Select::dropout && task.density >= 1;
    if (!keeps_all) task.record = merge->records.get() + t * bytes;
  }
}

}  // namespace

void drop_records(SparseMerge* merge) {
  for (MergeTask& task : merge->tasks) task.record = nullptr, task.recorded = nullptr;
  merge->records.reset();
}

bool SparseMerge::wide() const {
  bool wide = base != nullptr && base_dtype == DType::f64;
  for (const MergeTask& task : tasks) wide = wide || task.dtype == DType::f64;
  return wide;
}

void find_magnitude_cuts(SparseMerge* merge, const ParallelFor& parallel) {
  std::vector<Delta> deltas;
  std::vector<int64_t> ranks;
  for (size_t t = 0; t < merge->tasks.size(); ++t) {
    deltas.push_back(merge->delta(t));
    ranks.push_back(merge->tasks[t].rank_end);
    ranks.push_back(merge->tasks[t].rank_begin);
  }
  const std::vector<Threshold> found =
      magnitude_thresholds(deltas.data(), static_cast<int>(deltas.size()), merge->numel, ranks.data(), 2, merge->wide(), parallel);
  for (size_t t = 0; t < merge->tasks.size(); ++t) {
    merge->tasks[t].outer = found[2 * t].cut;
    merge->tasks[t].inner = found[2 * t + 1].cut;
  }
}

void set_rescale_factors(SparseMerge* merge, const ParallelFor& parallel) {
  for (MergeTask& task : merge->tasks) task.factor = 1;
  if (merge->rescale == Rescale::density && merge->select == Select::dropout) {
    for (MergeTask& task : merge->tasks) {
      if (task.density > 0) task.factor = 1 / task.density;
    }
  } else if (merge->rescale == Rescale::l1 && merge->select != Select::all) {
    drop_records(merge);
    make_records(merge);
    const Totals totals = run(*merge, MergePass::norms, {}, parallel);
    for (MergeTask& task : merge->tasks) task.recorded = task.record;
    for (size_t t = 0; t < merge->tasks.size(); ++t) {
      const bool measurable = totals.before[t] >= least_norm && totals.after[t] >= least_norm;
      merge->tasks[t].factor = measurable ? totals.before[t] / totals.after[t] : 1;
    }
  }
}

int64_t elected_sign_sum(const SparseMerge& merge, const ParallelFor& parallel) {
  return run(merge, MergePass::signs, {}, parallel).sign_sum;
}

MergeStatistics sparse_merge(const SparseMerge& merge, const MergeOutput& output, const ParallelFor& parallel) {
  Totals totals = run(merge, MergePass::merge, output, parallel);
  return {std::move(totals.kept), totals.conflicts, std::move(totals.dots), totals.nonfinite != 0};
}

SparseMerge slerp_merge(const SparseMerge& merge, double t, const ParallelFor& parallel) {
  MergeTask first = merge.tasks.front(), second = merge.tasks.front();
  first.tuned = merge.base;
  first.dtype = merge.base_dtype;
  const int64_t chunks = chunk_count(merge.numel, chunk);
  std::vector<double> sums(static_cast<size_t>(3 * chunks));
  parallel(chunks, [&](int64_t index) {
    const int64_t begin = index * chunk;
    sparse_merge_loops().inner_products(first, second, begin, std::min(chunk, merge.numel - begin), sums.data() + 3 * index);
  });
  double aa = 0, ab = 0, bb = 0;
  for (int64_t index = 0; index < chunks; ++index) {
    aa += sums[static_cast<size_t>(3 * index)];
    ab += sums[static_cast<size_t>(3 * index + 1)];
    bb += sums[static_cast<size_t>(3 * index + 2)];
  }
  const double norms = std::sqrt(aa) * std::sqrt(bb);
  const double cosine = norms > 0 ? std::clamp(ab / norms, -1.0, 1.0) : 0.0;
  first.weight = 1 - t;
  second.weight = t;
  if (std::abs(cosine) <= parallel_cosine) {
    const double angle = std::acos(cosine);
    first.weight = std::sin(angle * (1 - t)) / std::sin(angle);
    second.weight = std::sin(angle * t) / std::sin(angle);
  }
  SparseMerge line;
  line.out_dtype = merge.out_dtype;
  line.numel = merge.numel;
  line.statistics = false;
  line.tasks = {first, second};
  return line;
}

void convert_tensor(DType from_dtype, const void* from, int64_t numel, DType to_dtype, const MergeOutput& output,
                    const ParallelFor& parallel) {
  const int64_t size = element_size(to_dtype);
  parallel(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    const int64_t n = std::min(chunk, numel - begin);
    char* out = output.data != nullptr ? static_cast<char*>(output.data) + begin * size : thread_buffer(1, n * size);
    sparse_merge_loops().convert(from_dtype, from, begin, n, to_dtype, out);
    if (output.data == nullptr) output.write(output.context, begin * size, out, n * size);
  });
}

}  // namespace taskloom
