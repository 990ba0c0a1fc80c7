// multi_task_vector: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "masked/multi_task_vector.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

Tensor multi_task_vector_cpu(const Tensor& base, std::vector<Tensor> tuned, std::vector<double> weight) {
  const int64_t numel = base.numel();
  STD_TORCH_CHECK(!tuned.empty() && weight.size() == tuned.size(), "weight: expected one for each of ", tuned.size(),
                  " tasks (at least 1), got ", weight.size());
  const Tensor flat_base = contiguous_of(base);
  std::vector<Tensor> flat;
  std::vector<Elements> elements;
  MultiTaskVector view{elements_of(flat_base, "base"), nullptr, weight.data(), static_cast<int64_t>(tuned.size())};
  bool wide = view.base.dtype == DType::f64;
  for (const Tensor& one : tuned) {
    check_numel(one, numel, "tuned", "base");
    flat.push_back(contiguous_of(one));
    elements.push_back(elements_of(flat.back(), "tuned"));
    wide = wide || elements.back().dtype == DType::f64;
  }
  view.tuned = elements.data();
  Tensor out = empty_of_shape(base, wide ? ScalarType::Double : ScalarType::Float);
  void* to = out.mutable_data_ptr();
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    multi_task_vector_loops().sum(wide, view, begin, std::min(chunk, numel - begin), to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("multi_task_vector", TORCH_BOX(&multi_task_vector_cpu)); }

}  // namespace taskloom
