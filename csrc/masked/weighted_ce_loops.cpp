// CPU loops of weighted_ce and its backward, compiled once per CPU level.
#include "common/convert.h"
#include "masked/weighted_ce.h"

namespace taskloom {
namespace {

// e^x for x <= 1, with an error of about one unit in the last place: libm's call would keep the loop from being vectorised, and the same
// plain arithmetic gives the same bits at every level. After expf of the Cephes library (Moshier).
inline float exponential(float x) {
  constexpr float underflow = -87.0f;
  constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  const float inside = x < underflow ? underflow : x;
  const float shifted = inside * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  const float mantissa = (series * (r * r) + r) + 1.0f;
  const float power = bits_float((float_bits(shifted) + 127u) << 23);
  return x < underflow ? 0.0f : mantissa * power;
}

inline double exponential(double x) { return __builtin_exp(x); }

template <class Acc>
void reduce_of(const LogitTile& tile, Acc* __restrict__ largest, Acc* __restrict__ sum) {
  const Acc lowest = -static_cast<Acc>(__builtin_inf());
  const int64_t padded = (tile.columns + tile_lanes - 1) / tile_lanes * tile_lanes;
  for (int64_t row = 0; row < tile.rows; ++row) {
    Acc* __restrict__ logits = static_cast<Acc*>(tile.logits) + row * tile.stride;
    for (int64_t i = tile.columns; i < padded; ++i) logits[i] = lowest;
    Acc highest[tile_lanes], sums[tile_lanes];
    for (int64_t lane = 0; lane < tile_lanes; ++lane) highest[lane] = lowest, sums[lane] = 0;
    for (int64_t i = 0; i < padded; i += tile_lanes) {
      for (int64_t lane = 0; lane < tile_lanes; ++lane) {
        highest[lane] = logits[i + lane] > highest[lane] ? logits[i + lane] : highest[lane];
      }
    }
    Acc top = highest[0];
    for (int64_t lane = 1; lane < tile_lanes; ++lane) top = highest[lane] > top ? highest[lane] : top;
    // Where every logit is -infinity, or NaN, a difference from it would be NaN for -infinity as well.
    const Acc origin = top == lowest ? Acc{0} : top;
    for (int64_t i = 0; i < padded; i += tile_lanes) {
      for (int64_t lane = 0; lane < tile_lanes; ++lane) sums[lane] += exponential(logits[i + lane] - origin);
    }
    Acc total = 0;
    for (int64_t lane = 0; lane < tile_lanes; ++lane) total += sums[lane];
    largest[row] = top;
    sum[row] = total;
  }
}

template <class Acc>
void slope_of(const LogitTile& tile, const Acc* log_sum_exp, const Acc* coefficient, const int64_t* target) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    Acc* __restrict__ logits = static_cast<Acc*>(tile.logits) + row * tile.stride;
    const Acc origin = log_sum_exp[row], factor = coefficient[row];
    for (int64_t i = 0; i < tile.columns; ++i) logits[i] = factor * exponential(logits[i] - origin);
    if (target[row] >= 0 && target[row] < tile.columns) logits[target[row]] -= factor;
  }
}

void load(bool wide, const Elements& from, int64_t offset, int64_t n, void* to) {
  if (wide) {
    load_block(from.dtype, from.data, offset, n, static_cast<double*>(to));
  } else {
    load_block(from.dtype, from.data, offset, n, static_cast<float*>(to));
  }
}

void store(bool wide, const void* from, int64_t n, DType dtype, void* to, int64_t offset) {
  if (wide) {
    store_block(dtype, static_cast<const double*>(from), n, to, offset);
  } else {
    store_block(dtype, static_cast<const float*>(from), n, to, offset);
  }
}

void reduce(bool wide, const LogitTile& tile, void* largest, void* sum) {
  if (wide) {
    reduce_of(tile, static_cast<double*>(largest), static_cast<double*>(sum));
  } else {
    reduce_of(tile, static_cast<float*>(largest), static_cast<float*>(sum));
  }
}

void slope(bool wide, const LogitTile& tile, const void* log_sum_exp, const void* coefficient, const int64_t* target) {
  if (wide) {
    slope_of(tile, static_cast<const double*>(log_sum_exp), static_cast<const double*>(coefficient), target);
  } else {
    slope_of(tile, static_cast<const float*>(log_sum_exp), static_cast<const float*>(coefficient), target);
  }
}

const WeightedCeLoops table = {load, store, reduce, slope};

}  // namespace

TASKLOOM_EXPORT_LOOPS(WeightedCeLoops, weighted_ce_loops, table)

}  // namespace taskloom
