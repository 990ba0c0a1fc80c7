// sparse_merge, sparse_merge_out, sparse_merge_statistics_out: their passes on a GPU, in the order in which they need each other: cuts of
// magnitudes, selections by row, L1 factors, the majority's sign, the merge. What one pass finds stays on the device for the next, and
// nothing waits for it.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/cuda_table.h"
#include "masked/sparse_merge_arguments.h"
#include "masked/sparse_merge_cuda.h"

namespace taskloom {
namespace {

// Bytes that selections by row take at a time: longer tensors are merged in ranges of rows. The emulator's are few, so that small tensors
// already have several.
#ifdef TASKLOOM_CUDA_EMULATED
constexpr int64_t selection_room = 8 << 10;
#else
constexpr int64_t selection_room = 256 << 20;
#endif

// A word below this keeps an entry of probability p; 2^32 keeps it always.
int64_t dropout_limit(double probability) { return static_cast<int64_t>(__builtin_nearbyint(probability * 4294967296.0)); }

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

class CudaMerge {
 public:
  CudaMerge(const MergeArguments& arguments, const Tensor& out)
      : bound_(bind_arguments(arguments)), where_(arguments.tuned.front()), out_(out), wide_(bound_.merge.wide()) {
    const SparseMerge& merge = bound_.merge;
    STD_TORCH_CHECK(out.numel() == merge.numel, "out: expected ", merge.numel, " entries, got ", out.numel());
    dtype_of(out, "out");
    direct_ = writable_in_place(out, bound_.tensors);
    target_ = direct_ ? out : torch::stable::new_empty(out, out.sizes(), out.scalar_type());
    set_stages();
    plan_rows();
    write_tasks();
    like_ = alike(device_.out) && (merge.base == nullptr || alike(device_.base));
  }

  void run() {
    if (merge().numel == 0) return;
    prepare();
    if (merge().elect != Elect::none && merge().zero_sign == 0) count_signs();
    merge_all();
  }

  Statistics run_with_statistics() {
    Tensor kept = zero_tensor({device_.count}, ScalarType::Long), conflicts = zero_tensor({}, ScalarType::Long);
    Tensor dots = zero_tensor({device_.count, device_.count}, ScalarType::Double), nonfinite = zero_tensor({}, ScalarType::Bool);
    Tensor sign_sum = zero_tensor({}, ScalarType::Long);
    if (merge().numel > 0) {
      prepare();
      const MergeCounts counts{static_cast<int64_t*>(kept.mutable_data_ptr()), static_cast<int64_t*>(conflicts.mutable_data_ptr()),
                               static_cast<int64_t*>(sign_sum.mutable_data_ptr()), static_cast<uint8_t*>(nonfinite.mutable_data_ptr())};
      for_each_range([&] { add_counts(where_, wide_, device_, counts); });
      if (merge().elect != Elect::none && merge().zero_sign == 0) device_.sign_sum = counts.sign_sum;
      // Before the merge, which may write over a tensor that it reads.
      DeviceMerge all = device_;
      all.begin = 0, all.end = merge().numel;
      find_dots(where_, wide_, all, static_cast<double*>(dots.mutable_data_ptr()));
      merge_all();
    }
    return {kept, conflicts, dots, nonfinite, sign_sum};
  }

 private:
  const SparseMerge& merge() const { return bound_.merge; }

  // What the merge and its statistics need to know.
  void prepare() {
    if (device_.select == DeviceSelect::cuts) find_tensor_cuts();
    if (merge().rescale == Rescale::l1 && merge().select != Select::all) set_factors();
  }

  void merge_all() {
    for_each_range([&] {
      DeviceMerge left = device_;
      left.begin = merge_fused(where_, device_, like_);
      merge_entries(where_, wide_, left);
    });
    if (!direct_) torch::stable::copy_(out_, target_);
  }

