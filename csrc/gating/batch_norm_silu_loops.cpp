// CPU loops of batch_norm_silu, compiled once per CPU level. A lane is a column; rows are added up in blocks of a fixed number, and blocks
// in double, whatever columns a call is for, so that the bits depend on neither threads nor level.
#include "gating/batch_norm_silu.h"
#include "routed/activations.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

constexpr int64_t block_rows = batch_norm_rows, most_columns = batch_norm_columns;

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
    return direct() ? static_cast<Acc*>(data) + offset + row * row_stride + column : scratch + row * most_columns + column;
  }
  void finish(int64_t rows) const {
    if (direct()) return;
    for (int64_t row = 0; row < rows; ++row) store_block(dtype, scratch + row * most_columns, n, data, offset + row * row_stride);
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

// Where the columns of a strip are in vectors [experts, features].
inline int64_t place_of(const BatchNormSilu& view, int64_t expert, int64_t first) { return expert * view.features + first; }

template <class Acc>
inline Target<Acc> target_of(const BatchNormSilu& view, int64_t place, int64_t n, Acc* scratch) {
  return {view.z.dtype, view.y, place, view.experts * view.features, n, scratch};
}

template <Activation activation, class Acc>
inline void apply_block(const BatchNormSilu& view, int64_t place, const Block<Acc>& z, int64_t rows, const Target<Acc>& to) {
  over_lanes(to.n, [&](int64_t column, auto count) __attribute__((always_inline)) {
    const Column<Acc> one = column_of<Acc>(view, place + column, count);
    for (int64_t row = 0; row < rows; ++row) {
      store_some(to.at(row, column), count, activated<activation>(one.inner(one.normal(z.at(row, column)))));
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

// Means and sums of squares about them of a strip's columns, as blocks of rows are added (Chan, Golub and LeVeque).
template <class Acc>
struct Moments {
  double mean[most_columns] = {}, squares[most_columns] = {};
  int64_t count = 0;

  void add(const Block<Acc>& z, int64_t rows, int64_t n) {
    Acc means[most_columns], apart[most_columns];
    for (int64_t column = 0; column < n; column += lanes) {
      const Lanes<Acc> sum = sum_of_rows<Acc>(rows, [&](int64_t row) __attribute__((always_inline)) { return z.at(row, column); });
      const Lanes<Acc> middle = sum / every_lane(static_cast<Acc>(rows));
      store_whole(means + column, middle);
      store_whole(apart + column, sum_of_rows<Acc>(rows, [&](int64_t row) __attribute__((always_inline)) {
                    const Lanes<Acc> one = z.at(row, column) - middle;
                    return one * one;
                  }));
    }
    const double share = static_cast<double>(rows) / static_cast<double>(count + rows), weight = static_cast<double>(count) * share;
    for (int64_t column = 0; column < n; ++column) {
      const double step = static_cast<double>(means[column]) - mean[column];
      squares[column] = squares[column] + (static_cast<double>(apart[column]) + step * step * weight);
      mean[column] = mean[column] + step * share;
    }
    count += rows;
  }
};

template <class Acc>
inline void invert_as(const Acc* var, Acc eps, int64_t n, Acc* rstd) {
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(rstd + place, count, every_lane(Acc{1}) / square_root(load_some(var + place, count, Acc{1}) + every_lane(eps)));
  });
}

template <class F>
inline void over_row_blocks(int64_t rows, const F& work) {
  for (int64_t row = 0; row < rows; row += block_rows) work(row, rows - row < block_rows ? rows - row : block_rows);
}

template <Activation activation, class Acc>
void train_as(const BatchNormSilu& view, int64_t expert, int64_t first, int64_t n, bool keep, Acc* scratch) {
  const int64_t stride = whole_lanes(n), place = place_of(view, expert, first), offset = expert * view.expert_stride + first;
  Acc* const kept = scratch + block_rows * most_columns;
  Moments<Acc> moments;
  over_row_blocks(view.rows, [&](int64_t row, int64_t rows) {
    const int64_t from = offset + row * view.row_stride;
    const Block<Acc> z = keep ? copied_rows(view.z, from, view.row_stride, rows, n, kept + row * stride)
                              : read_rows(view.z, from, view.row_stride, rows, n, kept);
    moments.add(z, rows, n);
  });
  Acc *const mean = static_cast<Acc*>(view.mean) + place, *const var = static_cast<Acc*>(view.var) + place;
  for (int64_t column = 0; column < n; ++column) {
    mean[column] = static_cast<Acc>(moments.mean[column]);
    var[column] = static_cast<Acc>(moments.squares[column] / static_cast<double>(view.rows));
  }
  invert_as(var, static_cast<Acc>(view.eps), n, static_cast<Acc*>(view.rstd) + place);
  const Target<Acc> to = target_of(view, place, n, scratch);
  over_row_blocks(view.rows, [&](int64_t row, int64_t rows) {
    const Block<Acc> z =
        keep ? Block<Acc>{kept + row * stride, stride} : read_rows(view.z, offset + row * view.row_stride, view.row_stride, rows, n, kept);
    apply_block<activation>(view, place, z, rows, to.from_row(row));
  });
}

template <Activation activation, class Acc>
void apply_as(const BatchNormSilu& view, int64_t first_row, int64_t rows, Acc* scratch) {
  for (int64_t expert = 0; expert < view.experts; ++expert) {
    for (int64_t first = 0; first < view.features; first += most_columns) {
      const int64_t n = view.features - first < most_columns ? view.features - first : most_columns, place = place_of(view, expert, first);
      const int64_t offset = expert * view.expert_stride + first + first_row * view.row_stride;
      const Block<Acc> z = read_rows(view.z, offset, view.row_stride, rows, n, scratch + block_rows * most_columns);
      apply_block<activation>(view, place, z, rows, target_of(view, place, n, scratch).from_row(first_row));
    }
  }
}

// What backward reads of a strip, and what it makes of it a block of rows at a time.
template <Activation activation, class Acc>
struct BackwardStrip {
  const BatchNormSiluBackward& view;
  int64_t expert, first, n, place;
  Acc *slopes, *normals;  // each of a block, or of all rows
  double plain[most_columns] = {}, times_normal[most_columns] = {};

  int64_t stride() const { return whole_lanes(n); }

  // The gradients of the activation's arguments and the normalised values of rows, put at row `at` of the two.
  void differentiate(int64_t row, int64_t rows, int64_t at, bool add) {
    const BatchNormSilu& f = view.forward;
    Acc *const slope_rows = slopes + at * stride(), *const normal_rows = normals + at * stride();
    const Block<Acc> gradient =
        read_rows(view.gradient, expert * view.expert_stride + first + row * view.row_stride, view.row_stride, rows, n, slope_rows);
    const Block<Acc> z = read_rows(f.z, expert * f.expert_stride + first + row * f.row_stride, f.row_stride, rows, n, normal_rows);
    over_lanes(n, [&](int64_t column, auto count) __attribute__((always_inline)) {
      const Column<Acc> one = column_of<Acc>(f, place + column, count);
      Lanes<Acc> sum = every_lane(Acc{0}), product = sum;
      for (int64_t i = 0; i < rows; ++i) {
        const Lanes<Acc> normal = one.normal(z.at(i, column));
        const Lanes<Acc> slope = gradient.at(i, column) * slope_of<activation>(one.inner(normal));
        sum = sum + slope;
        product = product + slope * normal;
        store_whole(slope_rows + i * stride() + column, slope);
        store_whole(normal_rows + i * stride() + column, normal);
      }
      if (!add) return;
      Acc sums[lanes], products[lanes];
      store_whole(sums, sum);
      store_whole(products, product);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        plain[column + lane] += static_cast<double>(sums[lane]);
        times_normal[column + lane] += static_cast<double>(products[lane]);
      }
    });
  }

  // The gradient of z from what `differentiate` put at row `at`.
  void finish(int64_t rows, int64_t at, const Acc* mean_plain, const Acc* mean_product, const Target<Acc>& to) const {
    const Block<Acc> slope{slopes + at * stride(), stride()}, normal{normals + at * stride(), stride()};
    over_lanes(n, [&](int64_t column, auto count) __attribute__((always_inline)) {
      const Column<Acc> one = column_of<Acc>(view.forward, place + column, count);
      const Lanes<Acc> factor = one.rstd * one.weight, apart = load_whole(mean_plain + column), product = load_whole(mean_product + column);
      for (int64_t i = 0; i < rows; ++i) {
        store_some(to.at(i, column), count, factor * ((slope.at(i, column) - apart) - normal.at(i, column) * product));
      }
    });
    to.finish(rows);
  }
};

template <Activation activation, class Acc>
void backward_as(const BatchNormSiluBackward& view, int64_t expert, int64_t first, int64_t n, bool keep, Acc* scratch) {
  const BatchNormSilu& f = view.forward;
  const int64_t kept_rows = keep ? f.rows : block_rows, place = place_of(f, expert, first);
  Acc *const slopes = scratch + block_rows * most_columns, *const normals = slopes + kept_rows * whole_lanes(n);
  BackwardStrip<activation, Acc> strip{view, expert, first, n, place, slopes, normals};
  const Target<Acc> to = target_of(f, place, n, scratch);
  Acc mean_plain[most_columns] = {}, mean_product[most_columns] = {};
  over_row_blocks(f.rows, [&](int64_t row, int64_t rows) {
    strip.differentiate(row, rows, keep ? row : 0, true);
    if (view.running && f.y != nullptr) strip.finish(rows, keep ? row : 0, mean_plain, mean_product, to.from_row(row));
  });
  for (int64_t column = 0; column < n; ++column) {
    static_cast<Acc*>(view.for_bias)[place + column] = static_cast<Acc>(strip.plain[column]);
    static_cast<Acc*>(view.for_weight)[place + column] = static_cast<Acc>(strip.times_normal[column]);
    mean_plain[column] = static_cast<Acc>(strip.plain[column] / static_cast<double>(f.rows));
    mean_product[column] = static_cast<Acc>(strip.times_normal[column] / static_cast<double>(f.rows));
  }
  if (view.running || f.y == nullptr) return;
  over_row_blocks(f.rows, [&](int64_t row, int64_t rows) {
    if (!keep) strip.differentiate(row, rows, 0, false);
    strip.finish(rows, keep ? row : 0, mean_plain, mean_product, to.from_row(row));
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

void train(bool wide, const BatchNormSilu& view, int64_t expert, int64_t first, int64_t n, bool keep, void* scratch) {
  with_activation(view.activation, [&]<Activation activation>() {
    if (wide) {
      train_as<activation>(view, expert, first, n, keep, static_cast<double*>(scratch));
    } else {
      train_as<activation>(view, expert, first, n, keep, static_cast<float*>(scratch));
    }
  });
}

void apply(bool wide, const BatchNormSilu& view, int64_t first_row, int64_t rows, void* scratch) {
  with_activation(view.activation, [&]<Activation activation>() {
    if (wide) {
      apply_as<activation>(view, first_row, rows, static_cast<double*>(scratch));
    } else {
      apply_as<activation>(view, first_row, rows, static_cast<float*>(scratch));
    }
  });
}

void backward(bool wide, const BatchNormSiluBackward& view, int64_t expert, int64_t first, int64_t n, bool keep, void* scratch) {
  with_activation(view.forward.activation, [&]<Activation activation>() {
    if (wide) {
      backward_as<activation>(view, expert, first, n, keep, static_cast<double*>(scratch));
    } else {
      backward_as<activation>(view, expert, first, n, keep, static_cast<float*>(scratch));
    }
  });
}

const BatchNormSiluLoops table = {load, invert, train, apply, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(BatchNormSiluLoops, batch_norm_silu_loops, table)

}  // namespace taskloom
