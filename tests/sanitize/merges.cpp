// Cases of the merge executor and its thread pool: whole merges from files and in memory, by one thread and by several, and what goes
// wrong.
#include <dirent.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "groups.h"
#include "merge/thread_pool.h"
#include "merge_plans.h"

namespace taskloom::sanitize {
namespace {

struct Merged {
  std::vector<std::vector<char>> files;
  std::vector<MergeStatistics> statistics;
  std::vector<std::vector<std::vector<int64_t>>> histograms;
};

bool same(const Merged& a, const Merged& b) {
  if (a.files != b.files || a.histograms != b.histograms || a.statistics.size() != b.statistics.size()) return false;
  for (size_t i = 0; i < a.statistics.size(); ++i) {
    const MergeStatistics &x = a.statistics[i], &y = b.statistics[i];
    if (x.kept != y.kept || x.conflicts != y.conflicts || x.dots != y.dots || x.nonfinite != y.nonfinite) return false;
  }
  return true;
}

// Runs the outputs, the last one first where `backwards`, and reads them back.
Merged run_all(MergeExecutor& executor, const Folder& folder, const std::string& prefix, bool backwards, const Progress& progress) {
  Merged merged;
  std::vector<std::vector<JobResult>> results(output_count);
  executor.reserve({0, 1, 2});
  for (size_t i = 0; i < output_count; ++i) {
    const size_t output = backwards ? output_count - 1 - i : i;
    results[output] = executor.run(output, progress);
  }
  for (size_t output = 0; output < output_count; ++output) {
    merged.files.push_back(read_file(folder.file(prefix + std::to_string(output))));
    for (JobResult& result : results[output]) {
      merged.statistics.push_back(std::move(result.statistics));
      merged.histograms.push_back(std::move(result.histogram));
    }
  }
  return merged;
}

// The same merge from and into memory that holds not a byte more; outputs without their headers.
std::vector<std::vector<char>> merge_in_memory(const Models& models, int threads) {
  MergeRun run;
  std::vector<Buffer> inputs, outputs;
  for (size_t file = 0; file <= static_cast<size_t>(models.recipe.tasks); ++file) run.inputs.emplace_back(uintptr_t{0});
  for (size_t output = 0; output < output_count; ++output) run.outputs.emplace_back(uintptr_t{0});
  for (int64_t t = 0; t < models.recipe.tasks; ++t) run.models.push_back("tuned" + std::to_string(t));
  run.jobs = models.jobs();
  run.threads = threads;
  // Less room between passes gives the same bytes.
  if (threads > 1) run.room = least_threshold_room * threads;
  // Offsets are addresses: each tensor has memory of its own.
  auto copy_of = [&](Place& place, const MergeJob& job) {
    const int64_t bytes = job.floating ? job.numel * element_size(place.dtype) : job.bytes;
    inputs.emplace_back(bytes, Placement::odd);
    std::copy_n(models.files[static_cast<size_t>(place.file)].data() + place.offset, bytes, inputs.back().data());
    place.offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(inputs.back().data()));
  };
  for (MergeJob& job : run.jobs) {
    if (job.base) copy_of(*job.base, job);
    for (Place& place : job.tuned) copy_of(place, job);
    outputs.emplace_back(job.bytes, Placement::odd);
    job.target.offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(outputs.back().data()));
  }
  MergeExecutor executor(std::move(run));
  for (size_t output = 0; output < output_count; ++output) executor.run(output, {});
  std::vector<std::vector<char>> contents(output_count);
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::vector<char>& content = contents[i % output_count];
    content.insert(content.end(), outputs[i].data(), outputs[i].data() + outputs[i].bytes());
  }
  return contents;
}

void put_inputs(const Models& models, const Folder& folder) {
  for (size_t file = 0; file < models.files.size(); ++file) write_file(folder.file("input" + std::to_string(file)), models.files[file]);
}

