// CPU loops of batch_norm_silu, compiled once per CPU level. A lane is a column; rows are added up in blocks of a fixed number, and blocks
// in double, whatever columns a call is for, so that the bits depend on neither threads nor level.
#include "gating/batch_norm_silu.h"
#include "gating/logistic.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

constexpr int64_t block = batch_norm_block;

inline int64_t whole_lanes(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// Rows of a strip of columns, whose lanes are whole.
template <class Acc>
struct Block {
  const Acc* data;
  int64_t stride;

  Lanes<Acc> at(int64_t row, int64_t column) const { return load_whole(data + row * stride + column); }
};

// Rows of n columns in the dtype of the arithmetic: copied to `to`, with zeros in the lanes left over.
template <class Acc>
inline Block<Acc> copied_rows(const Elements& from, int64_t offset, int64_t row_stride, int64_t rows, int64_t n, Acc* to) {
  const int64_t stride = whole_lanes(n);
  for (int64_t row = 0; row < rows; ++row) {
    Acc* const out = to + row * stride;
    const int64_t place = offset + row * row_stride;
    if (from.dtype == dtype_of_arithmetic<Acc>) {
      const Acc* const in = static_cast<const Acc*>(from.data) + place;
      over_lanes(n, [&](int64_t column, auto count)
                        __attribute__((always_inline)) { store_whole(out + column, load_some(in + column, count, Acc{0})); });
    } else {
      load_block(from.dtype, from.data, place, n, out);
      for (int64_t column = n; column < stride; ++column) out[column] = Acc{0};
    }
  }
  return {to, stride};
}

// The same where they lie, if they may be read so.
template <class Acc>
inline Block<Acc> read_rows(const Elements& from, int64_t offset, int64_t row_stride, int64_t rows, int64_t n, Acc* scratch) {
  if (from.dtype != dtype_of_arithmetic<Acc> || n % lanes != 0) return copied_rows(from, offset, row_stride, rows, n, scratch);
  return {static_cast<const Acc*>(from.data) + offset, row_stride};
}

// Where results of a strip go: to the tensor itself, or through scratch into its dtype.
template <class Acc>
struct Target {
  DType dtype;
  void* data;
  int64_t offset, row_stride, n;
  Acc* scratch;

  bool direct() const { return dtype == dtype_of_arithmetic<Acc>; }
  Acc* at(int64_t row, int64_t column) const {
    return direct() ? static_cast<Acc*>(data) + offset + row * row_stride + column : scratch + row * n + column;
  }
  void finish(int64_t rows) const {
    if (direct()) return;
    for (int64_t row = 0; row < rows; ++row) store_block(dtype, scratch + row * n, n, data, offset + row * row_stride);
  }
  Target from_row(int64_t row) const { return {dtype, data, offset + row * row_stride, row_stride, n, scratch}; }
};

template <class Acc>
struct Column {
  Lanes<Acc> mean, rstd, weight, bias;

  Lanes<Acc> normal(const Lanes<Acc>& z) const { return (z - mean) * rstd; }
  Lanes<Acc> inner(const Lanes<Acc>& normal) const { return normal * weight + bias; }
};

template <class Acc>
inline __attribute__((always_inline)) Column<Acc> column_of(const BatchNormSilu& view, int64_t place, int64_t count) {
  const auto some = [&](const void* from)
                        __attribute__((always_inline)) { return load_some(static_cast<const Acc*>(from) + place, count, Acc{0}); };
  return {some(view.mean), some(view.rstd), some(view.weight), some(view.bias)};
}

// Calls body(row, rows, first, n) for the blocks of a piece.
template <int64_t block_rows, int64_t block_columns, class F>
inline void over_blocks(const BatchNormPiece& piece, const F& body) {
  const int64_t last_row = piece.first_row + piece.rows, last = piece.first + piece.n;
  for (int64_t row = piece.first_row; row < last_row; row += block_rows) {
    const int64_t rows = last_row - row < block_rows ? last_row - row : block_rows;
    for (int64_t first = piece.first; first < last; first += block_columns) {
      body(row, rows, first, last - first < block_columns ? last - first : block_columns);
    }
  }
}

template <class F>
inline void over_runs(const BatchNormPiece& piece, const F& body) {
  over_blocks<batch_norm_run_rows, batch_norm_run_columns>(piece, body);
}

template <class Acc>
inline Block<Acc> z_rows(const BatchNormSilu& view, int64_t expert, int64_t row, int64_t rows, int64_t first, int64_t n, Acc* scratch) {
  return read_rows(view.z, row * view.row_stride + expert * view.expert_stride + first, view.row_stride, rows, n, scratch);
}

template <class Acc>
inline Target<Acc> target_of(const BatchNormSilu& view, int64_t row, int64_t place, int64_t n, Acc* scratch) {
  const int64_t stride = view.experts * view.features;
  return {view.z.dtype, view.y, row * stride + place, stride, n, scratch};
}

template <Activation activation, class Acc>
inline void apply_block(const BatchNormSilu& view, int64_t place, const Block<Acc>& z, int64_t rows, const Target<Acc>& to) {
  over_lanes(to.n, [&](int64_t column, auto count) __attribute__((always_inline)) {
    const Column<Acc> one = column_of<Acc>(view, place + column, count);
    for (int64_t row = 0; row < rows; ++row) {
      store_some(to.at(row, column), count, gated<activation>(one.inner(one.normal(z.at(row, column)))));
    }
  });
  to.finish(rows);
}

// The sum of values of rows, four of which are added at a time.
template <class Acc, class F>
inline __attribute__((always_inline)) Lanes<Acc> sum_of_rows(int64_t rows, const F& value) {
  Lanes<Acc> sums[4] = {every_lane(Acc{0}), every_lane(Acc{0}), every_lane(Acc{0}), every_lane(Acc{0})};
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] + value(row + i);
  }
  for (; row < rows; ++row) sums[0] = sums[0] + value(row);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The mean and the sum of squares about it of `count` values, with `rows` more (Chan, Golub and LeVeque).
