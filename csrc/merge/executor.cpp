#include "merge/executor.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <map>
#include <stdexcept>

#include "common/page_buffer.h"
#include "merge/thread_pool.h"

namespace taskloom {
namespace {

constexpr int64_t copy_piece = 1 << 22;

const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float16", "bfloat16", "float64"};
  return names[static_cast<int>(dtype)];
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

SparseMerge sized_merge(const MergeJob& job) {
  SparseMerge merge = job.stages->merge;
  merge.numel = job.numel;
  merge.out_dtype = job.target.dtype;
  merge.base_dtype = job.base ? job.base->dtype : DType::f32;
  for (size_t t = 0; t < merge.tasks.size(); ++t) merge.tasks[t].dtype = job.tuned[t].dtype;
  return merge;
}

int64_t room_of(int64_t numel, int threads, int64_t room) {
  return numel < large_tensor ? std::max(least_threshold_room, room / threads) : room;
}

class MergeExecutor::State {
 public:
  explicit State(MergeRun run)
      : run_(std::move(run)),
        pool_(run_.threads,
              [this] {
                if (progress_ != nullptr && *progress_) (*progress_)(done_.load(std::memory_order_relaxed));
              }),
        jobs_of_(run_.outputs.size()),
        results_(run_.jobs.size()),
        prepared_(run_.jobs.size()) {
    for (size_t i = 0; i < run_.jobs.size(); ++i) jobs_of_.at(static_cast<size_t>(run_.jobs[i].target.file)).push_back(i);
  }

  const MergeRun& plan() const { return run_; }
  const std::vector<size_t>& jobs_of(size_t output) const { return jobs_of_.at(output); }

  std::vector<JobResult> run(size_t output, const Progress& progress) {
    progress_ = &progress;
    OutputFile& file = run_.outputs.at(output);
    file.open();
    try {
      prepare_model();
      carry_out_all(jobs_of_[output]);
      file.close();
      if (progress) progress(done_);
    } catch (...) {
      progress_ = nullptr;
      throw;
    }
    progress_ = nullptr;
    std::vector<JobResult> results;
    for (const size_t i : jobs_of_[output]) results.push_back(std::move(results_[i]));
    return results;
  }

 private:
  const void* data(const Place& place, int64_t numel) const {
    return run_.inputs[static_cast<size_t>(place.file)].at(place.offset, numel * element_size(place.dtype));
  }

  void advise(const MergeJob& job, bool ahead) const {
    auto range = [&](const Place& place) {
      const InputFile& file = run_.inputs[static_cast<size_t>(place.file)];
      const int64_t bytes = job.stages ? job.numel * element_size(place.dtype) : job.bytes;
      ahead ? file.will_need(place.offset, bytes) : file.done_with(place.offset, bytes);
    };
    if (job.base) range(*job.base);
    for (const Place& place : job.tuned) range(place);
  }

  void finish_large(size_t index) {
    carry_out(index);
    advise(run_.jobs[index], false);
  }

  // The job's merge with its tensors in place, thresholds not yet found.
  SparseMerge bound(const MergeJob& job) const {
    SparseMerge merge = sized_merge(job);
    merge.room = room_of(job.numel, run_.threads, run_.room);
    merge.base = job.base ? data(*job.base, job.numel) : nullptr;
    for (size_t t = 0; t < merge.tasks.size(); ++t) merge.tasks[t].tuned = data(job.tuned[t], job.numel);
    return merge;
  }

  void prepare_model() {
    if (model_prepared_) return;
    find_model_cuts();
    find_majority_signs();
    model_prepared_ = true;
  }

  void carry_out_all(const std::vector<size_t>& jobs) {
    std::vector<size_t> few;
    std::optional<size_t> previous;
    for (const size_t i : jobs) {
      if (run_.jobs[i].numel < large_tensor) {
        few.push_back(i);
        continue;
      }
      advise(run_.jobs[i], true);
      if (previous) finish_large(*previous);
      previous = i;
    }
    if (previous) finish_large(*previous);
    pool_.parallel()(static_cast<int64_t>(few.size()), [&](int64_t i) { carry_out(few[static_cast<size_t>(i)]); });
  }

  // Mapped pages that cannot be read hold zeros from then on (see files.h), so what was made of them must not be used.
  void check_readable(const MergeJob& job) const {
    if (job.base) run_.inputs[static_cast<size_t>(job.base->file)].check_readable();
    for (const Place& place : job.tuned) run_.inputs[static_cast<size_t>(place.file)].check_readable();
  }

