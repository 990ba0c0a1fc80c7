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
#include "routed/run_sums.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

// What the maps of a tile take, about, so that they stay near one core; a product of fewer rows is slow.
constexpr int64_t tile_bytes = 1 << 20, least_rows = 64;
// Parts of the rows at most, whose sums over the batch are their own until they are added up in order.
constexpr int64_t most_parts = 8;

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// Rows of a matrix in the dtype of the arithmetic, or a tensor's memory seen as one.
Tensor matrix_at(void* data, int64_t rows, int64_t columns, int64_t stride, ScalarType dtype) {
  return torch::stable::from_blob(data, {rows, columns}, {stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// The same transposed: rows of `stride` entries, of which there are `columns`.
Tensor transposed_at(void* data, int64_t rows, int64_t columns, int64_t stride, ScalarType dtype) {
  return torch::stable::from_blob(data, {rows, columns}, {1, stride}, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

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
  // One map's part of inner products [rows, L r], and of factors [L, r, D].
  Tensor inner_of(char* inner, int64_t map, int64_t n) const {
    return matrix_at(inner + map * rank * element(), n, rank, ranks(), arithmetic());
  }
  Tensor up_of(char* up, int64_t map) const {
    return matrix_at(up + map * rank * features * element(), rank, features, features, arithmetic());
  }
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
    lora_feature_gate_loops().load(shape_.wide, elements_, first * columns_, rows * columns_, to);
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
    lora_feature_gate_loops().store(shape_.wide, copy_->const_data_ptr(), rows * columns_, dtype_, data_, first * columns_);
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
  void multiply_inner(char* inner, int64_t rows, char* up) const {
    for (int64_t map = 0; map < shape_.maps; ++map) {
      multiply(matrix(map, rows), shape_.inner_of(inner, map, rows), shape_.up_of(up, map), false);
    }
  }

 private:
  GateShape shape_;
  ThreadScratch scratch_;
};

char* data_of(const Tensor& tensor) { return static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())); }

std::tuple<Tensor, Tensor> lora_feature_gate_cpu(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& weight) {
  const GateShape shape(x, down, up, weight, is_wide(x) || is_wide(down) || is_wide(up) || is_wide(weight));
  const int64_t unit = shape.element(), features = shape.features;
  Tensor y = empty_of_shape(x, x.scalar_type()), inner = empty_cpu({shape.rows, shape.ranks()}, shape.arithmetic());
  if (shape.rows == 0) return {y, inner};
  const Factors factors(shape, down, up);
  const Tensor values_given = contiguous_of(x), shares_given = contiguous_of(weight);
  char *const inner_data = data_of(inner), *const down_data = data_of(factors.down), *const up_data = data_of(factors.up);
  const int64_t tile = shape.tile();
  // Inside of a parallel region a product of torch's takes one thread, so that each has a tile of its own.
  torch_parallel()(chunk_count(shape.rows, tile), [&](int64_t index) {
    const int64_t first = index * tile, rows = std::min(tile, shape.rows - first);
    TiledRows rows_in(shape, values_given, "x"), shares(shape, shares_given, "weight");
    TiledResult result(shape, y, "x");
    const TileMaps maps(shape);
    char *const values = rows_in.at(first, rows), *const share = shares.at(first, rows), *const to = result.at(first);
    char* const part = inner_data + first * shape.ranks() * unit;
    multiply(matrix_at(part, rows, shape.ranks(), shape.ranks(), shape.arithmetic()),
             matrix_at(values, rows, features, features, shape.arithmetic()),
             matrix_at(down_data, features, shape.ranks(), shape.ranks(), shape.arithmetic()), false);
    maps.multiply_inner(part, rows, up_data);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t offset = row * features * unit;
      lora_feature_gate_loops().forward(shape.wide, {features, shape.maps, maps.stride(), maps.at(0) + offset,
                                                     share + row * shape.maps * unit, values + offset, to + offset});
    }
    result.finish(first, rows);
  });
  return {y, inner};
}

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
  const Tensor values_given = contiguous_of(x), shares_given = contiguous_of(weight), slopes_given = contiguous_of(gradient);
  const Tensor products = contiguous_of(inner);
  char *const inner_data = data_of(products), *const down_data = data_of(factors.down), *const up_data = data_of(factors.up);
  const ScalarType dtype = shape.arithmetic();
  const int64_t tile = shape.tile(), tiles = chunk_count(shape.rows, tile), each = chunk_count(tiles, most_parts),
                parts = chunk_count(tiles, each), factor_size = features * ranks;
  Tensor down_sums = empty_cpu({for_down ? parts : 0, factor_size}, dtype), up_sums = empty_cpu({for_up ? parts : 0, factor_size}, dtype);
  char *const down_parts = data_of(down_sums), *const up_parts = data_of(up_sums);
  torch_parallel()(parts, [&](int64_t part_index) {
    Tensor own = for_x ? dx : empty_cpu({tile, features}, dtype), own_weight = for_weight ? dweight : empty_cpu({tile, shape.maps}, dtype);
    Tensor thin = empty_cpu({tile, ranks}, dtype);
    TiledRows rows_in(shape, values_given, "x"), shares(shape, shares_given, "weight"), slopes(shape, slopes_given, "gradient");
    TiledResult result(shape, own, "x"), weight_result(shape, own_weight, "weight");
    const TileMaps maps(shape);
    char *const thin_data = data_of(thin), *const for_down_part = down_parts + part_index * factor_size * unit,
                *const for_up_part = up_parts + part_index * factor_size * unit;
    for (int64_t index = part_index * each; index < std::min(tiles, (part_index + 1) * each); ++index) {
      const int64_t first = index * tile, rows = std::min(tile, shape.rows - first);
      const bool add = index > part_index * each;
      char *const values = rows_in.at(first, rows), *const share = shares.at(first, rows), *const slope = slopes.at(first, rows);
      char *const to = result.at(for_x ? first : 0), *const weight_to = weight_result.at(for_weight ? first : 0);
      char* const part = inner_data + first * ranks * unit;
      maps.multiply_inner(part, rows, up_data);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t offset = row * features * unit, in_shares = row * shape.maps * unit;
        const GateRow one{features, shape.maps, maps.stride(), maps.at(0) + offset, share + in_shares, values + offset, to + offset};
        lora_feature_gate_loops().backward(shape.wide, one, slope + offset, weight_to + in_shares);
      }
      for (int64_t map = 0; map < shape.maps; ++map) {
        const Tensor map_slopes = maps.matrix(map, rows);
        const int64_t rank_offset = map * shape.rank * unit, up_offset = rank_offset * features;
        if (for_up)
          multiply(shape.up_of(for_up_part, map), transposed_at(part + rank_offset, shape.rank, rows, ranks, dtype), map_slopes, add);
        if (for_x || for_down) {
          multiply(shape.inner_of(thin_data, map, rows), map_slopes,
                   transposed_at(up_data + up_offset, features, shape.rank, features, dtype), false);
        }
      }
      const Tensor thin_rows = matrix_at(thin_data, rows, ranks, ranks, dtype);
      if (for_down) {
        multiply(matrix_at(for_down_part, features, ranks, ranks, dtype), transposed_at(values, features, rows, features, dtype), thin_rows,
                 add);
      }
      if (for_x) {
        multiply(matrix_at(to, rows, features, features, dtype), thin_rows, transposed_at(down_data, ranks, features, ranks, dtype), true);
        result.finish(first, rows);
      }
      if (for_weight) weight_result.finish(first, rows);
    }
  });
  if (for_down) {
    Tensor sum = empty_cpu({features, shape.maps, shape.rank}, dtype);
    run_sums_loops().add_up(shape.wide, down_parts, parts, factor_size, factor_size, shape.dtype(), sum.mutable_data_ptr(), 0);
    torch::stable::copy_(ddown, torch::stable::transpose(sum, 0, 1));
  }
  if (for_up) {
    run_sums_loops().add_up(shape.wide, up_parts, parts, factor_size, factor_size, dtype_of(dup, "up"), dup.mutable_data_ptr(), 0);
  }
  return {dx, ddown, dup, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("lora_feature_gate", TORCH_BOX(&lora_feature_gate_cpu));
  m.impl("lora_feature_gate_backward", TORCH_BOX(&lora_feature_gate_backward_cpu));
}

}  // namespace taskloom
