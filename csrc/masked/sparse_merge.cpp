// Drivers of sparse_merge: chunks, the passes that come before the merge, and the ordered sums of what the chunks counted.
#include "masked/sparse_merge.h"

#include <algorithm>
#include <cmath>

#include "common/page_buffer.h"
#include "common/thread_scratch.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 17;
// mergekit leaves a delta alone where either norm is below this.
constexpr double least_norm = 1e-7;
constexpr double parallel_cosine = 0.9995;
// What chunks count is summed in their order, so many chunks at a time that it takes about this.
constexpr int64_t totals_room = 4 << 20;
constexpr int64_t least_totals = 16;

MergeView view_of(const SparseMerge& merge) {
  const int count = static_cast<int>(merge.tasks.size());
  const int dot_stride = count <= 8 || merge.exact_dots ? 1 : count * count / 64 + 1;
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

// What a pass counted, in one chunk or in all.
struct Totals {
  int64_t conflicts = 0, sign_sum = 0;
  int32_t nonfinite = 0;
  std::vector<int64_t> kept;
  std::vector<double> dots, before, after;
};

// What the chunks of a wave count, each in cache lines of its own.
class WaveTotals {
 public:
  // Inner products are many where tasks are: there is room for them only where they are counted.
  WaveTotals(int64_t chunks, size_t tasks, bool dots)
      : tasks_(tasks),
        pairs_(dots ? tasks * (tasks + 1) / 2 : 0),
        counts_(static_cast<size_t>(chunks)),
        kept_(static_cast<size_t>(chunks) * padded(tasks)),
        sums_(static_cast<size_t>(chunks) * padded(pairs_ + 2 * tasks)) {}

  static int64_t bytes(size_t tasks, bool dots) {
    const size_t sums = (dots ? tasks * (tasks + 1) / 2 : 0) + 2 * tasks;
    return static_cast<int64_t>(sizeof(ChunkStatistics) + sizeof(int64_t) * padded(tasks) + sizeof(double) * padded(sums));
  }

  void clear() {
    std::fill(kept_.begin(), kept_.end(), 0);
    std::fill(sums_.begin(), sums_.end(), 0.0);
  }

  ChunkStatistics begin(int64_t chunk) {
    const auto index = static_cast<size_t>(chunk);
    double* sums = sums_.data() + index * padded(pairs_ + 2 * tasks_);
    return {kept_.data() + index * padded(tasks_), sums, sums + pairs_, sums + pairs_ + tasks_, 0, 0, 0};
  }
  void finish(int64_t chunk, const ChunkStatistics& counted) { counts_[static_cast<size_t>(chunk)] = counted; }

  void add_to(Totals* total, int64_t chunks) const {
    for (int64_t c = 0; c < chunks; ++c) {
      const ChunkStatistics& own = counts_[static_cast<size_t>(c)];
      for (size_t i = 0; i < tasks_; ++i) total->kept[i] += own.kept[i];
      for (size_t i = 0; i < pairs_; ++i) total->dots[i] += own.dots[i];
      for (size_t i = 0; i < tasks_; ++i) total->before[i] += own.before[i];
      for (size_t i = 0; i < tasks_; ++i) total->after[i] += own.after[i];
      total->conflicts += own.conflicts;
      total->sign_sum += own.sign_sum;
      total->nonfinite |= own.nonfinite;
    }
  }

 private:
  static size_t padded(size_t words) { return (words + 7) / 8 * 8; }

  size_t tasks_, pairs_;
  std::vector<ChunkStatistics> counts_;
  std::vector<int64_t> kept_;
  std::vector<double> sums_;
};

// Chunks whose counts are kept at a time.
int64_t wave_length(const SparseMerge& merge, bool dots) {
  const int64_t most = std::max(least_totals, totals_room / WaveTotals::bytes(merge.tasks.size(), dots));
  return std::min(most, chunk_count(merge.numel, chunk_length(merge)));
}

Totals run(const SparseMerge& merge, MergePass pass, const MergeOutput& output, const ParallelFor& parallel) {
  const MergeView view = view_of(merge);
  const bool wide = merge.wide();
  const bool merging = pass == MergePass::merge;
  const bool dots = merging && merge.statistics;
  const size_t tasks = merge.tasks.size();
  const int64_t length = chunk_length(merge);
  const int64_t chunks = chunk_count(merge.numel, length);
  const int64_t size = element_size(merge.out_dtype);
  const int64_t scratch_bytes = sparse_merge_loops().scratch_bytes(wide, view);
  const int64_t wave = wave_length(merge, dots);
  Totals total;
  total.kept.resize(tasks);
  total.dots.resize(merge.statistics ? tasks * (tasks + 1) / 2 : 0);
  total.before.resize(tasks);
  total.after.resize(tasks);
  WaveTotals totals(wave, tasks, dots);
  for (int64_t first = 0; first < chunks; first += wave) {
    if (first > 0) totals.clear();
    const int64_t count = std::min(wave, chunks - first);
    parallel(count, [&](int64_t index) {
      const int64_t begin = (first + index) * length;
      const int64_t n = std::min(length, merge.numel - begin);
      ChunkStatistics own = totals.begin(index);
      const ThreadScratch scratch(ScratchUse::stages, scratch_bytes);
      const bool direct = output.data != nullptr;
      const ThreadScratch piece(ScratchUse::output, merging && !direct ? n * size : 0);
      char* out = direct ? static_cast<char*>(output.data) + begin * size : piece.data();
      sparse_merge_loops().chunk(wide, pass, view, begin, n, scratch.data(), out, &own);
      if (merging && !direct) output.write(output.context, begin * size, out, n * size);
      totals.finish(index, own);
    });
    totals.add_to(&total, count);
  }
  return total;
}

bool records_selection(const SparseMerge& merge) {
  const bool bytes_apart = merge.select == Select::dropout || (merge.select == Select::rank_dropout && merge.row_length % 8 == 0);
  const int64_t bytes = (merge.numel + 7) / 8 * static_cast<int64_t>(merge.tasks.size());
  return merge.rescale == Rescale::l1 && bytes_apart && bytes <= merge.room;
}

// Room for the bits of every task whose selection is dear, where a thread's bytes are its own.
void make_records(SparseMerge* merge) {
  if (!records_selection(*merge)) return;
  const int64_t bytes = (merge->numel + 7) / 8;
  const auto tasks = static_cast<int64_t>(merge->tasks.size());
  merge->records = std::make_shared<PageBuffer>(bytes * tasks);
  for (int64_t t = 0; t < tasks; ++t) {
    MergeTask& task = merge->tasks[static_cast<size_t>(t)];
    const bool keeps_all = merge->select == Select::dropout && task.density >= 1;
    if (!keeps_all) task.record = reinterpret_cast<uint8_t*>(merge->records->data()) + t * bytes;
  }
}

}  // namespace

