// weighted_ce_backward: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include "common/thread_scratch.h"
#include "masked/weighted_ce_tensors.h"

namespace taskloom {
namespace {

// Of each picked row, as accumulators.
struct RowScalars {
  Tensor log_sum_exp, coefficient;

  RowScalars(const PickedRows& rows, const Tensor& log_sum_exps, bool wide)
      : log_sum_exp(torch::stable::empty({rows.count()}, accumulation_type(wide))),
        coefficient(torch::stable::empty({rows.count()}, accumulation_type(wide))) {
    const Tensor flat = torch::stable::contiguous(log_sum_exps);
    const Elements from = elements_of(flat, "log_sum_exp"), factors{rows.factor.data(), DType::f64};
    const Matrix to = matrix_of(log_sum_exp, 1);
    for (int64_t i = 0; i < rows.count(); ++i) weighted_ce_loops().load(wide, from, rows.place[static_cast<size_t>(i)], 1, to.at(i));
    weighted_ce_loops().load(wide, factors, 0, rows.count(), matrix_of(coefficient, 1).data);
  }
};

// Turns a tile of logits, whose first row and column are given, into the loss's gradient with respect to it.
void slope_tile(const LogitTile& tile, int64_t row, int64_t column, const PickedRows& rows, const RowScalars& scalars, bool wide) {
  int64_t target[tile_rows];
  for (int64_t r = 0; r < tile.rows; ++r) target[r] = rows.target[static_cast<size_t>(row + r)] - column;
  const Matrix log_sum_exp = matrix_of(scalars.log_sum_exp, 1), coefficient = matrix_of(scalars.coefficient, 1);
  weighted_ce_loops().slope(wide, tile, log_sum_exp.at(row), coefficient.at(row), target);
}

// out[rows, columns] (+)= a[rows, inner] @ b[inner, columns], a tile of out at a time.
void multiply_tiles(const Matrix& out, const Matrix& a, const Matrix& b, int64_t rows, int64_t inner, int64_t columns, bool add) {
  const int64_t blocks = pieces_of(rows, tile_columns), parts = pieces_of(columns, tile_rows);
  run_tiles(blocks * parts, [&](int64_t index) {
    const int64_t row = index / parts * tile_columns, column = index % parts * tile_rows;
    const int64_t height = std::min(tile_columns, rows - row), width = std::min(tile_rows, columns - column);
    multiply(out.from(row, column).tensor(height, width), a.from(row, 0).tensor(height, inner), b.from(0, column).tensor(inner, width),
             add);
  });
}

// Rows begin .. begin + n of the head's gradient, from accumulators where they are not the gradient's own memory.
void store_piece(const Matrix& from, int64_t begin, int64_t n, int64_t width, Tensor& gradient) {
  const DType dtype = dtype_of(gradient, "weight");
  auto* to = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t share = std::max<int64_t>(1, copied_entries / std::max<int64_t>(1, width));
  run_shares(pieces_of(n, share), [&](int64_t index) {
    const int64_t first = index * share, count = std::min(share, n - first);
    weighted_ce_loops().store(from.wide, from.at(first), count * width, dtype, to, (begin + first) * width);
  });
}

class ProductBackward {
 public:
  ProductBackward(const Tensor& hidden, const Tensor& weight, const PickedRows& rows, const RowScalars& scalars, bool wide)
      : wide_(wide), rows_(rows), scalars_(scalars), head_(weight, wide), compact_(compact_rows(hidden, rows, wide)) {}

  // Fills what is given: [rows, D] accumulators for hidden, [V, D] in the head's dtype.
  void run(Tensor* for_hidden, Tensor* for_weight) const {
    const int64_t group = std::min(slope_piece_rows, rows_.count()), width = head_.width();
    const int64_t columns = std::min(head_.columns(), head_.fitting(slope_piece_bytes, group));
    const Tensor memory = torch::stable::empty({group, padded_to(columns, tile_lanes)}, accumulation_type(wide_));
    const Matrix slopes = matrix_of(memory, padded_to(columns, tile_lanes)), left = matrix_of(compact_, width);
    const bool direct = for_weight != nullptr && for_weight->scalar_type() == accumulation_type(wide_);
    std::optional<Tensor> sums;
    if (for_weight != nullptr && !direct) sums = torch::stable::empty({columns, width}, accumulation_type(wide_));
    for (int64_t begin = 0; begin < head_.vocabulary(); begin += columns) {
      const int64_t n = std::min(columns, head_.vocabulary() - begin);
      const Matrix right = head_.piece(begin, n);
      for (int64_t row = 0; row < rows_.count(); row += group) {
        const int64_t height = std::min(group, rows_.count() - row);
        slope_piece(slopes, left, right, row, height, begin, n);
        if (for_weight != nullptr) {
          const Matrix to = direct ? matrix_of(*for_weight, width).from(begin, 0) : matrix_of(*sums, width);
          multiply_tiles(to, slopes.transposed(), left.from(row, 0), n, height, width, row > 0);
        }
        if (for_hidden != nullptr) multiply_tiles(matrix_of(*for_hidden, width).from(row, 0), slopes, right, height, n, width, begin > 0);
      }
      if (sums) store_piece(matrix_of(*sums, width), begin, n, width, *for_weight);
    }
  }