  void find_model_cuts() {
    std::vector<size_t> members;
    for (size_t i = 0; i < run_.jobs.size(); ++i) {
      const MergeJob& job = run_.jobs[i];
      if (job.stages && job.stages->model_scope) {
        prepared_[i] = bound(job);
        members.push_back(i);
      }
    }
    if (members.empty()) return;
    // Equal magnitudes rank by position in the model; names give the same positions whatever the files' order and the shards.
    std::sort(members.begin(), members.end(), [this](size_t a, size_t b) { return run_.jobs[a].name < run_.jobs[b].name; });
    const bool wide = prepared_[members.front()]->wide();
    for (const size_t i : members) {
      if (prepared_[i]->wide() != wide) {
        throw std::runtime_error("scope: model cannot rank float64 tensors together with others: '" + run_.jobs[members.front()].name +
                                 "' and '" + run_.jobs[i].name + "'");
      }
    }
    for (size_t t = 0; t < run_.models.size(); ++t) {
      std::vector<DeltaSegment> segments;
      for (const size_t i : members) segments.push_back({prepared_[i]->delta(t), prepared_[i]->numel});
      const MergeTask& task = prepared_[members.front()]->tasks[t];
      std::vector<int64_t> tie_ends;
      const std::vector<Threshold> found =
          joint_magnitude_thresholds(segments, {task.rank_end, task.rank_begin}, &tie_ends, pool_.parallel(), wide, run_.room);
      for (const size_t i : members) check_readable(run_.jobs[i]);
      for (size_t s = 0; s < members.size(); ++s) {
        MergeTask& own = prepared_[members[s]]->tasks[t];
        own.outer = {found[0].cut.bits, tie_ends[s]};
        own.inner = {found[1].cut.bits, tie_ends[members.size() + s]};
      }
    }
  }

  const SparseMerge& prepare(size_t index) {
    const MergeJob& job = run_.jobs[index];
    std::optional<SparseMerge>& slot = prepared_[index];
    if (!slot) {
      slot = bound(job);
      if (slot->select == Select::magnitude) find_magnitude_cuts(&*slot, pool_.parallel());
    }
    set_rescale_factors(&*slot, pool_.parallel());
    return *slot;
  }

  // Where elections of exactly zero follow the majority sign of the whole model, that sign is counted first.
  void find_majority_signs() {
    int64_t sum = 0;
    std::vector<size_t> members;
    for (size_t i = 0; i < run_.jobs.size(); ++i) {
      const MergeJob& job = run_.jobs[i];
      if (job.stages && job.stages->zero_majority && job.stages->merge.elect != Elect::none) {
        sum += elected_sign_sum(prepare(i), pool_.parallel());
        // One tensor's bits are little, those of all would not be.
        drop_records(&*prepared_[i]);
        check_readable(job);
        members.push_back(i);
      }
    }
    for (const size_t i : members) prepared_[i]->zero_sign = sum < 0 ? -1 : 1;
  }

  struct Sink {
    State* executor;
    const MergeJob* job;
    double done_per_byte;
    std::atomic<bool> nonfinite{false};
  };

  // Whether a job's values are made here and not only copied, so that one that overflows is ours to report.
  bool makes_values(const MergeJob& job) const {
    return !run_.allow_nonfinite && job.floating && (job.stages || job.base->dtype != job.target.dtype);
  }

  static void write_chunk(void* context, int64_t offset, const void* chunk, int64_t bytes) {
    auto* sink = static_cast<Sink*>(context);
    const Place& target = sink->job->target;
    sink->executor->check_readable(*sink->job);
    sink->executor->look_for_nonfinite(sink, chunk, bytes);
    sink->executor->run_.outputs[static_cast<size_t>(target.file)].write(target.offset + offset, chunk, bytes);
    sink->executor->done_ += static_cast<int64_t>(static_cast<double>(bytes) * sink->done_per_byte);
  }

  void look_for_nonfinite(Sink* sink, const void* values, int64_t bytes) const {
    const DType dtype = sink->job->target.dtype;
    if (makes_values(*sink->job) && sparse_merge_loops().any_nonfinite(dtype, values, bytes / element_size(dtype))) {
      sink->nonfinite.store(true, std::memory_order_relaxed);
    }
  }