void whole_merge(const Recipe& recipe, bool with_large, const std::vector<int>& teams, Random& random) {
  const Models models(recipe, with_large, random);
  const Folder folder;
  put_inputs(models, folder);
  Merged first;
  for (size_t i = 0; i < teams.size(); ++i) {
    begin_case("merge '%s' large=%d threads=%d", recipe.name, with_large, teams[i]);
    const std::string prefix = "output" + std::to_string(i) + "-";
    MergeExecutor executor(models.in_files(folder, prefix, teams[i]));
    int64_t latest = 0;
    const Merged merged = run_all(executor, folder, prefix, i % 2 == 1, [&](int64_t done) {
      EXPECT(done >= latest);
      latest = done;
    });
    EXPECT(latest > 0);
    if (i == 0) first = merged;
    EXPECT(same(first, merged));
    const std::vector<std::vector<char>> contents = merge_in_memory(models, teams[i]);
    for (size_t output = 0; output < output_count; ++output) {
      const std::vector<char>& file = merged.files[output];
      EXPECT(std::equal(file.begin(), file.begin() + static_cast<int64_t>(output_header().size()), output_header().begin()));
      EXPECT(std::equal(file.begin() + static_cast<int64_t>(output_header().size()), file.end(), contents[output].begin(),
                        contents[output].end()));
    }
  }
}

