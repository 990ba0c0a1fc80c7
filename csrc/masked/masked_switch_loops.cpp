// CPU loops of masked_switch_, compiled once per CPU level.
#include "common/convert.h"
#include "masked/mask_words.h"
#include "masked/masked_switch.h"

namespace taskloom {
namespace {

template <class Acc>
inline void add(Acc* __restrict__ sum, const Acc* __restrict__ delta, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += delta[i];
}

// Base's n values as lanes of the target's dtype: its own bits where the dtypes agree.
template <class Lane, class Acc>
inline void base_lanes(const MaskedSwitch& change, const void* base, int64_t at, int64_t n, const Acc* values, void* lanes) {
  if (change.base.dtype == change.target_dtype) {
    constexpr auto width = static_cast<int64_t>(sizeof(Lane));
    std::memcpy(lanes, static_cast<const char*>(base) + width * at, static_cast<size_t>(width * n));
  } else {
    store_block(change.target_dtype, values, n, lanes, 0);
  }
}

template <class Acc, class Lane>
void change_sparse(const MaskedSwitch& change, int64_t at, const uint64_t* wanted, const int32_t* positions) {
  alignas(64) Acc base[sparse_limit] = {}, delta[sparse_limit] = {};
  alignas(64) uint8_t gathered[8 * sparse_limit] = {}, off[8 * sparse_limit] = {}, on[8 * sparse_limit] = {};
  gather_elements(element_size(change.base.dtype), change.base.data, at, positions, gathered);
  load_block(change.base.dtype, gathered, 0, sparse_limit, base);
  base_lanes<Lane>(change, gathered, 0, sparse_limit, base, off);
  gather_elements(element_size(change.delta.dtype), change.delta.data, at, positions, gathered);
  load_block(change.delta.dtype, gathered, 0, sparse_limit, delta);
  add(base, delta, sparse_limit);
  store_block(change.target_dtype, base, sparse_limit, on, 0);
  for (int64_t i = 0; i < sparse_limit; ++i) {
    const int32_t position = positions[i];
    const uint8_t* value = (wanted[position >> 6] >> (position & 63)) & 1 ? on : off;
    store_at(change.target, at + position, load_at<Lane>(value, i));
  }
}

template <class Acc, class Lane>
void change_dense(const MaskedSwitch& change, int64_t at, int64_t n, const uint64_t* changed, const uint64_t* wanted) {
  alignas(64) Acc base[mask_block], delta[mask_block];
  alignas(64) Lane off[mask_block], on[mask_block], changed_lanes[mask_block], wanted_lanes[mask_block];
  load_block(change.base.dtype, change.base.data, at, n, base);
  load_block(change.delta.dtype, change.delta.data, at, n, delta);
  base_lanes<Lane>(change, change.base.data, at, n, base, off);
  add(base, delta, n);
  store_block(change.target_dtype, base, n, on, 0);
  expand_words(changed, changed_lanes);
  expand_words(wanted, wanted_lanes);
  for (int64_t i = 0; i < n; ++i) {
    const Lane value = static_cast<Lane>((on[i] & wanted_lanes[i]) | (off[i] & ~wanted_lanes[i]));
    const Lane kept = load_at<Lane>(change.target, at + i);
    store_at(change.target, at + i, static_cast<Lane>((value & changed_lanes[i]) | (kept & ~changed_lanes[i])));
  }
}

// A whole block of the usual dtypes: delta in what is computed in, base as target. Only the result is put down in between, which the
// compiler need not compare with the tensors' addresses.
template <class Acc, class Lane>
void change_plain(const MaskedSwitch& change, int64_t at, const uint64_t* changed, const uint64_t* wanted) {
  constexpr int digits = LaneBits<Lane>::digits;
  alignas(64) constexpr LaneBits<Lane> places;
  alignas(64) Lane result[digits];
  for (int64_t w = 0; w < mask_block_words; ++w) {
    for (int part = 0; part < 64 / digits; ++part) {
      const auto changed_bits = static_cast<Lane>(changed[w] >> (digits * part)),
                 wanted_bits = static_cast<Lane>(wanted[w] >> (digits * part));
      const int64_t from = at + 64 * w + digits * part;
      for (int i = 0; i < digits; ++i) {
        const Lane off = load_at<Lane>(change.base.data, from + i), kept = load_at<Lane>(change.target, from + i);
        const Lane on = value_lane<Acc, Lane>(lane_value<Acc>(off) + load_at<Acc>(change.delta.data, from + i));
        const Lane value = (wanted_bits & places.bit[i]) != 0 ? on : off;
        result[i] = (changed_bits & places.bit[i]) != 0 ? value : kept;
      }
      std::memcpy(static_cast<char*>(change.target) + static_cast<int64_t>(sizeof(Lane)) * from, result, sizeof result);
    }
  }
}

template <class Acc, class Lane>
void change_lanes(const MaskedSwitch& change, int64_t begin, int64_t n) {
  uint64_t changed[mask_block_words], wanted[mask_block_words];
  int32_t positions[sparse_limit];
  const bool plain = change.base.dtype == change.target_dtype && has_plain_lanes<Acc, Lane>(change.target_dtype, change.delta.dtype);
  for (int64_t done = 0; done < n; done += mask_block) {
    const int64_t at = begin + done, size = n - done < mask_block ? n - done : mask_block;
    load_words(change.old_packed, at, size, mask_block_words, changed);
    load_words(change.new_packed, at, size, mask_block_words, wanted);
    for (int64_t w = 0; w < mask_block_words; ++w) changed[w] ^= wanted[w];
    const int64_t count = count_bits(changed, mask_block_words);
    if (count > sparse_limit && plain && size == mask_block) {
      change_plain<Acc, Lane>(change, at, changed, wanted);
    } else if (count > sparse_limit) {
      change_dense<Acc, Lane>(change, at, size, changed, wanted);
    } else if (count > 0) {
      set_positions(changed, positions);
      change_sparse<Acc, Lane>(change, at, wanted, positions);
    }
  }
}

void change(bool wide, const MaskedSwitch& view, int64_t begin, int64_t n) {
  switch (element_size(view.target_dtype)) {
    case 2:
      return wide ? change_lanes<double, uint16_t>(view, begin, n) : change_lanes<float, uint16_t>(view, begin, n);
    case 4:
      return wide ? change_lanes<double, uint32_t>(view, begin, n) : change_lanes<float, uint32_t>(view, begin, n);
    default:
      return change_lanes<double, uint64_t>(view, begin, n);
  }
}

const MaskedSwitchLoops table = {change};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MaskedSwitchLoops, masked_switch_loops, table)

}  // namespace taskloom