  // Inputs that are not finite were reported before this where they are merged; where they are only converted they stay what they are.
  void check_overflow(const MergeJob& job) const {
    if (!job.stages && first_overflow(job) < 0) return;
    throw std::runtime_error("tensor '" + job.name + "': a value is too large for " + name_of(job.target.dtype) +
                             "; choose a wider out_dtype (bfloat16 has float32's range), or allow_nonfinite (--allow-nonfinite)");
  }

  int64_t first_overflow(const MergeJob& job) const {
    constexpr int64_t piece = 4096;
    std::vector<double> before(piece), after(piece), stored(piece);
    const SparseMergeLoops& loops = sparse_merge_loops();
    for (int64_t begin = 0; begin < job.numel; begin += piece) {
      const int64_t n = std::min(piece, job.numel - begin);
      loops.convert(job.base->dtype, data(*job.base, job.numel), begin, n, DType::f64, before.data());
      loops.convert(job.base->dtype, data(*job.base, job.numel), begin, n, job.target.dtype, stored.data());
      loops.convert(job.target.dtype, stored.data(), 0, n, DType::f64, after.data());
      for (int64_t i = 0; i < n; ++i) {
        if (std::isfinite(before[static_cast<size_t>(i)]) && !std::isfinite(after[static_cast<size_t>(i)])) return begin + i;
      }
    }
    return -1;
  }

  int64_t job_bytes(const MergeJob& job) const {
    int64_t bytes = job.stages || job.floating ? job.numel * element_size(job.target.dtype) : job.bytes;
    if (job.base) bytes += job.stages || job.floating ? job.numel * element_size(job.base->dtype) : job.bytes;
    for (const Place& place : job.tuned) bytes += job.numel * element_size(place.dtype);
    return bytes;
  }

  void carry_out(size_t index) {
    const MergeJob& job = run_.jobs[index];
    const auto start = std::chrono::steady_clock::now();
    const int64_t out_bytes = std::max<int64_t>(1, job.floating ? job.numel * element_size(job.target.dtype) : job.bytes);
    Sink sink{this, &job, static_cast<double>(job_bytes(job)) / static_cast<double>(out_bytes)};
    MergeOutput output;
    output.data = run_.outputs[static_cast<size_t>(job.target.file)].memory(job.target.offset);
    output.write = &write_chunk;
    output.context = &sink;
    if (!job.stages) {
      copy(job, output);
    } else if (job.numel > 0) {
      merge(index, output);
    }
    check_readable(job);
    if (output.data != nullptr && job.numel > 0) look_for_nonfinite(&sink, output.data, out_bytes);
    if (sink.nonfinite) check_overflow(job);
    results_[index].seconds = seconds_since(start);
  }

  void copy(const MergeJob& job, const MergeOutput& output) {
    if (job.floating && job.base->dtype != job.target.dtype) {
      convert_tensor(job.base->dtype, data(*job.base, job.numel), job.numel, job.target.dtype, output, pool_.parallel());
      return;
    }
    const char* from = run_.inputs[static_cast<size_t>(job.base->file)].at(job.base->offset, job.bytes);
    pool_.parallel()(chunk_count(job.bytes, copy_piece), [&](int64_t piece) {
      const int64_t offset = piece * copy_piece;
      const int64_t bytes = std::min(copy_piece, job.bytes - offset);
      if (output.data != nullptr) {
        std::copy_n(from + offset, bytes, static_cast<char*>(output.data) + offset);
      } else {
        output.write(output.context, offset, from + offset, bytes);
      }
    });
  }

  void merge(size_t index, const MergeOutput& output) {
    const MergeJob& job = run_.jobs[index];
    if (job.stages->slerp) {
      const SparseMerge both = bound(job);
      const SparseMerge line = slerp_merge(both, job.stages->t, pool_.parallel());
      results_[index].statistics = sparse_merge(line, output, pool_.parallel());
      results_[index].statistics.kept = {job.numel};
      results_[index].statistics.dots = {squared_distance(both)};
      check_finite(job, results_[index].statistics);
      if (run_.magnitude_histogram) results_[index].histogram = histograms(both);
      return;
    }
    const SparseMerge& ready = prepare(index);
    check_readable(job);
    JobResult& result = results_[index];
    result.statistics = sparse_merge(ready, output, pool_.parallel());
    check_finite(job, result.statistics);
    if (run_.magnitude_histogram) result.histogram = histograms(ready);
    release(index);
  }

