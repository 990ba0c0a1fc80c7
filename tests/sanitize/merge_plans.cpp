#include "merge_plans.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <system_error>

namespace taskloom::sanitize {
namespace {

constexpr int64_t copied_element = 3;

DType stored_dtype(const Recipe& recipe, size_t file) { return file == 0 ? recipe.base : recipe.tuned; }

int64_t stored_bytes(const Recipe& recipe, size_t file, const Tensor& tensor) {
  return tensor.numel() * (tensor.floating ? element_size(stored_dtype(recipe, file)) : copied_element);
}

int64_t merged_bytes(const Recipe& recipe, const Tensor& tensor) {
  return tensor.numel() * (tensor.floating ? element_size(recipe.out) : copied_element);
}

}  // namespace

Folder::Folder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "taskloom-sanitize-XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) throw std::system_error(errno, std::generic_category(), "mkdtemp " + pattern);
  path_ = pattern;
}

Folder::~Folder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void write_file(const std::string& path, const std::vector<char>& content) {
  std::ofstream stream(path, std::ios::binary);
  stream.write(content.data(), static_cast<std::streamsize>(content.size()));
  if (!stream.flush()) throw std::runtime_error("cannot write " + path);
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path);
  std::vector<char> content(std::filesystem::file_size(path));
  stream.read(content.data(), static_cast<std::streamsize>(content.size()));
  return content;
}

std::vector<Recipe> recipes() {
  auto stages = [](Select select, Rescale rescale, Elect elect, Vote vote, Combine combine) {
    JobStages made;
    made.merge.select = select;
    made.merge.rescale = rescale;
    made.merge.elect = elect;
    made.merge.vote = vote;
    made.merge.combine = combine;
    made.merge.consensus_k = 2;
    made.merge.statistics = true;
    made.merge.seed = 7;
    return made;
  };
  const JobStages sum = stages(Select::all, Rescale::none, Elect::none, Vote::none, Combine::sum);
  const JobStages ties = stages(Select::magnitude, Rescale::none, Elect::sign_sum, Vote::none, Combine::disjoint_mean);
  JobStages model = ties, slerp = sum;
  model.model_scope = model.zero_majority = true;
  slerp.slerp = true;
  slerp.t = 0.3;
  JobStages dare = stages(Select::dropout, Rescale::l1, Elect::sign_sum, Vote::none, Combine::sum);
  dare.zero_majority = true;
  const JobStages della = stages(Select::rank_dropout, Rescale::l1, Elect::sign_count, Vote::none, Combine::weighted_mean);
  const JobStages rows = stages(Select::row_magnitude, Rescale::l1, Elect::none, Vote::selected, Combine::sum);
  const JobStages tall = stages(Select::all, Rescale::none, Elect::none, Vote::tall, Combine::sum);
  return {
      {"sum", sum},
      {"sum of many", sum, DType::f32, DType::f16, DType::bf16, 9},
      {"ties", ties, DType::bf16, DType::bf16, DType::bf16, 3, true, true},
      {"ties in float64", ties, DType::f64, DType::f32, DType::f64, 2, true, true},
      {"ties of the model", model},
      {"ties of the model, mixed", model, DType::f32, DType::f16, DType::f32},
      {"slerp", slerp, DType::bf16, DType::bf16, DType::bf16, 1, true, true},
      {"slerp, mixed", slerp, DType::f32, DType::f64, DType::f16, 1},
      {"dare", dare, DType::f16, DType::f16, DType::f16},
      {"della", della, DType::f32, DType::f32, DType::f32},
      {"rows", rows, DType::bf16, DType::f32, DType::bf16},
      {"tall", tall},
      {"average", stages(Select::all, Rescale::none, Elect::none, Vote::none, Combine::weighted_mean), DType::bf16, DType::bf16,
       DType::bf16, 4, false},
  };
}