template <class Work>
std::string message_of(const Work& work) {
  try {
    work();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void refused_nonfinite(Models models, int threads) {
  begin_case("merge of a NaN, threads=%d", threads);
  const Folder folder;
  size_t odd = 0;
  while (models.tensors[odd].name != "odd") ++odd;
  const uint16_t nan = 0x7fc0;
  std::memcpy(models.files[1].data() + models.offsets[1][odd] + 2 * 5, &nan, sizeof nan);
  put_inputs(models, folder);
  MergeExecutor executor(models.in_files(folder, "refused", threads));
  EXPECT(holds(message_of([&] { run_all(executor, folder, "refused", false, {}); }), "holds NaN or infinity, first at element 5"));
  MergeRun allowed = models.in_files(folder, "allowed", threads);
  allowed.allow_nonfinite = true;
  MergeExecutor lenient(std::move(allowed));
  run_all(lenient, folder, "allowed", false, {});
}

void shortened_inputs(const Models& models, int threads) {
  const Folder folder;
  put_inputs(models, folder);
  const std::string path = folder.file("input1");
  begin_case("merge of an input that is cut short while mapped, threads=%d", threads);
  {
    MergeExecutor executor(models.in_files(folder, "cut", threads));
    EXPECT(::truncate(path.c_str(), 4096) == 0);
    EXPECT(holds(message_of([&] { run_all(executor, folder, "cut", false, {}); }), "was cut short while it was read"));
  }
  begin_case("merge of an input shorter than planned, threads=%d", threads);
  MergeExecutor executor(models.in_files(folder, "short", threads));
  EXPECT(holds(message_of([&] { run_all(executor, folder, "short", false, {}); }), "is shorter than its header says"));
  begin_case("merge of an empty and of a missing input");
  EXPECT(::truncate(path.c_str(), 0) == 0);
  EXPECT(holds(message_of([&] { models.in_files(folder, "empty", threads); }), "it is empty"));
  EXPECT(::unlink(path.c_str()) == 0);
  EXPECT(holds(message_of([&] { models.in_files(folder, "missing", threads); }), "cannot open"));
}

void unwritable_outputs(const Models& models, int threads) {
  const Folder folder;
  put_inputs(models, folder);
  begin_case("merge into a folder that is not there, and over a file, threads=%d", threads);
  MergeExecutor nowhere(models.in_files(folder, "missing/output", threads));
  EXPECT(holds(message_of([&] { nowhere.reserve({0}); }), "cannot create"));
  EXPECT(holds(message_of([&] { nowhere.run(0, {}); }), "cannot open"));
  EXPECT(!message_of([&] { nowhere.run(output_count, {}); }).empty());
  write_file(folder.file("taken0"), {'x'});
  MergeExecutor taken(models.in_files(folder, "taken", threads));
  EXPECT(holds(message_of([&] { taken.reserve({0}); }), "cannot create"));
  EXPECT(read_file(folder.file("taken0")).size() == 1);
  if (::access("/dev/full", W_OK) != 0) return;
  begin_case("merge onto a full disk, threads=%d", threads);
  EXPECT(::symlink("/dev/full", folder.file("full1").c_str()) == 0);
  MergeExecutor full(models.in_files(folder, "full", threads));
  EXPECT(holds(message_of([&] { full.run(1, {}); }), "No space left on device"));
}

void stopped_merges(const Models& models, int threads) {
  const Folder folder;
  put_inputs(models, folder);
  MergeExecutor whole(models.in_files(folder, "whole", threads));
  int64_t calls = 0;
  const Merged expected = run_all(whole, folder, "whole", false, [&](int64_t) { ++calls; });
  for (const int64_t stop : {int64_t{1}, calls / 2, calls}) {
    begin_case("merge stopped at call %ld of %ld of its progress function, threads=%d", stop, calls, threads);
    const std::string prefix = "stopped" + std::to_string(stop) + "-";
    MergeExecutor executor(models.in_files(folder, prefix, threads));
    executor.reserve({0, 1, 2});
    int64_t left = stop;
    const std::string message = message_of([&] {
      for (size_t output = 0; output < output_count; ++output) {
        executor.run(output, [&](int64_t) {
          if (--left == 0) throw std::runtime_error("enough");
        });
      }
    });
    // How many chunks the calling thread gets is up to the threads.
    EXPECT(message == "enough" || (left > 0 && message.empty() && stop > 1));
    for (size_t output = 0; output < output_count; ++output) {
      executor.run(output, {});
      EXPECT(read_file(folder.file(prefix + std::to_string(output))) == expected.files[output]);
    }
  }
}

int64_t open_descriptors() {
  int64_t count = 0;
  DIR* const folder = ::opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  while (::readdir(folder) != nullptr) ++count;
  ::closedir(folder);
  return count;
}

}  // namespace

void thread_pools() {
  for (const int threads : {1, 2, 4, 9, 33}) {
    begin_case("thread_pool threads=%d", threads);
    int64_t ticks = 0;
    ThreadPool pool(threads, [&] { ++ticks; });
    for (const int64_t count : {0, 1, 2, 3, 40, 1000}) {
      std::vector<int64_t> seen(static_cast<size_t>(count));
      std::atomic<int64_t> inner{0};
      pool.parallel()(count, [&](int64_t i) {
        ++seen[static_cast<size_t>(i)];
        // From inside it runs in place.
        pool.parallel()(3, [&](int64_t) { ++inner; });
      });
      for (const int64_t times : seen) EXPECT(times == 1);
      EXPECT(inner == 3 * count);
    }
    // The calling thread may find nothing left to do.
    EXPECT(ticks > 0 || threads > 1);
    for (int repeat = 0; repeat < 20; ++repeat) {
      const std::string message = message_of([&] {
        pool.parallel()(100, [&](int64_t i) {
          if (i % 10 == 3) throw std::runtime_error("item");
        });
      });
      EXPECT(message == "item");
    }
  }
  begin_case("thread_pool of nothing to do");
  for (int repeat = 0; repeat < 50; ++repeat) ThreadPool(5, {});
}

void merges() {
  Random random(14);
#ifdef __SANITIZE_THREAD__
  // Large tensors take the same ways through the threads in most recipes.
  const auto large = [](const Recipe& recipe) { return recipe.tuned == DType::bf16 && (recipe.histogram || recipe.stages.model_scope); };
#else
  const auto large = [](const Recipe& recipe) { return recipe.tasks < 9; };
#endif
  const int64_t before = open_descriptors();
  for (const Recipe& recipe : recipes()) {
    whole_merge(recipe, false, {1, 4, 33}, random);
    if (large(recipe)) whole_merge(recipe, true, {1, 5}, random);
  }
  for (const int threads : {1, 5}) {
    const Models sum(recipes().front(), threads > 1, random), ties(recipes()[2], false, random);
    refused_nonfinite(ties, threads);
    shortened_inputs(sum, threads);
    shortened_inputs(ties, threads);
    unwritable_outputs(ties, threads);
    stopped_merges(ties, threads);
    stopped_merges(Models(recipes()[4], threads > 1, random), threads);
  }
  begin_case("files left open by merges");
  EXPECT(open_descriptors() == before);
}

}  // namespace taskloom::sanitize