 private:
  void slope_piece(const Matrix& slopes, const Matrix& left, const Matrix& right, int64_t row, int64_t height, int64_t begin,
                   int64_t n) const {
    const int64_t blocks = pieces_of(height, tile_rows), width = head_.width();
    run_tiles(blocks * pieces_of(n, tile_columns), [&](int64_t index) {
      const int64_t r = index % blocks * tile_rows, column = index / blocks * tile_columns;
      const int64_t rows = std::min(tile_rows, height - r), columns = std::min(tile_columns, n - column);
      const Matrix logits = slopes.from(r, column);
      multiply(logits.tensor(rows, columns), left.from(row + r, 0).tensor(rows, width),
               right.from(column, 0).transposed().tensor(width, columns), false);
      slope_tile({logits.data, rows, columns, slopes.row_stride}, row + r, begin + column, rows_, scalars_, wide_);
    });
  }

  bool wide_;
  const PickedRows& rows_;
  const RowScalars& scalars_;
  HeadPieces head_;
  Tensor compact_;
};

void logits_backward(const Tensor& logits, const PickedRows& rows, const RowScalars& scalars, bool wide, Tensor& gradient) {
  const Tensor flat = torch::stable::contiguous(logits);
  const Elements elements = elements_of(flat, "hidden");
  const int64_t vocabulary = flat.size(1), all = flat.size(0);
  auto* to = static_cast<char*>(gradient.mutable_data_ptr());
  run_shares(all, [&](int64_t place) {
    const int64_t row = std::lower_bound(rows.place.begin(), rows.place.end(), place) - rows.place.begin();
    if (row == rows.count() || rows.place[static_cast<size_t>(row)] != place) {
      const int64_t bytes = vocabulary * element_size(elements.dtype);
      std::fill_n(to + place * bytes, bytes, char{0});
      return;
    }
    const ThreadScratch scratch(ScratchUse::logits, tile_columns * (wide ? 8 : 4));
    for (int64_t column = 0; column < vocabulary; column += tile_columns) {
      const int64_t n = std::min(tile_columns, vocabulary - column);
      weighted_ce_loops().load(wide, elements, place * vocabulary + column, n, scratch.data());
      slope_tile({scratch.data(), 1, n, tile_columns}, row, column, rows, scalars, wide);
      weighted_ce_loops().store(wide, scratch.data(), n, elements.dtype, to, place * vocabulary + column);
    }
  });
}

Tensor nothing(const Tensor& like) { return torch::stable::empty({0}, like.scalar_type()); }

std::tuple<Tensor, Tensor> weighted_ce_backward_cpu(const Tensor& hidden, std::optional<Tensor> weight, const Tensor& targets,
                                                    const Tensor& coefficient, const Tensor& log_sum_exp, bool for_hidden,
                                                    bool for_weight) {
  check_matrix(hidden, "hidden");
  const bool wide = is_wide(hidden, weight);
  const Tensor& head = weight ? *weight : hidden;
  check_matrix(head, "weight");
  STD_TORCH_CHECK(head.size(1) == hidden.size(1), "weight: expected ", hidden.size(1), " columns as hidden, got ", head.size(1));
  STD_TORCH_CHECK(weight || !for_weight, "for_weight: logits have no head to give a gradient to");
  check_numel(log_sum_exp, hidden.size(0), "log_sum_exp", "hidden's rows");
  const PickedRows rows = pick_rows(targets, coefficient, "coefficient", hidden.size(0), weight ? weight->size(0) : hidden.size(1));
  Tensor hidden_gradient = for_hidden ? empty_of_shape(hidden, hidden.scalar_type()) : nothing(hidden);
  Tensor weight_gradient = for_weight ? empty_of_shape(head, head.scalar_type()) : nothing(head);
  if (rows.count() == 0) return {torch::stable::zero_(hidden_gradient), torch::stable::zero_(weight_gradient)};
  const RowScalars scalars(rows, log_sum_exp, wide);
  if (!weight) {
    if (for_hidden) logits_backward(hidden, rows, scalars, wide, hidden_gradient);
    return {hidden_gradient, weight_gradient};
  }
  if (!for_hidden && !for_weight) return {hidden_gradient, weight_gradient};
  const bool direct = rows.count() == hidden.size(0) && hidden.scalar_type() == accumulation_type(wide);
  Tensor sums = !for_hidden || direct ? hidden_gradient : torch::stable::empty({rows.count(), hidden.size(1)}, accumulation_type(wide));
  ProductBackward(hidden, *weight, rows, scalars, wide).run(for_hidden ? &sums : nullptr, for_weight ? &weight_gradient : nullptr);
  if (for_hidden && !direct) spread_rows(sums, rows, hidden_gradient);
  return {hidden_gradient, weight_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("weighted_ce_backward", TORCH_BOX(&weighted_ce_backward_cpu)); }

}  // namespace taskloom
