// The searches for cuts of several deltas at once, which only kernels call, as ops of their own.
#include <optional>
#include <vector>

#include "common/cuda_launch.h"
#include "masked/device_delta_cuda.h"

namespace taskloom {
namespace {

struct Deltas {
  std::vector<DeltaTensors> tensors;
  std::vector<DeviceDelta> deltas;
  bool wide = false;

  Deltas(const std::vector<Tensor>& tuned, const std::optional<Tensor>& base) {
    for (const Tensor& one : tuned) {
      tensors.emplace_back(one, base);
      deltas.push_back(device_delta(tensors.back()));
      wide = wide || is_wide(tensors.back().delta());
    }
  }
};

Tensor cuts(std::vector<Tensor> tuned, std::optional<Tensor> base, std::vector<int64_t> ranks, bool by_row) {
  const Deltas all(tuned, base);
  const DeltaTensors& first = all.tensors.front();
  const auto each = static_cast<int>(ranks.size() / tuned.size());
  if (by_row) return find_row_cuts(first.tuned, all.deltas, first.rows(), first.row_length, ranks, each, all.wide);
  return find_cuts(first.tuned, all.deltas, first.numel, ranks, each, all.wide);
}

}  // namespace

STABLE_TORCH_LIBRARY(taskloom_magnitude_checks, m) { m.def("cuts(Tensor[] tuned, Tensor? base, int[] ranks, bool by_row) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(taskloom_magnitude_checks, CPU, m) { m.impl("cuts", TORCH_BOX(&cuts)); }

}  // namespace taskloom
