// Brings active entries together, steps them with a rule, and puts them back. For NAME_loops.cpp files: internal linkage.
#pragma once

#include "common/convert.h"
#include "common/lanes_avx512.h"
#include "masked/mask_words.h"
#include "masked/masked_step.h"

namespace taskloom {
namespace {

// A batch takes blocks of a mask until it has `step_batch` entries, so it may hold one block more.
constexpr int64_t step_batch = 512;
constexpr int64_t step_room = step_batch + mask_block;

// Rules work on whole vectors of this many entries. All buffers have room for the last one.
constexpr int64_t step_vector = 16;

inline int64_t padded(int64_t n) { return (n + step_vector - 1) / step_vector * step_vector; }

// The last few elements of a rule's state in a copy of the length of a vector, put back at the end; of no state, nothing.
template <class Acc>
class StateTail {
 public:
  StateTail(Acc* state, int64_t n) : state_(state), n_(state == nullptr ? 0 : n) {
    for (int64_t i = 0; i < n_; ++i) copy_[i] = state_[i];
  }
  ~StateTail() {
    for (int64_t i = 0; i < n_; ++i) state_[i] = copy_[i];
  }
  StateTail(const StateTail&) = delete;
  StateTail& operator=(const StateTail&) = delete;

  Acc* data() { return state_ == nullptr ? nullptr : copy_; }

 private:
  Acc* state_;
  int64_t n_;
  Acc copy_[step_vector] = {};
};

// Zeroes what a vector has beyond n entries, so that a rule meets no numbers that are slow to work with.
template <class Acc>
inline void pad(Acc* values, int64_t n) {
  for (int64_t i = n; i < padded(n); ++i) values[i] = Acc{0};
}

// Calls rule.step for n entries in buffers: whole vectors first, then the rest with a copy of its state.
template <class Acc, class Rule>
void apply(const Rule& rule, Acc* parameter, Acc* gradient, int64_t place, int64_t n) {
  Acc* const first = rule.first == nullptr ? nullptr : rule.first + place;
  Acc* const second = rule.second == nullptr ? nullptr : rule.second + place;
  const int64_t whole = n / step_vector * step_vector;
  rule.step(parameter, gradient, first, second, whole);
  if (whole == n) return;
  pad(parameter, n);
  pad(gradient, n);
  StateTail<Acc> first_tail(first == nullptr ? nullptr : first + whole, n - whole);
  StateTail<Acc> second_tail(second == nullptr ? nullptr : second + whole, n - whole);
  rule.step(parameter + whole, gradient + whole, first_tail.data(), second_tail.data(), step_vector);
}

// Writes the positions of a word's set bits, counted from `first`, and returns how many; may write up to 16 more than these.
inline int64_t append_positions(uint64_t bits, int32_t first, int32_t* to) {
  int64_t count = 0;
#ifdef __AVX512F__
  const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int32_t part = 0; part < 64; part += 16) {
    const auto some = static_cast<__mmask16>(bits >> part);
    _mm512_storeu_si512(to + count, _mm512_maskz_compress_epi32(some, _mm512_add_epi32(places, _mm512_set1_epi32(first + part))));
    count += __builtin_popcount(some);
  }
#else
  for (; bits != 0; bits &= bits - 1) to[count++] = first + __builtin_ctzll(bits);
#endif
  return count;
}

// Entries at .. at + n.
template <class Acc, class Rule>
void step_run(const MaskedParameter& of, int64_t at, int64_t n, int64_t place, const Rule& rule) {
  alignas(64) Acc parameter[step_batch], gradient[step_batch];
  for (int64_t done = 0; done < n; done += step_batch) {
    const int64_t size = n - done < step_batch ? n - done : step_batch;
    load_block(of.dtype, of.parameter, at + done, size, parameter);
    load_block(of.dtype, of.gradient, at + done, size, gradient);
    apply(rule, parameter, gradient, place + done, size);
    store_block(of.dtype, parameter, size, of.parameter, at + done);
  }
}

// Left to itself the compiler takes the processor's gather and scatter instructions, which are slower than as many loads and stores.
inline void one_by_one() { asm volatile(""); }

template <class Lane, class Index>
void pick(const Lane* from, const Index* positions, int64_t n, Lane* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from[positions[i]];
    one_by_one();
  }
}

template <class Lane, class Index>
void put(const Lane* from, const Index* positions, int64_t n, Lane* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[positions[i]] = from[i];
    one_by_one();
  }
}

// Entries at + positions[0 .. n], n at most step_room.
template <class Acc, class Lane, class Index, class Rule>
void step_gathered(const MaskedParameter& of, int64_t at, const Index* positions, int64_t n, int64_t place, const Rule& rule) {
  alignas(64) Acc parameter[step_room], gradient[step_room];
  alignas(64) Lane lanes[step_room];
  auto* to = static_cast<Lane*>(of.parameter) + at;
  const auto* slope = static_cast<const Lane*>(of.gradient) + at;
  pick(to, positions, n, lanes);
  load_block(of.dtype, lanes, 0, n, parameter);
  pick(slope, positions, n, lanes);
  load_block(of.dtype, lanes, 0, n, gradient);
  apply(rule, parameter, gradient, place, n);
  store_block(of.dtype, parameter, n, lanes, 0);
  put(lanes, positions, n, to);
}