void drop_records(SparseMerge* merge) {
  for (MergeTask& task : merge->tasks) task.record = nullptr, task.recorded = nullptr;
  merge->records.reset();
}

MergeMemory merge_memory(const SparseMerge& merge) {
  const bool wide = merge.wide();
  MergeMemory memory;
  const int64_t length = chunk_length(merge);
  memory.chunks = chunk_count(merge.numel, length);
  memory.scratch[static_cast<int>(ScratchUse::stages)] = sparse_merge_loops().scratch_bytes(wide, view_of(merge));
  memory.scratch[static_cast<int>(ScratchUse::output)] = std::min(length, merge.numel) * element_size(merge.out_dtype);
  memory.totals = wave_length(merge, merge.statistics) * WaveTotals::bytes(merge.tasks.size(), merge.statistics);
  if (merge.select == Select::magnitude) {
    int64_t wanted = 0;
    auto proper = [&](int64_t rank) { return 0 < rank && rank < merge.numel ? 1 : 0; };
    for (const MergeTask& task : merge.tasks) wanted += proper(task.rank_begin) + proper(task.rank_end);
    const ThresholdMemory found = threshold_memory(merge.numel, wanted, 2, wide, merge.room);
    memory.scratch[static_cast<int>(ScratchUse::magnitudes)] = found.magnitudes;
    memory.scratch[static_cast<int>(ScratchUse::sorted_copy)] = found.sorted_copy;
    memory.shared = found.shared;
  }
  if (records_selection(merge)) {
    memory.shared = std::max(memory.shared, (merge.numel + 7) / 8 * static_cast<int64_t>(merge.tasks.size()));
  }
  return memory;
}

void find_magnitude_cuts(SparseMerge* merge, const ParallelFor& parallel) {
  std::vector<Delta> deltas;
  std::vector<int64_t> ranks;
  for (size_t t = 0; t < merge->tasks.size(); ++t) {
    deltas.push_back(merge->delta(t));
    ranks.push_back(merge->tasks[t].rank_end);
    ranks.push_back(merge->tasks[t].rank_begin);
  }
  const std::vector<Threshold> found = magnitude_thresholds(deltas.data(), static_cast<int>(deltas.size()), merge->numel, ranks.data(), 2,
                                                            merge->wide(), merge->room, parallel);
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

int64_t convert_scratch(int64_t numel, DType to_dtype) { return std::min(chunk, numel) * element_size(to_dtype); }

void convert_tensor(DType from_dtype, const void* from, int64_t numel, DType to_dtype, const MergeOutput& output,
                    const ParallelFor& parallel) {
  const int64_t size = element_size(to_dtype);
  parallel(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    const int64_t n = std::min(chunk, numel - begin);
    if (output.data != nullptr) {
      sparse_merge_loops().convert(from_dtype, from, begin, n, to_dtype, static_cast<char*>(output.data) + begin * size);
      return;
    }
    const ThreadScratch out(ScratchUse::output, n * size);
    sparse_merge_loops().convert(from_dtype, from, begin, n, to_dtype, out.data());
    output.write(output.context, begin * size, out.data(), n * size);
  });
}

}  // namespace taskloom