inline void add_moments(double& mean, double& squares, double other_mean, double other_squares, double share, double weight) {
  const double step = other_mean - mean;
  squares = squares + (other_squares + step * step * weight);
  mean = mean + step * share;
}

template <class Acc>
inline void add_block(const Block<Acc>& z, int64_t rows, int64_t n, int64_t count, double* mean, double* squares) {
  const double share = static_cast<double>(rows) / static_cast<double>(count + rows), weight = static_cast<double>(count) * share;
  const Lanes<Acc> rows_lanes = every_lane(static_cast<Acc>(rows));
  over_lanes(n, [&](int64_t column, auto wanted) __attribute__((always_inline)) {
    const Lanes<Acc> middle =
        sum_of_rows<Acc>(rows, [&](int64_t row) __attribute__((always_inline)) { return z.at(row, column); }) / rows_lanes;
    const Lanes<Acc> apart = sum_of_rows<Acc>(rows, [&](int64_t row) __attribute__((always_inline)) {
      const Lanes<Acc> one = z.at(row, column) - middle;
      return one * one;
    });
    Acc means[lanes], parts[lanes];
    store_whole(means, middle);
    store_whole(parts, apart);
    for (int64_t lane = 0; lane < wanted; ++lane) {
      add_moments(mean[column + lane], squares[column + lane], static_cast<double>(means[lane]), static_cast<double>(parts[lane]), share,
                  weight);
    }
  });
}

template <class Acc>
inline void invert_as(const Acc* var, Acc eps, int64_t n, Acc* rstd) {
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(rstd + place, count, every_lane(Acc{1}) / square_root(load_some(var + place, count, Acc{1}) + every_lane(eps)));
  });
}

template <class Acc>
void moments_as(const BatchNormSilu& view, const BatchNormPiece& piece, double* mean, double* squares, Acc* scratch) {
  for (int64_t column = 0; column < piece.n; ++column) mean[column] = squares[column] = 0;
  over_blocks<batch_norm_sum_rows, batch_norm_sum_columns>(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t n) {
    const Block<Acc> z = z_rows(view, piece.expert, row, rows, first, n, scratch);
    add_block(z, rows, n, row - piece.first_row, mean + (first - piece.first), squares + (first - piece.first));
  });
}

template <class Acc>
void join_moments_as(const BatchNormSilu& view, int64_t column, int64_t n, const double* mean, const double* squares, int64_t stride) {
  for (int64_t i = column; i < column + n; ++i) {
    double middle = 0, apart = 0;
    for (int64_t row = 0; row < view.rows; row += batch_norm_rows) {
      const int64_t place = row / batch_norm_rows * stride + i,
                    rows = view.rows - row < batch_norm_rows ? view.rows - row : batch_norm_rows;
      const double share = static_cast<double>(rows) / static_cast<double>(row + rows);
      add_moments(middle, apart, mean[place], squares[place], share, static_cast<double>(row) * share);
    }
    static_cast<Acc*>(view.mean)[i] = static_cast<Acc>(middle);
    static_cast<Acc*>(view.var)[i] = static_cast<Acc>(apart / static_cast<double>(view.rows));
  }
  invert_as(static_cast<const Acc*>(view.var) + column, static_cast<Acc>(view.eps), n, static_cast<Acc*>(view.rstd) + column);
}