template <class Acc, class Lane, class Rule>
void step_packed(const MaskedParameter& of, const MaskedPiece& piece, const Rule& rule) {
  const auto* packed = static_cast<const uint8_t*>(of.active);
  uint64_t words[mask_block_words];
  int32_t positions[step_room + 16];
  int64_t held = 0, place = piece.place;
  const auto flush = [&] {
    if (held == 0) return;
    step_gathered<Acc, Lane>(of, piece.begin, positions, held, place, rule);
    place += held;
    held = 0;
  };
  for (int64_t done = 0; done < piece.n; done += mask_block) {
    const int64_t size = piece.n - done < mask_block ? piece.n - done : mask_block;
    load_words(packed, piece.begin + done, size, mask_block_words, words);
    if (count_bits(words, mask_block_words) == size) {
      flush();
      step_run<Acc>(of, piece.begin + done, size, place, rule);
      place += size;
      continue;
    }
    for (int64_t w = 0; w < mask_block_words; ++w) {
      held += append_positions(words[w], static_cast<int32_t>(done + 64 * w), positions + held);
    }
    if (held >= step_batch) flush();
  }
  flush();
}

#ifdef __AVX512BW__
// Going over all entries of a mask takes about the time of fetching one in 80.
constexpr int64_t step_dense = 80;

// The parameters and gradients of this many words stay in the first-level cache between the two passes over them.
constexpr int64_t step_region_words = 2 * mask_block_words;
constexpr int64_t step_region = 64 * step_region_words;

// Entries of a region from `at` on: the active lanes of each vector are moved together, stepped, and moved apart again.
template <DType dtype, class Rule>
void step_compressed(const MaskedParameter& of, int64_t at, const uint64_t* words, int64_t place, const Rule& rule) {
  alignas(64) float parameter[step_region + lane_count], gradient[step_region + lane_count];
  int64_t held = 0;
  for (int64_t lane = 0; lane < step_region; lane += lane_count) {
    const auto some = static_cast<__mmask16>(words[lane / 64] >> (lane % 64));
    _mm512_storeu_ps(parameter + held, _mm512_maskz_compress_ps(some, Storage<dtype>::load(of.parameter, at + lane, some)));
    _mm512_storeu_ps(gradient + held, _mm512_maskz_compress_ps(some, Storage<dtype>::load(of.gradient, at + lane, some)));
    held += __builtin_popcount(some);
  }
  apply(rule, parameter, gradient, place, held);
  const float* from = parameter;
  for (int64_t lane = 0; lane < step_region; lane += lane_count) {
    const auto some = static_cast<__mmask16>(words[lane / 64] >> (lane % 64));
    Storage<dtype>::store(of.parameter, at + lane, _mm512_maskz_expand_ps(some, _mm512_loadu_ps(from)), some);
    from += __builtin_popcount(some);
  }
}

template <DType dtype, class Rule>
void step_regions(const MaskedParameter& of, const MaskedPiece& piece, const Rule& rule) {
  uint64_t words[step_region_words];
  int64_t place = piece.place;
  for (int64_t done = 0; done < piece.n; done += step_region) {
    const int64_t at = piece.begin + done, size = piece.n - done < step_region ? piece.n - done : step_region;
    load_words(static_cast<const uint8_t*>(of.active), at, size, step_region_words, words);
    const int64_t active = count_bits(words, step_region_words);
    if (active == size) {
      step_run<float>(of, at, size, place, rule);
    } else if (active != 0) {
      step_compressed<dtype>(of, at, words, place, rule);
    }
    place += active;
  }
}

// Packed entries that are many, of every dtype whose arithmetic is float.
template <class Rule>
void step_dense_packed(const MaskedParameter& of, const MaskedPiece& piece, const Rule& rule) {
  switch (of.dtype) {
    case DType::f32:
      return step_regions<DType::f32>(of, piece, rule);
    case DType::bf16:
      return step_regions<DType::bf16>(of, piece, rule);
    case DType::f16:
      return step_regions<DType::f16>(of, piece, rule);
    case DType::f64:
      return;
  }
}
#endif

template <class Acc, class Lane, class Index, class Rule>
void step_indexed(const MaskedParameter& of, const MaskedPiece& piece, const Rule& rule) {
  const auto* indices = static_cast<const Index*>(of.active) + piece.begin;
  for (int64_t done = 0; done < piece.n; done += step_batch) {
    const int64_t size = piece.n - done < step_batch ? piece.n - done : step_batch;
    step_gathered<Acc, Lane>(of, 0, indices + done, size, piece.place + done, rule);
  }
}

template <class Acc, class Lane, class Rule>
void step_lanes(const MaskedParameter& of, const MaskedPiece& piece, const Rule& rule) {
  switch (of.kind) {
    case ActiveKind::all:
      return step_run<Acc>(of, piece.begin, piece.n, piece.place, rule);
    case ActiveKind::packed:
#ifdef __AVX512BW__
      if constexpr (sizeof(Acc) == sizeof(float)) {
        if (piece.active >= piece.n / step_dense) return step_dense_packed(of, piece, rule);
      }
#endif
      return step_packed<Acc, Lane>(of, piece, rule);
    case ActiveKind::index32:
      return step_indexed<Acc, Lane, int32_t>(of, piece, rule);
    case ActiveKind::index64:
      return step_indexed<Acc, Lane, int64_t>(of, piece, rule);
  }
}

// Rule<Acc>{state..} is made by the caller for float and for double.
template <class Narrow, class Wide>
void step_piece(const MaskedParameter& of, const MaskedPiece& piece, const Narrow& narrow, const Wide& wide) {
  switch (element_size(of.dtype)) {
    case 2:
      return step_lanes<float, uint16_t>(of, piece, narrow);
    case 4:
      return step_lanes<float, uint32_t>(of, piece, narrow);
    default:
      return step_lanes<double, uint64_t>(of, piece, wide);
  }
}

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

}  // namespace
}  // namespace taskloom
