// weighted_ce: stable-ABI wrapper. The backward is in weighted_ce_backward_ops.cpp.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "common/thread_scratch.h"
#include "masked/weighted_ce_tensors.h"

namespace taskloom {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What is known of each picked row when its logits have been seen, a tile at a time: parts are [tiles, rows].
struct Seen {
  bool wide;
  int64_t rows;
  Tensor largest, sum, target;

  Seen(bool wide, int64_t tiles, int64_t rows)
      : wide(wide),
        rows(rows),
        largest(torch::stable::empty({tiles, rows}, accumulation_type(wide))),
        sum(torch::stable::empty({tiles, rows}, accumulation_type(wide))),
        target(torch::stable::empty({1, rows}, accumulation_type(wide))) {}
};

double value_at(const Matrix& matrix, int64_t row, int64_t column) {
  const char* from = matrix.at(row, column);
  return matrix.wide ? *reinterpret_cast<const double*>(from) : *reinterpret_cast<const float*>(from);
}

// Reduces a tile of logits, whose first row and column are given, into its part of what is seen.
void note_tile(const LogitTile& tile, int64_t row, int64_t column, int64_t part, const PickedRows& rows, const Seen& seen) {
  const Matrix largest = matrix_of(seen.largest, seen.rows), sum = matrix_of(seen.sum, seen.rows),
               target = matrix_of(seen.target, seen.rows);
  weighted_ce_loops().reduce(seen.wide, tile, largest.at(part, row), sum.at(part, row));
  const Matrix logits{static_cast<char*>(tile.logits), tile.stride, 1, seen.wide};
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t place = rows.target[static_cast<size_t>(row + r)] - column;
    if (place >= 0 && place < tile.columns) std::copy_n(logits.at(r, place), logits.unit(), target.at(0, row + r));
  }
}

Seen see_products(const Tensor& hidden, const Tensor& weight, const PickedRows& rows, bool wide) {
  const HeadPieces head(weight, wide);
  const Seen seen(wide, pieces_of(head.vocabulary(), tile_columns), rows.count());
  const Tensor compact = compact_rows(hidden, rows, wide);
  const Matrix left = matrix_of(compact, head.width());
  const int64_t blocks = pieces_of(rows.count(), tile_rows);
  for (int64_t begin = 0; begin < head.vocabulary(); begin += head.columns()) {
    const int64_t width = std::min(head.columns(), head.vocabulary() - begin);
    const Matrix right = head.piece(begin, width);
    run_tiles(pieces_of(width, tile_columns) * blocks, [&](int64_t index) {
      const int64_t row = index % blocks * tile_rows, column = index / blocks * tile_columns;
      const int64_t height = std::min(tile_rows, rows.count() - row), n = std::min(tile_columns, width - column);
      const ThreadScratch scratch(ScratchUse::logits, tile_rows * tile_columns * left.unit());
      const Matrix logits{scratch.data(), tile_columns, 1, wide};
      multiply(logits.tensor(height, n), left.from(row, 0).tensor(height, head.width()),
               right.from(column, 0).transposed().tensor(head.width(), n), false);
      note_tile({scratch.data(), height, n, tile_columns}, row, begin + column, (begin + column) / tile_columns, rows, seen);
    });
  }
  return seen;
}

Seen see_logits(const Tensor& logits, const PickedRows& rows, bool wide) {
  const Tensor flat = torch::stable::contiguous(logits);
  const Elements elements = elements_of(flat, "hidden");
  const int64_t vocabulary = flat.size(1), tiles = pieces_of(vocabulary, tile_columns);
  const Seen seen(wide, tiles, rows.count());
  run_shares(rows.count(), [&](int64_t row) {
    const ThreadScratch scratch(ScratchUse::logits, tile_columns * (wide ? 8 : 4));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = tile * tile_columns, n = std::min(tile_columns, vocabulary - column);
      weighted_ce_loops().load(wide, elements, rows.place[static_cast<size_t>(row)] * vocabulary + column, n, scratch.data());
      note_tile({scratch.data(), 1, n, tile_columns}, row, column, tile, rows, seen);
    }
  });
  return seen;
}