template <Activation activation, class Acc>
void apply_as(const BatchNormSilu& view, const BatchNormPiece& piece, Acc* scratch) {
  over_runs(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t n) {
    const int64_t place = piece.expert * view.features + first;
    const Block<Acc> z = z_rows(view, piece.expert, row, rows, first, n, scratch + block);
    apply_block<activation>(view, place, z, rows, target_of(view, row, place, n, scratch));
  });
}

template <class Acc>
inline Block<Acc> gradient_rows(const BatchNormSiluBackward& view, int64_t expert, int64_t row, int64_t rows, int64_t first, int64_t n,
                                Acc* scratch) {
  return read_rows(view.gradient, row * view.row_stride + expert * view.expert_stride + first, view.row_stride, rows, n, scratch);
}

// Whether the summands may lie where the gradient of z will.
template <class Acc>
inline bool keeps_slopes(const BatchNormSiluBackward& view) {
  return view.forward.y != nullptr && !view.running && view.forward.z.dtype == dtype_of_arithmetic<Acc>;
}

// Sums of some rows, which go to double before they are long.
template <class Acc>
struct ShortSums {
  Acc plain[batch_norm_run_columns] = {}, product[batch_norm_run_columns] = {};

  void move_to(double* plain_total, double* product_total, int64_t n) {
    for (int64_t column = 0; column < n; ++column) {
      plain_total[column] += static_cast<double>(plain[column]);
      product_total[column] += static_cast<double>(product[column]);
      plain[column] = product[column] = 0;
    }
  }
};

template <Activation activation, class Acc>
void sums_as(const BatchNormSiluBackward& view, const BatchNormPiece& piece, double* plain, double* product, Acc* scratch) {
  const BatchNormSilu& f = view.forward;
  const bool keep = keeps_slopes<Acc>(view), last = f.y != nullptr && view.running;
  const int64_t place = piece.expert * f.features + piece.first, n = piece.n;
  ShortSums<Acc> sums;
  for (int64_t column = 0; column < n; ++column) plain[column] = product[column] = 0;
  over_runs(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t) {
    const Block<Acc> z = z_rows(f, piece.expert, row, rows, first, n, scratch + block);
    const Block<Acc> gradient = gradient_rows(view, piece.expert, row, rows, first, n, scratch + 2 * block);
    const Target<Acc> to = target_of(f, row, place, n, scratch);
    over_lanes(n, [&](int64_t column, auto count) __attribute__((always_inline)) {
      const Column<Acc> one = column_of<Acc>(f, place + column, count);
      const Lanes<Acc> factor = one.rstd * one.weight;
      Lanes<Acc> sum = load_whole(sums.plain + column), products = load_whole(sums.product + column);
      for (int64_t i = 0; i < rows; ++i) {
        const Lanes<Acc> normal = one.normal(z.at(i, column));
        const Lanes<Acc> slope = gradient.at(i, column) * gated_slope<activation>(one.inner(normal));
        sum = sum + slope;
        products = products + slope * normal;
        if (keep) store_some(to.at(i, column), count, slope);
        if (last) store_some(to.at(i, column), count, slope * factor);
      }
      store_whole(sums.plain + column, sum);
      store_whole(sums.product + column, products);
    });
    if (last) to.finish(rows);
    if ((row + rows - piece.first_row) % batch_norm_sum_rows == 0) sums.move_to(plain, product, n);
  });
  sums.move_to(plain, product, n);
}

template <class Acc>
void join_sums_as(const BatchNormSiluBackward& view, int64_t column, int64_t n, const double* plain, const double* product,
                  int64_t stride) {
  const int64_t parts = (view.forward.rows + batch_norm_rows - 1) / batch_norm_rows;
  for (int64_t i = column; i < column + n; ++i) {
    double sum = 0, products = 0;
    for (int64_t part = 0; part < parts; ++part) {
      sum = sum + plain[part * stride + i];
      products = products + product[part * stride + i];
    }
    static_cast<Acc*>(view.for_bias)[i] = static_cast<Acc>(sum);
    static_cast<Acc*>(view.for_weight)[i] = static_cast<Acc>(products);
  }
}

