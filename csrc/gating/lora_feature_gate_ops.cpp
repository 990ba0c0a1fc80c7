// lora_feature_gate and its backward: stable-ABI wrappers. Rows go through torch's matrix products and our loops a tile at a time, so that
// the maps of a tile alone are in memory, and near.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "gating/lora_feature_gate.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

// What the maps of a tile take, about; a product of fewer rows would not keep the cores busy.
constexpr int64_t tile_bytes = 2 << 20, least_rows = 64;
constexpr int64_t rows_of_a_task = 16;

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// Rows of a matrix in the dtype of the arithmetic, or a tensor's memory seen as one.
Tensor matrix_at(void* data, int64_t rows, int64_t columns, int64_t stride, ScalarType dtype) {
  return torch::stable::from_blob(data, {rows, columns}, {stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

struct GateShape {
  int64_t rows, features, maps, rank;
  bool wide;

  GateShape(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& weight, bool is_double) : wide(is_double) {
    STD_TORCH_CHECK(x.dim() == 2 && down.dim() == 3 && up.dim() == 3 && weight.dim() == 2,
                    "expected x [B, D], down [L, D, r], up [L, r, D] and weight [B, L]");
    rows = x.size(0);
    features = x.size(1);
    maps = down.size(0);
    rank = down.size(2);
    STD_TORCH_CHECK(features > 0 && maps > 0 && rank > 0, "down: expected at least one map, rank and feature");
    STD_TORCH_CHECK(down.size(1) == features, "down: expected ", features, " features as x, got ", down.size(1));
    STD_TORCH_CHECK(up.size(0) == maps && up.size(1) == rank && up.size(2) == features, "up: expected shape [", maps, ", ", rank, ", ",
                    features, "]");
    STD_TORCH_CHECK(weight.size(0) == rows && weight.size(1) == maps, "weight: expected shape [", rows, ", ", maps, "]");
  }

  ScalarType arithmetic() const { return arithmetic_type(wide); }
  DType dtype() const { return wide ? DType::f64 : DType::f32; }
  int64_t element() const { return wide ? 8 : 4; }
  int64_t ranks() const { return maps * rank; }
  int64_t tile() const {
    const int64_t fit = tile_bytes / (maps * features * element());
    return std::max<int64_t>(1, std::min(rows, std::max(fit, least_rows)));
  }
};

// The factors in the dtype of the arithmetic: all maps' down side by side, [D, L r], and up, [L r, D].
struct Factors {
  Tensor down, up;

  Factors(const GateShape& shape, const Tensor& down_given, const Tensor& up_given)
      : down(torch::stable::reshape(
            torch::stable::contiguous(torch::stable::transpose(torch::stable::to(down_given, shape.arithmetic()), 0, 1)),
            {shape.features, shape.ranks()})),
        up(torch::stable::contiguous(torch::stable::to(up_given, shape.arithmetic()))) {}
};

// A matrix of which tiles of rows are wanted in the dtype of the arithmetic: its own memory, or a tile's copy.
class TiledRows {
 public:
  TiledRows(const GateShape& shape, const Tensor& given, const char* name)
      : shape_(shape), columns_(given.size(1)), kept_(contiguous_of(given)), elements_(elements_of(kept_, name)) {
    if (elements_.dtype != shape.dtype()) copy_ = empty_cpu({shape.tile(), columns_}, shape.arithmetic());
  }

  char* at(int64_t first, int64_t rows) {
    if (!copy_) return static_cast<char*>(const_cast<void*>(elements_.data)) + first * columns_ * shape_.element();
    char* const to = static_cast<char*>(copy_->mutable_data_ptr());
    torch_parallel()(chunk_count(rows, rows_of_a_task), [&](int64_t task) {
      const int64_t row = task * rows_of_a_task, n = std::min(rows_of_a_task, rows - row);
      lora_feature_gate_loops().load(shape_.wide, elements_, (first + row) * columns_, n * columns_,
                                     to + row * columns_ * shape_.element());
    });
    return to;
  }

 private:
  GateShape shape_;
  int64_t columns_;
  Tensor kept_;
  Elements elements_;
  OptionalTensor copy_;
};

// Where tiles of rows go: a tensor's own memory, or a tile's copy that is then rounded into it.
class TiledResult {
 public:
  TiledResult(const GateShape& shape, Tensor& to, const char* name)
      : shape_(shape), columns_(to.size(1)), dtype_(dtype_of(to, name)), data_(to.mutable_data_ptr()) {
    if (dtype_ != shape.dtype()) copy_ = empty_cpu({shape.tile(), columns_}, shape.arithmetic());
  }

  char* at(int64_t first) {
    return copy_ ? static_cast<char*>(copy_->mutable_data_ptr()) : static_cast<char*>(data_) + first * columns_ * shape_.element();
  }
  void finish(int64_t first, int64_t rows) {
    if (!copy_) return;
    const char* const from = static_cast<const char*>(copy_->const_data_ptr());
    torch_parallel()(chunk_count(rows, rows_of_a_task), [&](int64_t task) {
      const int64_t row = task * rows_of_a_task, n = std::min(rows_of_a_task, rows - row);
      lora_feature_gate_loops().store(shape_.wide, from + row * columns_ * shape_.element(), n * columns_, dtype_, data_,
                                      (first + row) * columns_);
    });
  }

 private:
  GateShape shape_;
  int64_t columns_;
  DType dtype_;
  void* data_;
  OptionalTensor copy_;
};

// The maps' arguments (x down_l) up_l of a tile, [L, tile, D], in the calling thread's scratch.
class TileMaps {
 public:
  explicit TileMaps(const GateShape& shape)
      : shape_(shape), scratch_(ScratchUse::logits, shape.maps * shape.tile() * shape.features * shape.element()) {}

  char* at(int64_t map) const { return scratch_.data() + map * stride() * shape_.element(); }
  int64_t stride() const { return shape_.tile() * shape_.features; }
  Tensor matrix(int64_t map, int64_t rows) const { return matrix_at(at(map), rows, shape_.features, shape_.features, shape_.arithmetic()); }

  // From the tile's part of the inner products.
  void multiply_inner(char* inner, int64_t rows, const Tensor& up) const {
    for (int64_t map = 0; map < shape_.maps; ++map) multiply(matrix(map, rows), inner_of(inner, map, rows), up_of(up, map), false);
  }
  Tensor inner_of(char* inner, int64_t map, int64_t rows) const {
    return matrix_at(inner + map * shape_.rank * shape_.element(), rows, shape_.rank, shape_.ranks(), shape_.arithmetic());
  }
  Tensor up_of(const Tensor& up, int64_t map) const { return torch::stable::select(up, 0, map); }

 private:
  GateShape shape_;
  ThreadScratch scratch_;
};

// Calls body(first, rows) for tiles of rows.
template <class F>
void over_tiles(const GateShape& shape, const F& body) {
  const int64_t tile = shape.tile();
  for (int64_t first = 0; first < shape.rows; first += tile) body(first, std::min(tile, shape.rows - first));
}

// Calls body(row) for the rows of a tile.
template <class F>
void over_rows(int64_t rows, const F& body) {
  torch_parallel()(chunk_count(rows, rows_of_a_task), [&](int64_t task) {
    for (int64_t row = task * rows_of_a_task; row < std::min(rows, (task + 1) * rows_of_a_task); ++row) body(row);
  });
}

std::tuple<Tensor, Tensor> lora_feature_gate_cpu(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& weight) {
  const GateShape shape(x, down, up, weight, is_wide(x) || is_wide(down) || is_wide(up) || is_wide(weight));
  const int64_t unit = shape.element(), features = shape.features;
  Tensor y = empty_of_shape(x, x.scalar_type()), inner = empty_cpu({shape.rows, shape.ranks()}, shape.arithmetic());
  if (shape.rows == 0) return {y, inner};
  const Factors factors(shape, down, up);
  TiledRows rows_in(shape, x, "x"), shares(shape, weight, "weight");
  TiledResult result(shape, y, "x");
  const TileMaps maps(shape);
  auto* const inner_data = static_cast<char*>(inner.mutable_data_ptr());
  over_tiles(shape, [&](int64_t first, int64_t rows) {
    char *const values = rows_in.at(first, rows), *const share = shares.at(first, rows), *const to = result.at(first);
    char* const part = inner_data + first * shape.ranks() * unit;
    multiply(matrix_at(part, rows, shape.ranks(), shape.ranks(), shape.arithmetic()),
             matrix_at(values, rows, features, features, shape.arithmetic()), factors.down, false);
    maps.multiply_inner(part, rows, factors.up);
    over_rows(rows, [&](int64_t row) {
      const int64_t offset = row * features * unit;
      lora_feature_gate_loops().forward(shape.wide, {features, shape.maps, maps.stride(), maps.at(0) + offset,
                                                     share + row * shape.maps * unit, values + offset, to + offset});
    });
    result.finish(first, rows);
  });
  return {y, inner};
}

// Sums over rows, which tiles are added to in order.
struct GradientSums {
  Tensor down, up;  // [D, L r] and [L, r, D]

  explicit GradientSums(const GateShape& shape)
      : down(empty_cpu({shape.features, shape.ranks()}, shape.arithmetic())),
        up(empty_cpu({shape.maps, shape.rank, shape.features}, shape.arithmetic())) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_feature_gate_backward_cpu(const Tensor& gradient, const Tensor& x, const Tensor& down,
                                                                          const Tensor& up, const Tensor& weight, const Tensor& inner,
                                                                          bool for_x, bool for_down, bool for_up, bool for_weight) {
  const GateShape shape(x, down, up, weight, is_wide(inner));
  STD_TORCH_CHECK(inner.scalar_type() == shape.arithmetic(), "inner: expected the dtype of the arithmetic");
  check_numel(inner, shape.rows * shape.ranks(), "inner", "x's rows and down's maps and ranks");
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == shape.rows && gradient.size(1) == shape.features,
                  "gradient: expected the shape of x");
  const int64_t unit = shape.element(), features = shape.features, ranks = shape.ranks();
  const auto result_like = [](const Tensor& like, bool wanted) {
    Tensor made = wanted ? empty_of_shape(like, like.scalar_type()) : empty_cpu({0}, like.scalar_type());
    return made;
  };
  Tensor dx = result_like(x, for_x), dweight = result_like(weight, for_weight);
  Tensor ddown = result_like(down, for_down), dup = result_like(up, for_up);
  if (shape.rows == 0) return {dx, torch::stable::zero_(ddown), torch::stable::zero_(dup), dweight};
  const Factors factors(shape, down, up);
  TiledRows rows_in(shape, x, "x"), shares(shape, weight, "weight"), slopes(shape, gradient, "gradient");
  Tensor own = for_x ? dx : empty_cpu({shape.tile(), features}, shape.arithmetic());
  Tensor own_weight = for_weight ? dweight : empty_cpu({shape.tile(), shape.maps}, shape.arithmetic());
  TiledResult result(shape, own, "x"), weight_result(shape, own_weight, "weight");
  const TileMaps maps(shape);
  GradientSums sums(shape);
  Tensor thin = empty_cpu({shape.tile(), ranks}, shape.arithmetic());
  const Tensor products = contiguous_of(inner);
  auto *const inner_data = static_cast<char*>(const_cast<void*>(products.const_data_ptr())), *const thin_data = static_cast<char*>(
                                                                                                 thin.mutable_data_ptr());
  over_tiles(shape, [&](int64_t first, int64_t rows) {
    char *const values = rows_in.at(first, rows), *const share = shares.at(first, rows), *const slope = slopes.at(first, rows);
    char *const to = result.at(for_x ? first : 0), *const weight_to = weight_result.at(for_weight ? first : 0);
    char* const part = inner_data + first * ranks * unit;
    maps.multiply_inner(part, rows, factors.up);
    over_rows(rows, [&](int64_t row) {
      const int64_t offset = row * features * unit, in_shares = row * shape.maps * unit;
      const GateRow one{features, shape.maps, maps.stride(), maps.at(0) + offset, share + in_shares, values + offset, to + offset};
      lora_feature_gate_loops().backward(shape.wide, one, slope + offset, weight_to + in_shares);
    });
    for (int64_t map = 0; map < shape.maps; ++map) {
      const Tensor maps_slopes = maps.matrix(map, rows);
      if (for_up) multiply(maps.up_of(sums.up, map), transposed(maps.inner_of(part, map, rows)), maps_slopes, first > 0);
      if (for_x || for_down) multiply(maps.inner_of(thin_data, map, rows), maps_slopes, transposed(maps.up_of(factors.up, map)), false);
    }
    const Tensor thin_rows = matrix_at(thin_data, rows, ranks, ranks, shape.arithmetic());
    if (for_down) {
      multiply(sums.down, transposed(matrix_at(values, rows, features, features, shape.arithmetic())), thin_rows, first > 0);
    }
    if (for_x) multiply(matrix_at(to, rows, features, features, shape.arithmetic()), thin_rows, transposed(factors.down), true);
    if (for_x) result.finish(first, rows);
    if (for_weight) weight_result.finish(first, rows);
  });
  if (for_down) {
    torch::stable::copy_(ddown, torch::stable::transpose(torch::stable::reshape(sums.down, {features, shape.maps, shape.rank}), 0, 1));
  }
  if (for_up) torch::stable::copy_(dup, sums.up);
  return {dx, ddown, dup, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("lora_feature_gate", TORCH_BOX(&lora_feature_gate_cpu));
  m.impl("lora_feature_gate_backward", TORCH_BOX(&lora_feature_gate_backward_cpu));
}

}  // namespace taskloom
