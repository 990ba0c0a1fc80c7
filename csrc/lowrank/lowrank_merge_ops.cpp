// lowrank_merge, lowrank_merge_, lowrank_merge_tasks, lowrank_norm: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "lowrank/lowrank_merge.h"

namespace taskloom {
namespace {

// Entries of one piece of work.
constexpr int64_t chunk = 1 << 17;
// A multiple of the rows that a tile has at any level, so that a piece's last tile is whole.
constexpr int64_t row_step = 24;

using Optional = std::optional<Tensor>;

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

bool any_wide(const std::vector<Tensor>& tensors) { return std::any_of(tensors.begin(), tensors.end(), is_wide); }

// Rows whose neighbours lie next to each other: the tensor itself, or a copy.
Tensor in_rows(const Tensor& matrix) { return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix); }

LowrankRows rows_of(const Tensor& matrix, const char* name) {
  return {matrix.const_data_ptr(), dtype_of(matrix, name), matrix.size(0) <= 1 ? matrix.size(1) : matrix.stride(0)};
}

std::vector<double> numbers(const Tensor& tensor, int64_t expected, const char* name) {
  const DType dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, name, ": expected a float32 or float64 tensor");
  STD_TORCH_CHECK(tensor.numel() == expected, name, ": expected ", expected, " numbers, got ", tensor.numel());
  const Tensor flat = contiguous_of(tensor);
  std::vector<double> values(static_cast<size_t>(expected));
  for (int64_t i = 0; i < expected; ++i) {
    values[static_cast<size_t>(i)] = dtype == DType::f64 ? static_cast<const double*>(flat.const_data_ptr())[i]
                                                         : static_cast<double>(static_cast<const float*>(flat.const_data_ptr())[i]);
  }
  return values;
}

void check_matrix(const Tensor& matrix, const char* name) {
  dtype_of(matrix, name);
  STD_TORCH_CHECK(matrix.dim() == 2, name, ": expected two dimensions, got ", matrix.dim());
}

void check_size(int64_t got, int64_t expected, const char* what) {
  STD_TORCH_CHECK(got == expected, what, ": expected ", expected, ", got ", got);
}

// One adapter's factors, [rank, columns] and [rows, rank].
struct Adapter {
  Elements a, b;
  int64_t rank;
  double weight;
};

// The packed factors of one product.
class Packed {
 public:
  Packed(bool wide, const std::vector<Adapter>& adapters, int64_t rows, int64_t columns) {
    const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
    int64_t rank = 0;
    for (const Adapter& adapter : adapters) rank += adapter.rank;
    const int64_t panels = (columns + lowrank_panel - 1) / lowrank_panel;
    left_ = empty_cpu({rows, rank}, dtype);
    right_ = empty_cpu({panels, rank, lowrank_panel}, dtype);
    factors_ = {left_.mutable_data_ptr(), right_.mutable_data_ptr(), rank};
    int64_t at = 0;
    for (const Adapter& adapter : adapters) {
      lowrank_merge_loops().pack_right(wide, adapter.a, adapter.rank, columns, at, factors_);
      lowrank_merge_loops().pack_left(wide, adapter.b, adapter.rank, adapter.weight, at, factors_, 0, rows);
      at += adapter.rank;
    }
  }

  const LowrankFactors& factors() const { return factors_; }

 private:
  Tensor left_ = empty_cpu({0}, ScalarType::Float), right_ = left_;
  LowrankFactors factors_{};
};

// The adapters of one merge, checked; contiguous copies are kept as long as this.
struct Adapters {
  std::vector<Tensor> kept;
  std::vector<Adapter> list;

  Adapters(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const Tensor& weight, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(A.size() == B.size(), "B: expected ", A.size(), " tensors as A, got ", B.size());
    const std::vector<double> weights = numbers(weight, static_cast<int64_t>(A.size()), "weight");
    for (size_t i = 0; i < A.size(); ++i) {
      check_matrix(A[i], "A");
      check_matrix(B[i], "B");
      check_size(A[i].size(1), columns, "A: columns");
      check_size(B[i].size(0), rows, "B: rows");
      check_size(B[i].size(1), A[i].size(0), "B: rank");
      kept.push_back(contiguous_of(A[i]));
      kept.push_back(contiguous_of(B[i]));
      list.push_back({elements_of(kept[2 * i], "A"), elements_of(kept[2 * i + 1], "B"), A[i].size(0), weights[i]});
    }
  }
};

template <class Work>
void over_rows(int64_t rows, int64_t columns, const Work& work) {
  const int64_t wanted = chunk / std::max<int64_t>(columns, 1), step = std::max(wanted / row_step, int64_t{1}) * row_step;
  if (columns == 0) return;
  torch_parallel()(chunk_count(rows, step), [&](int64_t index) { work(index * step, std::min(step, rows - index * step)); });
}

