// What weighted_ce and its backward share: the supervised rows of a call, the vocabulary in pieces, and how work is given to threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/stable_gaps.h"
#include "common/unaligned.h"
#include "masked/weighted_ce.h"

namespace taskloom {

// Tiles are cut by sizes alone, and a product of tiles runs on one thread: results have the same bits for any number of threads.
constexpr int64_t tile_rows = 256;
constexpr int64_t tile_columns = 512;
constexpr int64_t head_piece_bytes = 16 << 20;   // of a head that has to be converted
constexpr int64_t slope_piece_bytes = 16 << 20;  // of the logits' gradients
constexpr int64_t slope_piece_rows = 8192;
constexpr int64_t copied_entries = 1 << 16;  // of a thread's share of a copy

inline int64_t pieces_of(int64_t total, int64_t piece) { return (total + piece - 1) / piece; }
inline int64_t padded_to(int64_t value, int64_t multiple) { return pieces_of(value, multiple) * multiple; }

// Calls body(index) for each index below count. There is a parallel region always: outside of one, torch's products would bring their own
// threads, whose number changes their bits.
template <class Body>
void run_tiles(int64_t count, const Body& body) {
  cpu_level();
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < std::min(end, count); ++index) body(index);
  });
}

// The same for work that holds no product, which then needs no parallel region of one piece.
template <class Body>
void run_shares(int64_t count, const Body& body) {
  torch_parallel()(count, body);
}

// A matrix of accumulators in memory that something else owns.
struct Matrix {
  char* data;
  int64_t row_stride, column_stride;
  bool wide;

  int64_t unit() const { return wide ? 8 : 4; }
  ScalarType dtype() const { return wide ? ScalarType::Double : ScalarType::Float; }
  char* at(int64_t row, int64_t column = 0) const { return data + (row * row_stride + column * column_stride) * unit(); }
  Matrix transposed() const { return {data, column_stride, row_stride, wide}; }
  Matrix from(int64_t row, int64_t column) const { return {at(row, column), row_stride, column_stride, wide}; }
  Tensor tensor(int64_t rows, int64_t columns) const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride}, cpu, dtype());
  }
};

inline Matrix matrix_of(const Tensor& contiguous, int64_t columns) {
  const bool wide = contiguous.scalar_type() == ScalarType::Double;
  return {static_cast<char*>(const_cast<void*>(contiguous.const_data_ptr())), columns, 1, wide};
}

// The rows that a factor picks, and each one's factor and target.
struct PickedRows {
  std::vector<int64_t> place, target;
  std::vector<double> factor;

  int64_t count() const { return static_cast<int64_t>(place.size()); }
};

// Rows whose factor is not 0; targets of the others are not looked at.
inline PickedRows pick_rows(const Tensor& targets, const Tensor& factors, const char* name, int64_t rows, int64_t vocabulary) {
  check_dtype(targets, ScalarType::Long, "targets", "int64");
  check_numel(targets, rows, "targets", "hidden's rows");
  check_numel(factors, rows, name, "hidden's rows");
  const Tensor flat_targets = torch::stable::contiguous(targets), flat_factors = torch::stable::contiguous(factors);
  const DType dtype = dtype_of(factors, name);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, name, ": expected a float32 or float64 tensor");
  const void *target = flat_targets.const_data_ptr(), *data = flat_factors.const_data_ptr();
  PickedRows picked;
  for (int64_t row = 0; row < rows; ++row) {
    const double factor = dtype == DType::f64 ? load_at<double>(data, row) : load_at<float>(data, row);
    if (factor == 0) continue;
    const auto word = load_at<int64_t>(target, row);
    STD_TORCH_CHECK(word >= 0 && word < vocabulary, "targets: expected 0 to ", vocabulary - 1, " at row ", row, ", got ", word);
    picked.place.push_back(row);
    picked.target.push_back(word);
    picked.factor.push_back(factor);
  }
  return picked;
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected two dimensions, got ", tensor.dim());
}

inline bool is_wide(const Tensor& hidden, const std::optional<Tensor>& weight) {
  return hidden.scalar_type() == ScalarType::Double || (weight && weight->scalar_type() == ScalarType::Double);
}

inline ScalarType accumulation_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