// log(sum of exp(logits)) of a row, from its tiles in order.
double log_sum_exp(const Seen& seen, int64_t row) {
  const Matrix largest = matrix_of(seen.largest, seen.rows), sum = matrix_of(seen.sum, seen.rows);
  const int64_t tiles = seen.largest.size(0);
  double top = -std::numeric_limits<double>::infinity(), total = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) top = std::max(top, value_at(largest, tile, row));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const double here = value_at(largest, tile, row);
    // A tile of -infinity alone counts nothing, and one of NaN alone brings a sum that is NaN.
    total += value_at(sum, tile, row) * (std::isinf(here) ? (here == top && here > 0 ? 1.0 : 0.0) : std::exp(here - top));
  }
  return top + std::log(total);
}

void put(const Tensor& to, int64_t index, double value) {
  if (to.scalar_type() == ScalarType::Double) {
    static_cast<double*>(to.mutable_data_ptr())[index] = value;
  } else {
    static_cast<float*>(to.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

Tensor zeros(int64_t rows, bool wide) {
  Tensor made = torch::stable::empty({rows}, accumulation_type(wide));
  return torch::stable::zero_(made);
}

Outputs weighted_ce_cpu(const Tensor& hidden, std::optional<Tensor> weight, const Tensor& targets, const Tensor& weights) {
  check_matrix(hidden, "hidden");
  const bool wide = is_wide(hidden, weight);
  if (weight) {
    check_matrix(*weight, "weight");
    STD_TORCH_CHECK(weight->size(1) == hidden.size(1), "weight: expected ", hidden.size(1), " columns as hidden, got ", weight->size(1));
  }
  const int64_t all = hidden.size(0);
  const PickedRows rows = pick_rows(targets, weights, "weights", all, weight ? weight->size(0) : hidden.size(1));
  double total = 0;
  for (size_t i = 0; i < rows.factor.size(); ++i) {
    STD_TORCH_CHECK(rows.factor[i] > 0 && std::isfinite(rows.factor[i]), "weights: expected finite values of at least 0, got ",
                    rows.factor[i], " at row ", rows.place[i]);
    total += rows.factor[i];
  }
  STD_TORCH_CHECK(rows.count() > 0, "weights: there is no supervised token, every weight is 0");
  const Seen seen = weight ? see_products(hidden, *weight, rows, wide) : see_logits(hidden, rows, wide);
  std::vector<double> sums(static_cast<size_t>(rows.count()));
  run_shares(pieces_of(rows.count(), tile_rows), [&](int64_t index) {
    for (int64_t row = index * tile_rows; row < std::min(rows.count(), (index + 1) * tile_rows); ++row) {
      sums[static_cast<size_t>(row)] = log_sum_exp(seen, row);
    }
  });
  Tensor loss = torch::stable::empty({}, accumulation_type(wide));
  const Tensor log_probs = zeros(all, wide), found = zeros(all, wide), share = zeros(all, wide);
  const Matrix target = matrix_of(seen.target, seen.rows);
  double weighted = 0;
  for (int64_t i = 0; i < rows.count(); ++i) {
    const auto at = static_cast<size_t>(i);
    const double log_prob = value_at(target, 0, i) - sums[at];
    put(log_probs, rows.place[at], log_prob);
    put(found, rows.place[at], sums[at]);
    put(share, rows.place[at], rows.factor[at] / total);
    weighted -= rows.factor[at] * log_prob;
  }
  put(loss, 0, weighted / total);
  return {loss, log_probs, found, share};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("weighted_ce", TORCH_BOX(&weighted_ce_cpu)); }

}  // namespace taskloom