std::vector<Tensor> model_tensors(bool with_large) {
  std::vector<Tensor> tensors{{"copied", 1, 1001, true, false}, {"converted", 3, 999, true, true},  {"empty", 0, 16, false, true},
                              {"scalar", 1, 1, false, true},    {"odd", 7, 17, false, true},        {"column", 301, 1, false, true},
                              {"square", 64, 64, false, true},  {"middle", 129, 1025, false, true}, {"nothing", 0, 3, true, false}};
  if (!with_large) return tensors;
  tensors.push_back({"large", 1025, 1024, false, true});
  tensors.push_back({"large copy", 1, 1400001, true, false});
  tensors.push_back({"large too", 1, (1 << 20) + 1, false, true});
  tensors.push_back({"large conversion", 1, (1 << 20) + 7, true, true});
  return tensors;
}

const std::string& output_header() {
  static const std::string header = "the header, of an odd number of bytes";
  return header;
}

Models::Models(const Recipe& made, bool with_large, Random& random) : recipe(made), tensors(model_tensors(with_large)) {
  for (size_t file = 0; file <= static_cast<size_t>(recipe.tasks); ++file) {
    // Tensors begin anywhere: at odd addresses, with gaps.
    std::vector<char> content(13);
    std::vector<int64_t> begins;
    for (const Tensor& tensor : tensors) {
      begins.push_back(static_cast<int64_t>(content.size()));
      if (tensor.copied && file > 0) continue;
      const Buffer part = tensor.floating
                              ? values(stored_dtype(recipe, file), tensor.numel(), Kind::plain, Placement::heap, random)
                              : values(DType::f16, (stored_bytes(recipe, file, tensor) + 1) / 2, Kind::plain, Placement::heap, random);
      content.insert(content.end(), part.data(), part.data() + stored_bytes(recipe, file, tensor));
    }
    files.push_back(std::move(content));
    offsets.push_back(std::move(begins));
  }
}

int64_t Models::output_bytes(size_t output) const {
  auto bytes = static_cast<int64_t>(output_header().size());
  for (size_t i = output; i < tensors.size(); i += output_count) bytes += merged_bytes(recipe, tensors[i]);
  return bytes;
}

std::vector<MergeJob> Models::jobs() const {
  std::vector<MergeJob> made;
  std::vector<int64_t> ends(output_count, static_cast<int64_t>(output_header().size()));
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    MergeJob job;
    job.name = tensor.name;
    job.numel = tensor.numel();
    job.floating = tensor.floating;
    job.bytes = merged_bytes(recipe, tensor);
    const size_t output = i % output_count;
    job.target = {static_cast<int>(output), ends[output], tensor.floating ? recipe.out : DType::f32};
    ends[output] += job.bytes;
    if (recipe.based || tensor.copied) job.base = Place{0, offsets[0][i], tensor.floating ? recipe.base : DType::f32};
    if (!tensor.copied) {
      job.stages = recipe.stages;
      SparseMerge& merge = job.stages->merge;
      merge.row_length = job.numel == 0 ? 0 : tensor.row_length;
      int64_t segment = merge.select == Select::row_magnitude ? merge.row_length : job.numel;
      if (job.stages->model_scope) segment = 150000;
      for (int64_t t = 0; t < recipe.tasks; ++t) {
        MergeTask task;
        task.weight = 1.0 - 0.2 * static_cast<double>(t);
        task.rank_begin = segment / 50;
        task.rank_end = segment / 50 + segment / 3;
        task.density = 0.4;
        task.epsilon = 0.1;
        task.tall_mask_lambda = 0.4;
        task.key = i * 1000 + static_cast<uint64_t>(t);
        merge.tasks.push_back(task);
        job.tuned.push_back({static_cast<int>(t + 1), offsets[static_cast<size_t>(t + 1)][i], recipe.tuned});
      }
    }
    made.push_back(std::move(job));
  }
  return made;
}

MergeRun Models::in_files(const Folder& folder, const std::string& prefix, int threads) const {
  MergeRun run;
  for (size_t file = 0; file < files.size(); ++file) run.inputs.emplace_back(folder.file("input" + std::to_string(file)));
  for (size_t output = 0; output < output_count; ++output) {
    run.outputs.emplace_back(folder.file(prefix + std::to_string(output)), output_header(), output_bytes(output));
  }
  for (int64_t t = 0; t < recipe.tasks; ++t) run.models.push_back("tuned" + std::to_string(t));
  run.jobs = jobs();
  run.magnitude_histogram = recipe.histogram;
  run.threads = threads;
  return run;
}

}  // namespace taskloom::sanitize
