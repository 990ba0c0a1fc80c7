// CPU loops of masked_update, compiled once per CPU level.
#include "common/convert.h"
#include "masked/mask_words.h"
#include "masked/masked_update.h"

namespace taskloom {
namespace {

template <class Acc>
inline void add_scaled(Acc* __restrict__ target, const Acc* __restrict__ delta, Acc scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc product = scale * delta[i];
    target[i] += product;
  }
}

template <class Acc, class Lane>
void update_sparse(const MaskedUpdate& update, int64_t at, const int32_t* positions) {
  alignas(64) Acc target[sparse_limit] = {}, delta[sparse_limit] = {};
  alignas(64) uint8_t gathered[8 * sparse_limit] = {}, stored[8 * sparse_limit] = {};
  gather_elements(sizeof(Lane), update.target.data, at, positions, gathered);
  load_block(update.target.dtype, gathered, 0, sparse_limit, target);
  gather_elements(element_size(update.delta.dtype), update.delta.data, at, positions, gathered);
  load_block(update.delta.dtype, gathered, 0, sparse_limit, delta);
  add_scaled(target, delta, static_cast<Acc>(update.scale), sparse_limit);
  store_block(update.target.dtype, target, sparse_limit, stored, 0);
  for (int64_t i = 0; i < sparse_limit; ++i) store_at(update.out, at + positions[i], load_at<Lane>(stored, i));
}

template <class Acc, class Lane>
void update_dense(const MaskedUpdate& update, int64_t at, int64_t n, const uint64_t* words) {
  alignas(64) Acc target[mask_block], delta[mask_block];
  alignas(64) Lane lanes[mask_block], chosen[mask_block];
  load_block(update.target.dtype, update.target.data, at, n, target);
  load_block(update.delta.dtype, update.delta.data, at, n, delta);
  add_scaled(target, delta, static_cast<Acc>(update.scale), n);
  store_block(update.target.dtype, target, n, lanes, 0);
  expand_words(words, chosen);
  for (int64_t i = 0; i < n; ++i) {
    const Lane kept = load_at<Lane>(update.target.data, at + i);
    store_at(update.out, at + i, static_cast<Lane>((kept & ~chosen[i]) | (lanes[i] & chosen[i])));
  }
}

// A whole block of the usual dtypes: delta in what is computed in. Only the result is put down in between, which the compiler need not
// compare with the tensors' addresses.
template <class Acc, class Lane>
void update_plain(const MaskedUpdate& update, int64_t at, const uint64_t* words) {
  constexpr int digits = LaneBits<Lane>::digits;
  alignas(64) constexpr LaneBits<Lane> places;
  alignas(64) Lane result[digits];
  const auto scale = static_cast<Acc>(update.scale);
  for (int64_t w = 0; w < mask_block_words; ++w) {
    for (int part = 0; part < 64 / digits; ++part) {
      const auto bits = static_cast<Lane>(words[w] >> (digits * part));
      const int64_t from = at + 64 * w + digits * part;
      for (int i = 0; i < digits; ++i) {
        const Acc product = scale * load_at<Acc>(update.delta.data, from + i);
        const Lane kept = load_at<Lane>(update.target.data, from + i);
        const Lane changed = value_lane<Acc, Lane>(lane_value<Acc>(kept) + product);
        result[i] = (bits & places.bit[i]) != 0 ? changed : kept;
      }
      std::memcpy(static_cast<char*>(update.out) + static_cast<int64_t>(sizeof(Lane)) * from, result, sizeof result);
    }
  }
}

template <class Acc, class Lane>
void update_lanes(const MaskedUpdate& update, int64_t begin, int64_t n) {
  uint64_t words[mask_block_words];
  int32_t positions[sparse_limit];
  const auto* target = static_cast<const char*>(update.target.data);
  auto* out = static_cast<char*>(update.out);
  const bool plain = has_plain_lanes<Acc, Lane>(update.target.dtype, update.delta.dtype);
  for (int64_t done = 0; done < n; done += mask_block) {
    const int64_t at = begin + done, size = n - done < mask_block ? n - done : mask_block;
    if (update.packed) {
      load_words(update.mask, at, size, mask_block_words, words);
    } else {
      pack_words(update.mask + at, size, words);
    }
    const int64_t count = count_bits(words, mask_block_words);
    if (count > sparse_limit && plain && size == mask_block) {
      update_plain<Acc, Lane>(update, at, words);
      continue;
    }
    if (count > sparse_limit) {
      update_dense<Acc, Lane>(update, at, size, words);
      continue;
    }
    constexpr auto width = static_cast<int64_t>(sizeof(Lane));
    if (out != target) std::memcpy(out + width * at, target + width * at, static_cast<size_t>(width * size));
    if (count == 0) continue;
    set_positions(words, positions);
    update_sparse<Acc, Lane>(update, at, positions);
  }
}

void update(bool wide, const MaskedUpdate& update, int64_t begin, int64_t n) {
  switch (element_size(update.target.dtype)) {
    case 2:
      return wide ? update_lanes<double, uint16_t>(update, begin, n) : update_lanes<float, uint16_t>(update, begin, n);
    case 4:
      return wide ? update_lanes<double, uint32_t>(update, begin, n) : update_lanes<float, uint32_t>(update, begin, n);
    default:
      return update_lanes<double, uint64_t>(update, begin, n);
  }
}

const MaskedUpdateLoops table = {update};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MaskedUpdateLoops, masked_update_loops, table)

}  // namespace taskloom