  Tensor zero_tensor(std::vector<int64_t> sizes, ScalarType dtype) const {
    Tensor made = torch::stable::new_empty(where_, sizes, dtype);
    clear(made);
    return made;
  }

  // A byte tensor that lives as long as this.
  void* temporary(int64_t bytes) {
    temporaries_.push_back(torch::stable::new_empty(where_, {bytes}, ScalarType::Byte));
    return temporaries_.back().mutable_data_ptr();
  }

  template <class T>
  T* zeros(int64_t count) {
    T* const data = static_cast<T*>(temporary(count * static_cast<int64_t>(sizeof(T))));
    clear(temporaries_.back());
    return data;
  }

  void set_stages() {
    device_.numel = device_.end = merge().numel;
    device_.seed = merge().seed;
    device_.scale = merge().scale;
    device_.divisor = wide_ ? mean_divisor<double>() : mean_divisor<float>();
    device_.count = static_cast<int32_t>(merge().tasks.size());
    device_.elect = merge().elect;
    device_.zero_sign = merge().zero_sign;
    device_.vote = merge().vote;
    device_.consensus_k = merge().consensus_k;
    device_.combine = merge().combine;
    device_.out = device_values(target_, "out");
    if (merge().base != nullptr) device_.base = values_at(merge().base, merge().base_dtype);
    switch (merge().select) {
      case Select::all:
        device_.select = DeviceSelect::all;
        break;
      case Select::magnitude:
        device_.select = DeviceSelect::cuts;
        break;
      case Select::dropout:
        device_.select = DeviceSelect::dropout;
        break;
      case Select::rank_dropout:
        device_.select = merge().rescale == Rescale::density ? DeviceSelect::multipliers : DeviceSelect::bits;
        break;
      default:
        device_.select = DeviceSelect::bits;
    }
  }

  template <class Acc>
  double mean_divisor() const {
    Acc sum = 0;
    for (const MergeTask& task : merge().tasks) sum += static_cast<Acc>(task.weight);
    return (sum < 0 ? -sum : sum) < static_cast<Acc>(1e-8) ? 1.0 : static_cast<double>(sum);
  }

  static DeviceValues values_at(const void* data, DType dtype) {
    return {const_cast<void*>(data), dtype, (reinterpret_cast<uintptr_t>(data) & 15) == 0};
  }

  // Whether a tensor and the tuned ones have one dtype, and addresses that suit whole vectors.
  bool alike(const DeviceValues& values) const {
    const auto& tasks = merge().tasks;
    return values.aligned != 0 && std::all_of(tasks.begin(), tasks.end(), [&](const MergeTask& task) {
             return task.dtype == values.dtype && values_at(task.tuned, task.dtype).aligned != 0;
           });
  }

  // Sets how many entries a range has, and gives it the memory of its selection.
  void plan_rows() {
    range_ = merge().numel;
    if (!merge().by_row() || range_ == 0) return;
    const int64_t length = merge().row_length, rows = rows_of_bundle(length);
    const bool divided = device_.select == DeviceSelect::multipliers;
    const int64_t bits = divided ? (wide_ ? 64 : 32) : 1;  // of an entry of a task
    const int64_t cuts = merge().select == Select::row_magnitude ? 2 * static_cast<int64_t>(sizeof(DeviceCut)) : 0;  // of a row of a task
    const int64_t bundle = (rows * length * bits / 8 + rows * cuts) * device_.count;
    range_ = std::min(range_, std::max<int64_t>(1, selection_room / bundle) * rows * length);
    stride_ = vectors(range_) * vector_entries;
    selected_ = temporary(stride_ * device_.count * bits / 8);
    if (divided) device_.multipliers = selected_, device_.multiplier_stride = stride_;
  }

  std::vector<int64_t> ranks() const {
    std::vector<int64_t> ranks;
    for (const MergeTask& task : merge().tasks) ranks.insert(ranks.end(), {task.rank_begin, task.rank_end});
    return ranks;
  }