// The picked rows of `from` next to each other as accumulators; `from` itself where it already is that.
inline Tensor compact_rows(const Tensor& from, const PickedRows& rows, bool wide) {
  const Tensor flat = torch::stable::contiguous(from);
  if (rows.count() == flat.size(0) && flat.scalar_type() == accumulation_type(wide)) return flat;
  const int64_t width = flat.size(1);
  Tensor compact = torch::stable::empty({rows.count(), width}, accumulation_type(wide));
  const Matrix to = matrix_of(compact, width);
  const Elements elements = elements_of(flat, "hidden");
  const int64_t share = std::max<int64_t>(1, copied_entries / std::max<int64_t>(1, width));
  run_shares(pieces_of(rows.count(), share), [&](int64_t index) {
    for (int64_t row = index * share; row < std::min(rows.count(), (index + 1) * share); ++row) {
      weighted_ce_loops().load(wide, elements, rows.place[static_cast<size_t>(row)] * width, width, to.at(row));
    }
  });
  return compact;
}

// Puts compact rows back: row place[i] of `to` becomes row i, rounded; all others become zero.
inline void spread_rows(const Tensor& compact, const PickedRows& rows, Tensor& to) {
  const int64_t width = to.size(1), all = to.size(0);
  const Matrix from = matrix_of(compact, width);
  const DType dtype = dtype_of(to, "hidden");
  auto* data = static_cast<char*>(to.mutable_data_ptr());
  const int64_t share = std::max<int64_t>(1, copied_entries / std::max<int64_t>(1, width));
  run_shares(pieces_of(all, share), [&](int64_t index) {
    int64_t next = std::lower_bound(rows.place.begin(), rows.place.end(), index * share) - rows.place.begin();
    for (int64_t row = index * share; row < std::min(all, (index + 1) * share); ++row) {
      if (next < rows.count() && rows.place[static_cast<size_t>(next)] == row) {
        weighted_ce_loops().store(from.wide, from.at(next++), width, dtype, data, row * width);
      } else {
        std::fill_n(data + row * width * element_size(dtype), width * element_size(dtype), char{0});
      }
    }
  });
}

// The head as accumulators, a piece of the vocabulary at a time: where it lies, or converted into a buffer that is used again.
class HeadPieces {
 public:
  HeadPieces(const Tensor& weight, bool wide) : wide_(wide), width_(weight.size(1)), vocabulary_(weight.size(0)) {
    const bool as_it_lies = weight.scalar_type() == accumulation_type(wide);
    const bool plain = weight.stride(1) == 1 || weight.stride(0) == 1;
    kept_ = as_it_lies && plain ? weight : torch::stable::contiguous(weight);
    if (as_it_lies) {
      columns_ = std::max<int64_t>(1, vocabulary_);
    } else {
      columns_ = fitting(head_piece_bytes, width_);
      buffer_ = torch::stable::empty({std::min(columns_, vocabulary_), width_}, accumulation_type(wide));
    }
  }

  // As many columns of the vocabulary as `bytes` hold when each has `height` accumulators: whole tiles, at least one.
  int64_t fitting(int64_t bytes, int64_t height) const {
    const int64_t fits = bytes / (std::max<int64_t>(1, height) * (wide_ ? 8 : 4));
    return std::min(std::max<int64_t>(1, fits / tile_columns) * tile_columns, padded_to(vocabulary_, tile_columns));
  }

  int64_t columns() const { return columns_; }
  int64_t vocabulary() const { return vocabulary_; }
  int64_t width() const { return width_; }

  // Rows begin .. begin + n of the head, as [n, D].
  Matrix piece(int64_t begin, int64_t n) const {
    if (!buffer_) {
      const Matrix whole{static_cast<char*>(const_cast<void*>(kept_->const_data_ptr())), kept_->stride(0), kept_->stride(1), wide_};
      return whole.from(begin, 0);
    }
    const Matrix to = matrix_of(*buffer_, width_);
    const Elements elements = elements_of(*kept_, "weight");
    const int64_t share = std::max<int64_t>(1, copied_entries / std::max<int64_t>(1, width_));
    run_shares(pieces_of(n, share), [&](int64_t index) {
      const int64_t first = index * share, count = std::min(share, n - first);
      weighted_ce_loops().load(wide_, elements, (begin + first) * width_, count * width_, to.at(first));
    });
    return to;
  }

 private:
  bool wide_;
  int64_t width_, vocabulary_, columns_ = 0;
  std::optional<Tensor> kept_, buffer_;
};

}  // namespace taskloom
