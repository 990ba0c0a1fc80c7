// Brings active entries together in batches, steps them with a rule, and puts them back. For NAME_loops.cpp files: internal linkage.
#pragma once

#include "common/convert.h"
#include "masked/mask_words.h"
#include "masked/masked_step.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace taskloom {
namespace {

// A batch takes blocks of a mask until it has `step_batch` entries, so it may hold one block more.
constexpr int64_t step_batch = 512;
constexpr int64_t step_room = step_batch + mask_block;

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
    rule(parameter, gradient, place + done, size);
    store_block(of.dtype, parameter, size, of.parameter, at + done);
  }
}

// Entries at + positions[0 .. n], n at most step_room.
template <class Acc, class Lane, class Index, class Rule>
void step_gathered(const MaskedParameter& of, int64_t at, const Index* positions, int64_t n, int64_t place, const Rule& rule) {
  alignas(64) Acc parameter[step_room], gradient[step_room];
  alignas(64) Lane lanes[step_room];
  auto* to = static_cast<Lane*>(of.parameter) + at;
  const auto* slope = static_cast<const Lane*>(of.gradient) + at;
  for (int64_t i = 0; i < n; ++i) lanes[i] = to[positions[i]];
  load_block(of.dtype, lanes, 0, n, parameter);
  for (int64_t i = 0; i < n; ++i) lanes[i] = slope[positions[i]];
  load_block(of.dtype, lanes, 0, n, gradient);
  rule(parameter, gradient, place, n);
  store_block(of.dtype, parameter, n, lanes, 0);
  for (int64_t i = 0; i < n; ++i) to[positions[i]] = lanes[i];
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