  // The deltas from entry `first` on.
  std::vector<DeviceDelta> deltas(int64_t first) const {
    auto from = [&](const void* data, DType dtype) {
      return data == nullptr ? DeviceValues{} : values_at(static_cast<const char*>(data) + first * element_size(dtype), dtype);
    };
    std::vector<DeviceDelta> deltas;
    for (const MergeTask& task : merge().tasks) deltas.push_back({from(task.tuned, task.dtype), from(merge().base, merge().base_dtype)});
    return deltas;
  }

  void write_tasks() {
    std::vector<DeviceTask> tasks;
    for (const MergeTask& task : merge().tasks) {
      DeviceTask row;
      row.tuned = values_at(task.tuned, task.dtype);
      row.mask = const_cast<uint8_t*>(task.mask);
      if (selected_ != nullptr && device_.multipliers == nullptr)
        row.mask = static_cast<uint8_t*>(selected_) + static_cast<int64_t>(tasks.size()) * stride_ / 8;
      row.key = task.key;
      row.limit = dropout_limit(task.density);
      row.weight = task.weight;
      row.factor = merge().rescale == Rescale::density && merge().select == Select::dropout && task.density > 0 ? 1 / task.density : 1;
      row.tall_mask_lambda = task.tall_mask_lambda;
      const bool ranked = merge().row_length > 1 && task.epsilon != 0;
      row.lowest = static_cast<float>(ranked ? task.density - task.epsilon : task.density);
      row.spread = ranked ? static_cast<float>(2 * task.epsilon) : 0;
      tasks.push_back(row);
    }
    temporaries_.push_back(device_table(where_, tasks));
    tasks_ = static_cast<DeviceTask*>(temporaries_.back().mutable_data_ptr());
    device_.tasks = tasks_;
  }

  void find_tensor_cuts() {
    const auto& given = bound_.given;
    const Tensor cuts = given ? cuts_of_thresholds(where_, deltas(0), merge().numel, given->threshold, given->equal_kept, 2, wide_)
                              : find_cuts(where_, deltas(0), merge().numel, ranks(), 2, wide_);
    temporaries_.push_back(cuts);
    device_.cuts = static_cast<const DeviceCut*>(cuts.const_data_ptr());
  }

  // Selects within the rows of the range that `device_` stands at.
  void select_rows() {
    const int64_t length = merge().row_length;
    if (merge().select == Select::rank_dropout) {
      select_rows_by_rank(where_, wide_, device_, length);
      return;
    }
    const int64_t rows = (device_.end - device_.begin) / length;
    const Tensor cuts = find_row_cuts(where_, deltas(device_.begin), rows, length, ranks(), 2, wide_);
    select_row_bands(where_, wide_, device_, length, static_cast<const DeviceCut*>(cuts.const_data_ptr()));
  }

  // Runs a pass over ranges of rows whose selection fits; a single range is selected once for all passes.
  template <class Pass>
  void for_each_range(Pass pass) {
    for (int64_t first = 0; first < merge().numel; first += range_) {
      device_.begin = first;
      if (selected_ != nullptr) device_.first = first;
      device_.end = std::min(merge().numel, first + range_);
      if (selected_ != nullptr && (!selection_done_ || range_ < merge().numel)) {
        select_rows();
        selection_done_ = true;
      }
      pass();
    }
  }

  void set_factors() {
    auto* const totals = zeros<double>(2 * device_.count);
    for_each_range([&] { add_norms(where_, wide_, device_, totals); });
    set_l1_factors(where_, totals, tasks_, device_.count);
  }

  void count_signs() {
    auto* const sum = zeros<int64_t>(1);
    for_each_range([&] { add_elected_signs(where_, wide_, device_, sum); });
    device_.sign_sum = sum;
  }