template <Activation activation, class Acc>
void finish_as(const BatchNormSiluBackward& view, const BatchNormPiece& piece, Acc* scratch) {
  const BatchNormSilu& f = view.forward;
  const bool kept = keeps_slopes<Acc>(view);
  const Lanes<Acc> total = every_lane(static_cast<Acc>(f.rows));
  over_runs(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t n) {
    const int64_t place = piece.expert * f.features + first;
    const Block<Acc> z = z_rows(f, piece.expert, row, rows, first, n, scratch + block);
    const Target<Acc> to = target_of(f, row, place, n, scratch);
    const Block<Acc> gradient = kept ? Block<Acc>{} : gradient_rows(view, piece.expert, row, rows, first, n, scratch + 2 * block);
    over_lanes(n, [&](int64_t column, auto count) __attribute__((always_inline)) {
      const Column<Acc> one = column_of<Acc>(f, place + column, count);
      const Lanes<Acc> factor = one.rstd * one.weight;
      const Lanes<Acc> plain = load_some(static_cast<const Acc*>(view.for_bias) + place + column, count, Acc{0}) / total,
                       product = load_some(static_cast<const Acc*>(view.for_weight) + place + column, count, Acc{0}) / total;
      for (int64_t i = 0; i < rows; ++i) {
        const Lanes<Acc> normal = one.normal(z.at(i, column));
        const Lanes<Acc> slope =
            kept ? load_some(to.at(i, column), count, Acc{0}) : gradient.at(i, column) * gated_slope<activation>(one.inner(normal));
        store_some(to.at(i, column), count, factor * ((slope - plain) - normal * product));
      }
    });
    to.finish(rows);
  });
}

// Calls body<activation>().
template <class F>
inline void with_activation(Activation activation, const F& body) {
  switch (activation) {
    case Activation::relu:
      return body.template operator()<Activation::relu>();
    case Activation::silu:
      return body.template operator()<Activation::silu>();
    default:
      return body.template operator()<Activation::none>();
  }
}

void load(bool wide, const Elements& from, double missing, int64_t n, void* to) {
  const auto into = [&](auto* out) {
    if (from.data == nullptr) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<std::remove_reference_t<decltype(*out)>>(missing);
    } else {
      load_block(from.dtype, from.data, 0, n, out);
    }
  };
  if (wide) {
    into(static_cast<double*>(to));
  } else {
    into(static_cast<float*>(to));
  }
}

void invert(bool wide, const void* var, double eps, int64_t n, void* rstd) {
  if (wide) {
    invert_as(static_cast<const double*>(var), eps, n, static_cast<double*>(rstd));
  } else {
    invert_as(static_cast<const float*>(var), static_cast<float>(eps), n, static_cast<float*>(rstd));
  }
}

void moments(bool wide, const BatchNormSilu& view, const BatchNormPiece& piece, double* mean, double* squares, void* scratch) {
  if (wide) {
    moments_as(view, piece, mean, squares, static_cast<double*>(scratch));
  } else {
    moments_as(view, piece, mean, squares, static_cast<float*>(scratch));
  }
}

void join_moments(bool wide, const BatchNormSilu& view, int64_t column, int64_t n, const double* mean, const double* squares,
                  int64_t stride) {
  (wide ? join_moments_as<double> : join_moments_as<float>)(view, column, n, mean, squares, stride);
}

void apply(bool wide, const BatchNormSilu& view, const BatchNormPiece& piece, void* scratch) {
  with_activation(view.activation, [&]<Activation activation>() {
    if (wide) {
      apply_as<activation>(view, piece, static_cast<double*>(scratch));
    } else {
      apply_as<activation>(view, piece, static_cast<float*>(scratch));
    }
  });
}

void sums(bool wide, const BatchNormSiluBackward& view, const BatchNormPiece& piece, double* plain, double* product, void* scratch) {
  with_activation(view.forward.activation, [&]<Activation activation>() {
    if (wide) {
      sums_as<activation>(view, piece, plain, product, static_cast<double*>(scratch));
    } else {
      sums_as<activation>(view, piece, plain, product, static_cast<float*>(scratch));
    }
  });
}

void join_sums(bool wide, const BatchNormSiluBackward& view, int64_t column, int64_t n, const double* plain, const double* product,
               int64_t stride) {
  (wide ? join_sums_as<double> : join_sums_as<float>)(view, column, n, plain, product, stride);
}

void finish(bool wide, const BatchNormSiluBackward& view, const BatchNormPiece& piece, void* scratch) {
  with_activation(view.forward.activation, [&]<Activation activation>() {
    if (wide) {
      finish_as<activation>(view, piece, static_cast<double*>(scratch));
    } else {
      finish_as<activation>(view, piece, static_cast<float*>(scratch));
    }
  });
}

const BatchNormSiluLoops table = {load, invert, moments, join_moments, apply, sums, join_sums, finish};

}  // namespace

TASKLOOM_EXPORT_LOOPS(BatchNormSiluLoops, batch_norm_silu_loops, table)

}  // namespace taskloom
