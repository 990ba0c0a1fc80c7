// Small models in files or in memory, and the plans that merge them.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "buffers.h"
#include "merge/executor.h"

namespace taskloom::sanitize {

// A folder of its own, gone with its owner.
class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

void write_file(const std::string& path, const std::vector<char>& content);
std::vector<char> read_file(const std::string& path);

// One way of merging the models.
struct Recipe {
  const char* name;
  JobStages stages;
  DType base = DType::bf16, tuned = DType::bf16, out = DType::bf16;
  int64_t tasks = 3;
  bool based = true, histogram = false;
};

std::vector<Recipe> recipes();

struct Tensor {
  std::string name;
  int64_t rows, row_length;
  bool copied, floating;
  int64_t numel() const { return rows * row_length; }
};

// Tensors of both kinds that the executor tells apart: few large ones, each spread over the threads, and many that share them. What is
// copied is of 3-byte elements, or converted.
std::vector<Tensor> model_tensors(bool with_large);

// A model's tensors for one recipe, as bytes: the base first, then one per task.
struct Models {
  Recipe recipe;
  std::vector<Tensor> tensors;
  std::vector<std::vector<char>> files;
  std::vector<std::vector<int64_t>> offsets;  // [file][tensor]

  Models(const Recipe& made, bool with_large, Random& random);
  int64_t output_bytes(size_t output) const;
  // The plan's jobs, output by output in turn; the places are offsets in files.
  std::vector<MergeJob> jobs() const;
  // Inputs and outputs as files in `folder`, where the inputs were put before; outputs are named `prefix` with their number.
  MergeRun in_files(const Folder& folder, const std::string& prefix, int threads) const;
};

constexpr size_t output_count = 3;
const std::string& output_header();

}  // namespace taskloom::sanitize