  BoundMerge bound_;
  Tensor where_, out_, target_;
  bool wide_, direct_ = false, like_ = false, selection_done_ = false;
  DeviceMerge device_;
  DeviceTask* tasks_ = nullptr;
  int64_t range_ = 0, stride_ = 0;
  void* selected_ = nullptr;
  std::vector<Tensor> temporaries_;
};

Tensor sparse_merge_cuda(std::optional<Tensor> base, std::vector<Tensor> tuned, std::vector<double> weight, Text select, bool by_row,
                         std::vector<int64_t> rank_begin, std::vector<int64_t> rank_end, std::optional<Tensor> threshold,
                         std::optional<Tensor> equal_kept, std::vector<Tensor> masks, std::vector<double> density,
                         std::vector<double> epsilon, int64_t seed, int64_t key, Text rescale, Text elect, int64_t zero_sign, Text vote,
                         int64_t consensus_k, std::vector<double> tall_mask_lambda, Text combine, double scale, ScalarType dtype) {
  STD_TORCH_CHECK(!tuned.empty(), "tuned: expected at least one tensor");
  Tensor out = torch::stable::new_empty(tuned.front(), tuned.front().sizes(), dtype);
  CudaMerge(
      {base,    tuned, weight, select.value,  by_row,      rank_begin, rank_end,   threshold,   equal_kept,       masks,         density,
       epsilon, seed,  key,    rescale.value, elect.value, zero_sign,  vote.value, consensus_k, tall_mask_lambda, combine.value, scale},
      out)
      .run();
  return out;
}

void sparse_merge_out_cuda(std::optional<Tensor> base, std::vector<Tensor> tuned, std::vector<double> weight, Text select, bool by_row,
                           std::vector<int64_t> rank_begin, std::vector<int64_t> rank_end, std::optional<Tensor> threshold,
                           std::optional<Tensor> equal_kept, std::vector<Tensor> masks, std::vector<double> density,
                           std::vector<double> epsilon, int64_t seed, int64_t key, Text rescale, Text elect, int64_t zero_sign, Text vote,
                           int64_t consensus_k, std::vector<double> tall_mask_lambda, Text combine, double scale, Tensor out) {
  STD_TORCH_CHECK(!tuned.empty(), "tuned: expected at least one tensor");
  CudaMerge(
      {base,    tuned, weight, select.value,  by_row,      rank_begin, rank_end,   threshold,   equal_kept,       masks,         density,
       epsilon, seed,  key,    rescale.value, elect.value, zero_sign,  vote.value, consensus_k, tall_mask_lambda, combine.value, scale},
      out)
      .run();
}

Statistics sparse_merge_statistics_out_cuda(std::optional<Tensor> base, std::vector<Tensor> tuned, std::vector<double> weight, Text select,
                                            bool by_row, std::vector<int64_t> rank_begin, std::vector<int64_t> rank_end,
                                            std::optional<Tensor> threshold, std::optional<Tensor> equal_kept, std::vector<Tensor> masks,
                                            std::vector<double> density, std::vector<double> epsilon, int64_t seed, int64_t key,
                                            Text rescale, Text elect, int64_t zero_sign, Text vote, int64_t consensus_k,
                                            std::vector<double> tall_mask_lambda, Text combine, double scale, Tensor out) {
  STD_TORCH_CHECK(!tuned.empty(), "tuned: expected at least one tensor");
  return CudaMerge({base,       tuned,      weight,      select.value,     by_row,        rank_begin, rank_end,      threshold,
                    equal_kept, masks,      density,     epsilon,          seed,          key,        rescale.value, elect.value,
                    zero_sign,  vote.value, consensus_k, tall_mask_lambda, combine.value, scale},
                   out)
      .run_with_statistics();
}

}  // namespace

TASKLOOM_CUDA_OPS(m) {
  m.impl("sparse_merge", TORCH_BOX(&sparse_merge_cuda));
  m.impl("sparse_merge_out", TORCH_BOX(&sparse_merge_out_cuda));
  m.impl("sparse_merge_statistics_out", TORCH_BOX(&sparse_merge_statistics_out_cuda));
}

}  // namespace taskloom