  // What was found over the whole model is not found again: an output may be run once more.
  void release(size_t index) {
    const JobStages& stages = *run_.jobs[index].stages;
    if (stages.model_scope || stages.zero_majority) {
      drop_records(&*prepared_[index]);
    } else {
      prepared_[index].reset();
    }
  }

  // Of the base and the one task. Sums of doubles: what cancels is far below the precision of the values.
  double squared_distance(const SparseMerge& merge) {
    MergeTask base = merge.tasks.front();
    base.tuned = merge.base;
    base.dtype = merge.base_dtype;
    constexpr int64_t piece = 1 << 18;
    std::vector<double> sums(static_cast<size_t>(chunk_count(merge.numel, piece)));
    pool_.parallel()(chunk_count(merge.numel, piece), [&](int64_t index) {
      double products[3] = {};
      const int64_t begin = index * piece;
      sparse_merge_loops().inner_products(base, merge.tasks.front(), begin, std::min(piece, merge.numel - begin), products);
      sums[static_cast<size_t>(index)] = products[0] - 2 * products[1] + products[2];
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    return total < 0 ? 0.0 : total;
  }

  std::vector<std::vector<int64_t>> histograms(const SparseMerge& merge) {
    std::vector<std::vector<int64_t>> all;
    const bool wide = merge.wide();
    for (size_t t = 0; t < merge.tasks.size(); ++t) {
      const PageBuffer memory(histogram_bins * static_cast<int64_t>(sizeof(int64_t)));
      auto* digits = reinterpret_cast<int64_t*>(memory.data());
      std::vector<int64_t> exponents(256);
      add_magnitude_histogram(merge.delta(t), wide, merge.numel, wide ? 48 : 16, 0, digits, merge.room - memory.bytes(), pool_.parallel());
      for (int64_t digit = 0; digit < histogram_bins / 2; ++digit) {
        const int64_t exponent = wide ? std::clamp<int64_t>((digit >> 4) - 1023 + 127, 0, 255) : digit >> 7;
        exponents[static_cast<size_t>(exponent)] += digits[digit];
      }
      all.push_back(std::move(exponents));
    }
    return all;
  }

  int64_t first_nonfinite(const Place& place, int64_t numel) const {
    constexpr int64_t piece = 4096;
    std::vector<double> values(piece);
    for (int64_t begin = 0; begin < numel; begin += piece) {
      const int64_t n = std::min(piece, numel - begin);
      sparse_merge_loops().convert(place.dtype, data(place, numel), begin, n, DType::f64, values.data());
      for (int64_t i = 0; i < n; ++i) {
        if (!std::isfinite(values[static_cast<size_t>(i)])) return begin + i;
      }
    }
    return -1;
  }

  void check_finite(const MergeJob& job, const MergeStatistics& statistics) const {
    if (!statistics.nonfinite || run_.allow_nonfinite) return;
    auto check = [&](const Place& place, const std::string& model) {
      const int64_t index = first_nonfinite(place, job.numel);
      if (index >= 0) {
        throw std::runtime_error("tensor '" + job.name + "' of " + model + " holds NaN or infinity, first at element " +
                                 std::to_string(index) + "; allow_nonfinite (--allow-nonfinite) merges it all the same");
      }
    };
    if (job.base) check(*job.base, "the base model");
    for (size_t t = 0; t < job.tuned.size(); ++t) check(job.tuned[t], "model '" + run_.models[t] + "'");
    throw std::runtime_error("tensor '" + job.name + "': the difference of a model and the base overflows");
  }

  MergeRun run_;
  const Progress* progress_ = nullptr;
  std::atomic<int64_t> done_{0};
  ThreadPool pool_;
  std::vector<std::vector<size_t>> jobs_of_;
  std::vector<JobResult> results_;
  std::vector<std::optional<SparseMerge>> prepared_;
  bool model_prepared_ = false;
};

MergeExecutor::MergeExecutor(MergeRun run) : state_(std::make_unique<State>(std::move(run))) {}
MergeExecutor::~MergeExecutor() = default;

void MergeExecutor::reserve(const std::vector<size_t>& outputs) const {
  for (const size_t output : outputs) state_->plan().outputs.at(output).reserve();
}

std::vector<JobResult> MergeExecutor::run(size_t output, const Progress& progress) { return state_->run(output, progress); }
const std::vector<size_t>& MergeExecutor::jobs_of(size_t output) const { return state_->jobs_of(output); }
const MergeRun& MergeExecutor::plan() const { return state_->plan(); }

}  // namespace taskloom
