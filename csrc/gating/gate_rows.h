// A row of logits as lanes: its exponentials, their sum in the order that every backend repeats, and sigmoids. For NAME_loops.cpp files.
// Torch-free, internal linkage.
#pragma once

#include "gating/topk_gate.h"
#include "routed/activations.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

template <class Acc>
inline Acc lowest_value() {
  return -bits_infinity<Acc>();
}

// x is NaN ? yes : no, in each lane.
template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> where_nan(const Lanes<Acc>& x, const Lanes<Acc>& yes, const Lanes<Acc>& no) {
  Lanes<Acc> r;
  for (int i = 0; i < Lanes<Acc>::parts; ++i) r.part[i] = x.part[i] == x.part[i] ? no.part[i] : yes.part[i];
  return r;
}

// The same values with one and the same NaN: which of two NaNs an operation passes on depends on the instruction.
template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> with_one_nan(const Lanes<Acc>& x) {
  return where_nan(x, every_lane(static_cast<Acc>(__builtin_nan(""))), x);
}

// load_some in one instruction where there is one.
template <class Acc, class Count>
inline __attribute__((always_inline)) Lanes<Acc> load_part(const Acc* from, Count count, Acc filler) {
#ifdef __AVX512F__
  if constexpr (sizeof(Acc) == 4 && sizeof(Lanes<Acc>) == 64) {
    Lanes<Acc> r;
    const auto inside = static_cast<__mmask16>((1u << static_cast<int64_t>(count)) - 1);
    r.part[0] = _mm512_mask_loadu_ps(_mm512_set1_ps(filler), inside, from);
    return r;
  }
#endif
  return load_some(from, count, filler);
}

// exponential(x) for x of at most 0 and NaN, with the same bits in fewer operations.
template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> exponential_below_zero(const Lanes<Acc>& x) {
  using Table = ExpTable<Acc>;
  using Native = typename Lanes<Acc>::Native;
  typedef typename Words<Acc>::Int Bits __attribute__((vector_size(native_bytes)));
  Lanes<Acc> r;
  const Native zero{};
  for (int i = 0; i < Lanes<Acc>::parts; ++i) {
    const Native v = x.part[i];
    const Native shifted = v * Table::log2_e + Table::rounder;
    const Native power = shifted - Table::rounder;
    const Native rest = (v - power * Table::ln2_high) - power * Table::ln2_low;
    Native sum = Table::inverse_factorial[Table::terms - 1] + zero;
    for (int term = Table::terms - 2; term >= 0; --term) sum = sum * rest + Table::inverse_factorial[term];
    const Bits scale = ((Bits)shifted << Words<Acc>::mantissa) + Words<Acc>::one_half;
    const Native scaled = (sum * (Native)scale) * Acc{2};
    r.part[i] = v < Table::lowest + zero ? zero : scaled;
  }
  return r;
}

// Entries offset .. offset + n and -inf up to whole steps: where they lie if nothing is to be changed, else in `scratch`.
template <class Acc>
inline const Acc* read_padded(const Elements& from, int64_t offset, int64_t n, Acc* scratch, Acc padding) {
  if (from.dtype == dtype_of_arithmetic<Acc> && n % gate_row_step == 0) return static_cast<const Acc*>(from.data) + offset;
  load_block(from.dtype, from.data, offset, n, scratch);
  for (int64_t i = n; i < padded_experts(n); ++i) scratch[i] = padding;
  return scratch;
}

// The sum of e^(x factor - center) over n entries, a multiple of the step, for a centre that is the largest x factor; the exponentials
// too, unless `out` is null.
template <class Acc>
inline __attribute__((always_inline)) Acc sum_exponentials(const Acc* x, int64_t n, Acc factor, Acc center, Acc* out) {
  const Lanes<Acc> factors = every_lane(factor), centers = every_lane(center);
  Lanes<Acc> even = every_lane(Acc{0}), odd = every_lane(Acc{0});
  for (int64_t place = 0; place < n; place += gate_row_step) {
    const Lanes<Acc> first = exponential_below_zero(load_whole(x + place) * factors - centers);
    const Lanes<Acc> second = exponential_below_zero(load_whole(x + place + lanes) * factors - centers);
    even = even + first;
    odd = odd + second;
    if (out != nullptr) {
      store_whole(out + place, first);
      store_whole(out + place + lanes, second);
    }
  }
  return sum_of_lanes(even + odd);
}

// The sum of the sigmoids of x factor, and these themselves.
template <class Acc>
inline __attribute__((always_inline)) Acc sum_sigmoids(const Acc* x, int64_t n, Acc factor, Acc* out) {
  const Lanes<Acc> factors = every_lane(factor);
  Lanes<Acc> even = every_lane(Acc{0}), odd = every_lane(Acc{0});
  for (int64_t place = 0; place < n; place += gate_row_step) {
    const Lanes<Acc> first = logistic(load_whole(x + place) * factors);
    const Lanes<Acc> second = logistic(load_whole(x + place + lanes) * factors);
    even = even + first;
    odd = odd + second;
    store_whole(out + place, first);
    store_whole(out + place + lanes, second);
  }
  return sum_of_lanes(even + odd);
}

template <class Acc>
inline __attribute__((always_inline)) Acc largest_of_lanes(const Lanes<Acc>& a) {
  Acc one[lanes];
  store_whole(one, a);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) one[lane] = one[lane] > one[lane + width] ? one[lane] : one[lane + width];
  return one[0];
}

template <class Acc>
inline Acc largest_of_row(const Acc* x, int64_t n) {
  Lanes<Acc> even = load_whole(x), odd = load_whole(x + lanes);
  for (int64_t place = gate_row_step; place < n; place += gate_row_step) {
    even = larger(load_whole(x + place), even);
    odd = larger(load_whole(x + place + lanes), odd);
  }
  return largest_of_lanes(larger(even, odd));
}

// Entry `slot` of a row of ids.
inline int64_t id_at(const void* ids, bool long_ids, int64_t place) {
  return long_ids ? load_at<int64_t>(ids, place) : load_at<int32_t>(ids, place);
}

}  // namespace
}  // namespace taskloom