// Writes base + product, rows scaled, to `out`, in rows too, which is base or elsewhere.
void merge(const Tensor& base, const std::vector<Tensor>& A, const std::vector<Tensor>& B, const Tensor& weight, const Optional& row_scale,
           const Tensor& out) {
  const int64_t rows = base.size(0), columns = base.size(1);
  const bool wide = is_wide(base) || is_wide(weight) || any_wide(A) || any_wide(B) || (row_scale && is_wide(*row_scale));
  const Adapters adapters(A, B, weight, rows, columns);
  std::vector<double> scale;
  std::vector<float> narrow;
  if (row_scale) {
    scale = numbers(*row_scale, rows, "row_scale");
    narrow.assign(scale.begin(), scale.end());
  }
  const Packed packed(wide, adapters.list, rows, columns);
  const LowrankRows to = rows_of(out, "out");
  const void* scales = !row_scale ? nullptr : wide ? static_cast<const void*>(scale.data()) : narrow.data();
  const LowrankMerge all{
      rows_of(base, "base"), rows, columns, &packed.factors(), 1, scales, out.mutable_data_ptr(), to.dtype, to.stride, 0};
  over_rows(rows, columns, [&](int64_t begin, int64_t n) { lowrank_merge_loops().merge(wide, all, begin, n); });
}

Tensor lowrank_merge_cpu(const Tensor& base, std::vector<Tensor> A, std::vector<Tensor> B, const Tensor& weight, Optional row_scale) {
  check_matrix(base, "base");
  Tensor out = empty_of_shape(base, base.scalar_type());
  merge(in_rows(base), A, B, weight, row_scale, out);
  return out;
}

void lowrank_merge_inplace_cpu(Tensor target, Optional base, std::vector<Tensor> A, std::vector<Tensor> B, const Tensor& weight,
                               Optional row_scale) {
  check_matrix(target, "target");
  const Tensor out = in_rows(target);
  Tensor from = out;
  if (base) {
    check_matrix(*base, "base");
    check_size(base->size(0), target.size(0), "base: rows");
    check_size(base->size(1), target.size(1), "base: columns");
    from = in_rows(*base);
    const bool same = from.const_data_ptr() == out.const_data_ptr() && from.scalar_type() == out.scalar_type() &&
                      (from.size(0) <= 1 || from.stride(0) == out.stride(0));
    if (!same && share_memory(from, out)) from = torch::stable::clone(from);
    from = in_rows(from);
  }
  merge(from, A, B, weight, row_scale, out);
  if (out.const_data_ptr() != target.const_data_ptr()) torch::stable::copy_(target, out);
}

Tensor lowrank_merge_tasks_cpu(const Tensor& base, const Tensor& A, const Tensor& B, const Tensor& weight) {
  check_matrix(base, "base");
  STD_TORCH_CHECK(A.dim() == 3 && B.dim() == 3, "A, B: expected three dimensions, got ", A.dim(), " and ", B.dim());
  const int64_t tasks = A.size(0), rank = A.size(1), rows = base.size(0), columns = base.size(1);
  check_size(A.size(2), columns, "A: columns");
  check_size(B.size(0), tasks, "B: tasks");
  check_size(B.size(1), rows, "B: rows");
  check_size(B.size(2), rank, "B: rank");
  const std::vector<double> weights = numbers(weight, tasks, "weight");
  const bool wide = is_wide(base) || is_wide(weight) || is_wide(A) || is_wide(B);
  const Tensor from = in_rows(base), all_a = contiguous_of(A), all_b = contiguous_of(B);
  const Elements a = elements_of(all_a, "A"), b = elements_of(all_b, "B");
  std::vector<Packed> packed;
  std::vector<LowrankFactors> factors;
  for (int64_t t = 0; t < tasks; ++t) {
    const auto* one_a = static_cast<const char*>(a.data) + t * rank * columns * element_size(a.dtype);
    const auto* one_b = static_cast<const char*>(b.data) + t * rows * rank * element_size(b.dtype);
    packed.emplace_back(wide, std::vector<Adapter>{{{one_a, a.dtype}, {one_b, b.dtype}, rank, weights[static_cast<size_t>(t)]}}, rows,
                        columns);
    factors.push_back(packed.back().factors());
  }
  Tensor out = empty_cpu({tasks, rows, columns}, base.scalar_type());
  const LowrankMerge all{rows_of(from, "base"),  rows,    columns,       factors.data(), tasks, nullptr, out.mutable_data_ptr(),
                         dtype_of(base, "base"), columns, rows * columns};
  over_rows(rows, columns, [&](int64_t begin, int64_t n) { lowrank_merge_loops().merge(wide, all, begin, n); });
  return out;
}

Tensor lowrank_norm_cpu(const Tensor& base, std::vector<Tensor> A, std::vector<Tensor> B, const Tensor& weight) {
  check_matrix(base, "base");
  const int64_t rows = base.size(0), columns = base.size(1);
  const bool wide = is_wide(base) || is_wide(weight) || any_wide(A) || any_wide(B);
  const Adapters adapters(A, B, weight, rows, columns);
  const Packed packed(wide, adapters.list, rows, columns);
  const Tensor from = in_rows(base);
  Tensor out = torch::stable::fill_(empty_cpu({rows}, wide ? ScalarType::Double : ScalarType::Float), 0.0);
  const LowrankMerge all{rows_of(from, "base"), rows, columns, &packed.factors(), 1, nullptr, nullptr, DType::f32, 0, 0};
  over_rows(rows, columns, [&](int64_t begin, int64_t n) { lowrank_merge_loops().norms(wide, all, begin, n, out.mutable_data_ptr()); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("lowrank_merge", TORCH_BOX(&lowrank_merge_cpu));
  m.impl("lowrank_merge_", TORCH_BOX(&lowrank_merge_inplace_cpu));
  m.impl("lowrank_merge_tasks", TORCH_BOX(&lowrank_merge_tasks_cpu));
  m.impl("lowrank_norm", TORCH_BOX(&lowrank_norm_cpu));
}

}  // namespace taskloom
