// Reads the plan's dataclasses (python/taskloom/merge/plan.py) into the executor's structures, by the same field names.
#include "merge/binding.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "merge/executor.h"
#include "merge/files.h"
#include "merge/memory_account.h"

namespace py = pybind11;

namespace taskloom {
namespace {

template <class Enum>
Enum named(const py::handle& value, const std::map<std::string, Enum>& names, const char* field) {
  const auto found = names.find(value.cast<std::string>());
  if (found == names.end()) throw std::invalid_argument(std::string(field) + ": unknown value '" + value.cast<std::string>() + "'");
  return found->second;
}

const std::map<std::string, DType> dtypes{{"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16}, {"F64", DType::f64}};

bool is_floating(const py::handle& place) { return dtypes.count(place.attr("dtype").cast<std::string>()) > 0; }

Place place_of(const py::handle& place) {
  Place read;
  read.file = place.attr("file").cast<int>();
  read.offset = place.attr("offset").cast<int64_t>();
  if (is_floating(place)) read.dtype = named(place.attr("dtype"), dtypes, "dtype");
  return read;
}

template <class T>
T entry(const std::vector<T>& values, size_t index, T otherwise) {
  return index < values.size() ? values[index] : otherwise;
}

JobStages stages_of(const py::handle& stages, uint64_t seed, uint64_t key) {
  JobStages read;
  SparseMerge& merge = read.merge;
  const auto scope = stages.attr("scope").cast<std::string>();
  merge.select = named<Select>(
      stages.attr("select"),
      {{"all", Select::all}, {"magnitude", Select::magnitude}, {"dropout", Select::dropout}, {"rank_dropout", Select::rank_dropout}},
      "select");
  if (merge.select == Select::magnitude && scope == "row") merge.select = Select::row_magnitude;
  read.model_scope = merge.select == Select::magnitude && scope == "model";
  merge.rescale =
      named<Rescale>(stages.attr("rescale"), {{"none", Rescale::none}, {"density", Rescale::density}, {"l1", Rescale::l1}}, "rescale");
  merge.elect = named<Elect>(stages.attr("elect"),
                             {{"none", Elect::none}, {"sign_sum", Elect::sign_sum}, {"sign_count", Elect::sign_count}}, "elect");
  merge.vote = named<Vote>(stages.attr("vote"), {{"none", Vote::none}, {"selected", Vote::selected}, {"tall", Vote::tall}}, "vote");
  merge.combine = named<Combine>(
      stages.attr("combine"), {{"sum", Combine::sum}, {"weighted_mean", Combine::weighted_mean}, {"disjoint_mean", Combine::disjoint_mean}},
      "combine");
  merge.consensus_k = stages.attr("consensus_k").cast<int>();
  merge.scale = stages.attr("scale").cast<double>();
  merge.seed = seed;
  merge.statistics = true;
  read.zero_majority = stages.attr("zero_sign").cast<std::string>() == "majority";
  read.slerp = stages.attr("interpolation").cast<std::string>() == "slerp";
  read.t = stages.attr("t").cast<double>();
  const auto weight = stages.attr("weight").cast<std::vector<double>>();
  const auto rank_begin = stages.attr("rank_begin").cast<std::vector<int64_t>>();
  const auto rank_end = stages.attr("rank_end").cast<std::vector<int64_t>>();
  const auto density = stages.attr("density").cast<std::vector<double>>();
  const auto epsilon = stages.attr("epsilon").cast<std::vector<double>>();
  const auto lambda = stages.attr("tall_mask_lambda").cast<std::vector<double>>();
  for (size_t t = 0; t < weight.size(); ++t) {
    MergeTask task;
    task.weight = weight[t];
    task.rank_begin = entry<int64_t>(rank_begin, t, 0);
    task.rank_end = entry<int64_t>(rank_end, t, 0);
    task.density = entry(density, t, 1.0);
    task.epsilon = entry(epsilon, t, 0.0);
    task.tall_mask_lambda = entry(lambda, t, 1.0);
    task.key = key + t * task_key_step;
    merge.tasks.push_back(task);
  }
  return read;
}

MergeJob job_of(const py::handle& job, const py::handle& element_bits, uint64_t seed) {
  MergeJob read;
  read.name = job.attr("name").cast<std::string>();
  const auto shape = job.attr("shape").cast<std::vector<int64_t>>();
  read.numel = 1;
  for (const int64_t size : shape) read.numel *= size;
  read.floating = is_floating(job.attr("target"));
  read.target = place_of(job.attr("target"));
  if (!job.attr("base").is_none()) {
    read.base = place_of(job.attr("base"));
    if (is_floating(job.attr("base")) != read.floating)
      throw std::invalid_argument("tensor '" + read.name + "': a copy cannot change its kind");
  }
  read.bytes = read.numel * element_bits[job.attr("target").attr("dtype")].cast<int64_t>() / 8;
  for (const py::handle place : job.attr("tuned")) read.tuned.push_back(place_of(place));
  if (!job.attr("stages").is_none()) {
    read.stages = stages_of(job.attr("stages"), seed, job.attr("key").cast<uint64_t>());
    if (read.stages->merge.tasks.size() != read.tuned.size())
      throw std::invalid_argument("tensor '" + read.name + "': one weight per tuned tensor");
    SparseMerge& merge = read.stages->merge;
    merge.row_length = read.numel == 0 ? 0 : shape.empty() ? 1 : shape.back();
    // One row is spread over the threads as a tensor is.
    if (merge.select == Select::row_magnitude && merge.row_length == read.numel) merge.select = Select::magnitude;
    if (merge.select == Select::rank_dropout && merge.row_length > longest_ranked_row)
      throw std::invalid_argument("tensor '" + read.name + "': rows of more than " + std::to_string(longest_ranked_row) +
                                  " entries cannot be ranked");
  } else if (!read.base) {
    throw std::invalid_argument("tensor '" + read.name + "': a copy needs a base");
  }
  return read;
}

// As the file system has it: a name need not be UTF-8.
std::string path_of(const py::handle& path) {
  return py::reinterpret_steal<py::bytes>(PyUnicode_EncodeFSDefault(py::str(path).ptr())).cast<std::string>();
}

py::dict result_of(const JobResult& result, size_t tasks) {
  py::dict read;
  py::list dots;
  const std::vector<double>& upper = result.statistics.dots;
  for (size_t row = 0; row < tasks; ++row) {
    py::list line;
    for (size_t column = 0; column < tasks; ++column) {
      const size_t low = std::min(row, column), high = std::max(row, column);
      const size_t index = low * tasks - low * (low + 1) / 2 + high;
      line.append(index < upper.size() ? upper[index] : 0.0);
    }
    dots.append(line);
  }
  read["kept"] = result.statistics.kept;
  read["conflicts"] = result.statistics.conflicts;
  read["dots"] = dots;
  read["seconds"] = result.seconds;
  read["magnitude_histogram"] = result.histogram;
  return read;
}

std::vector<MergeJob> jobs_of(const py::object& plan, const py::dict& element_bits) {
  std::vector<MergeJob> jobs;
  const auto seed = plan.attr("seed").cast<uint64_t>();
  for (const py::handle job : plan.attr("jobs")) jobs.push_back(job_of(job, element_bits, seed));
  return jobs;
}

// Inputs are paths, or 0 for the process's own memory (offsets are addresses); outputs are (path, header, size), or 0.
MergeRun run_of(const py::list& inputs, const py::list& outputs, const py::object& plan, const py::dict& element_bits, int threads,
                bool magnitude_histogram, int64_t room) {
  MergeRun run;
  for (const py::handle input : inputs) {
    if (py::isinstance<py::int_>(input)) {
      run.inputs.emplace_back(input.cast<uintptr_t>());
    } else {
      run.inputs.emplace_back(path_of(input));
    }
  }
  for (const py::handle output : outputs) {
    if (py::isinstance<py::int_>(output)) {
      run.outputs.emplace_back(output.cast<uintptr_t>());
    } else {
      const auto [path, header, size] = output.cast<std::tuple<py::object, py::bytes, int64_t>>();
      run.outputs.emplace_back(path_of(path), std::string(header), size);
    }
  }
  run.models = plan.attr("models").cast<std::vector<std::string>>();
  run.allow_nonfinite = plan.attr("allow_nonfinite").cast<bool>();
  run.magnitude_histogram = magnitude_histogram;
  run.threads = std::max(1, threads);
  run.room = room;
  run.jobs = jobs_of(plan, element_bits);
  return run;
}

// What the merge itself reports, apart from what a caller's progress function raises.
class MergeFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class Work>
auto reporting(const Work& work) {
  try {
    return work();
  } catch (const py::error_already_set&) {
    throw;
  } catch (const std::runtime_error& error) {
    throw MergeFailure(error.what());
  } catch (const std::logic_error& error) {
    throw MergeFailure(error.what());
  }
}

std::unique_ptr<MergeExecutor> make_executor(const py::list& inputs, const py::list& outputs, const py::object& plan,
                                             const py::dict& element_bits, int threads, bool magnitude_histogram, int64_t room) {
  return reporting(
      [&] { return std::make_unique<MergeExecutor>(run_of(inputs, outputs, plan, element_bits, threads, magnitude_histogram, room)); });
}

py::list run_output(MergeExecutor& executor, size_t output, const py::object& progress) {
  auto last = std::chrono::steady_clock::now();
  int64_t latest = 0;
  const auto tick = [&](int64_t done) {
    latest = done;
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(100)) return;
    last = now;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done);
  };
  const std::vector<JobResult> results = reporting([&] {
    const py::gil_scoped_release release;
    return executor.run(output, tick);
  });
  if (!progress.is_none()) progress(latest);
  py::list read;
  const std::vector<size_t>& jobs = executor.jobs_of(output);
  for (size_t i = 0; i < results.size(); ++i) {
    const MergeJob& job = executor.plan().jobs[jobs[i]];
    read.append(job.stages ? py::object(result_of(results[i], job.tuned.size())) : py::object(py::none()));
  }
  return read;
}

}  // namespace

void bind_merge(py::module_& m) {
  py::register_exception<MergeFailure>(m, "MergeFailure", PyExc_RuntimeError);
  py::class_<MergeExecutor>(m, "MergeExecutor", "Carries out a taskloom.merge.plan.MergePlan, one output file at a time.")
      .def(py::init(&make_executor), py::arg("inputs"), py::arg("outputs"), py::arg("plan"), py::arg("element_bits"), py::arg("threads"),
           py::arg("magnitude_histogram"), py::arg("room") = default_room)
      .def(
          "reserve",
          [](const MergeExecutor& executor, const std::vector<size_t>& outputs) {
            const py::gil_scoped_release release;
            reporting([&] { executor.reserve(outputs); });
          },
          py::arg("outputs"), "Create output files with their room on the disk and their headers.")
      .def("run", &run_output, py::arg("output"), py::arg("progress"),
           "Merge the tensors of one output file; one result per job of it, in plan order, None for copies.");
  py::class_<MemoryAccount>(m, "MemoryAccount", "What MergeExecutor allocates for a plan; opens no file.")
      .def(py::init([](const py::object& plan, const py::dict& element_bits, bool magnitude_histogram) {
             return reporting([&] { return MemoryAccount(jobs_of(plan, element_bits), magnitude_histogram); });
           }),
           py::arg("plan"), py::arg("element_bits"), py::arg("magnitude_histogram"))
      .def("needed", &MemoryAccount::needed, py::arg("threads"), py::arg("room"),
           "The most bytes that the compiled side takes with so many threads and so much room between passes.")
      .def_static("least_room", &MemoryAccount::least_room, py::arg("threads"), "The least room that this many threads can work with.");
  py::class_<OutputFile>(m, "OutputFile", "A file to be written in place, as MergeExecutor writes its own.")
      .def(py::init([](const py::object& path, const py::bytes& header, int64_t size) {
             return std::make_unique<OutputFile>(path_of(path), std::string(header), size);
           }),
           py::arg("path"), py::arg("header"), py::arg("size"))
      .def(
          "reserve",
          [](const OutputFile& file) {
            const py::gil_scoped_release release;
            reporting([&] { file.reserve(); });
          },
          "Create the file with its room on the disk and its header; it must not exist.")
      .def(
          "open", [](OutputFile& file) { reporting([&] { file.open(); }); }, "Open the reserved file for writing.")
      .def(
          "write",
          [](const OutputFile& file, int64_t offset, uintptr_t address, int64_t bytes) {
            const py::gil_scoped_release release;
            reporting([&] { file.write(offset, reinterpret_cast<const void*>(address), bytes); });
          },
          py::arg("offset"), py::arg("address"), py::arg("bytes"), "Write so many bytes that lie at an address.")
      .def("close", [](OutputFile& file) { reporting([&] { file.close(); }); }, "Close the file; the next run may open it again.");
  m.attr("default_room") = default_room;
  m.def("exchange_names", &exchange_names, py::arg("first"), py::arg("second"),
        "Swap the names of two files or folders in one step; False where the file system cannot.");
}

}  // namespace taskloom
