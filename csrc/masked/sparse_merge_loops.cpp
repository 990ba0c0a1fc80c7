// CPU loops of sparse_merge, compiled once per CPU level. A block of 512 entries of all tasks goes through the stages in cache.
#include <type_traits>

#include "common/convert.h"
#include "common/philox_words.h"
#include "masked/sparse_merge.h"
#include "masked/sparse_merge_fused.h"

namespace taskloom {
namespace {

constexpr int64_t block = 512;
constexpr int64_t lanes = 16;

template <class Acc>
using Bits = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;

template <class Acc>
struct Scratch {
  Acc *base, *combined, *weight_sum, *elected, *sum;
  Bits<Acc>* keep;
  Acc *delta, *part;  // [tasks][block]
  Acc* multiplier;    // [tasks][group], of selection by row: 0 where dropped
  int32_t* votes;
  int32_t* selected;  // [tasks][block], only with a vote of the selected
  uint32_t* words;    // of one block
  void *row_bits, *row_scratch;
  int32_t* ranks;
  int64_t* rank_limits;  // [row]
  Acc* rank_factors;     // [row]
  double* lane_dots;     // [pairs][lanes], summed over the blocks of a chunk
};

inline int64_t group_length(const MergeView& merge, int64_t n) {
  if (merge.row_length == 0) return n;
  const int64_t rows = (int64_t{1} << 14) / merge.row_length;
  return (rows > 0 ? rows : 1) * merge.row_length;
}

struct Carver {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
};

template <class Acc>
Scratch<Acc> carve(const MergeView& merge, void* memory, int64_t* bytes) {
  Carver carver{static_cast<char*>(memory)};
  const bool rows = merge.select == Select::row_magnitude || merge.select == Select::rank_dropout;
  const int64_t tasks = merge.count;
  const int64_t row = rows ? merge.row_length : 0;
  Scratch<Acc> s{};
  s.base = carver.take<Acc>(block);
  s.combined = carver.take<Acc>(block);
  s.weight_sum = carver.take<Acc>(block);
  s.elected = carver.take<Acc>(block);
  s.sum = carver.take<Acc>(block);
  s.keep = carver.take<Bits<Acc>>(block);
  s.delta = carver.take<Acc>(tasks * block);
  s.part = carver.take<Acc>(tasks * block);
  s.multiplier = carver.take<Acc>(rows ? tasks * group_length(merge, 0) : 0);
  s.votes = carver.take<int32_t>(block);
  s.selected = carver.take<int32_t>(merge.vote == Vote::selected ? tasks * block : 0);
  s.words = carver.take<uint32_t>((row > block ? row : block) + 8);
  s.row_bits = carver.take<Bits<Acc>>(row + block);
  s.row_scratch = carver.take<char>(row_rank_scratch(sizeof(Acc) == 8, row));
  s.ranks = carver.take<int32_t>(row);
  s.rank_limits = carver.take<int64_t>(row);
  s.rank_factors = carver.take<Acc>(row);
  s.lane_dots = carver.take<double>(merge.statistics ? tasks * (tasks + 1) / 2 * lanes : 0);
  *bytes = carver.at - static_cast<char*>(memory);
  return s;
}

int64_t scratch_bytes(bool wide, const MergeView& merge) {
  int64_t bytes = 0;
  if (wide) {
    carve<double>(merge, nullptr, &bytes);
  } else {
    carve<float>(merge, nullptr, &bytes);
  }
  return bytes;
}

template <class Acc>
inline Bits<Acc> magnitude_bits(Acc value) {
  Bits<Acc> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & static_cast<Bits<Acc>>(sizeof(Acc) == 8 ? INT64_MAX : INT32_MAX);
}

template <class Acc>
inline void load_delta(const MergeView& merge, const MergeTask& task, const Acc* __restrict__ base, int64_t begin, int64_t n,
                       Acc* __restrict__ delta) {
  load_block(task.dtype, task.tuned, begin, n, delta);
  if (merge.base != nullptr) {
    for (int64_t i = 0; i < n; ++i) delta[i] -= base[i];
  }
}

// Magnitude bits of one row of one task's delta.
template <class Acc>
inline void row_magnitudes(const MergeView& merge, const MergeTask& task, int64_t begin, const Scratch<Acc>& s) {
  Bits<Acc>* bits = static_cast<Bits<Acc>*>(s.row_bits);
  for (int64_t done = 0; done < merge.row_length; done += block) {
    const int64_t n = merge.row_length - done < block ? merge.row_length - done : block;
    if (merge.base != nullptr) load_block(merge.base_dtype, merge.base, begin + done, n, s.base);
    load_delta(merge, task, s.base, begin + done, n, s.sum);
    for (int64_t i = 0; i < n; ++i) bits[done + i] = magnitude_bits(s.sum[i]);
  }
}

template <class Acc>
inline void keep_row_band(const MergeView& merge, const MergeTask& task, const ThresholdLoops& loops, const Scratch<Acc>& s,
                          Acc* multiplier) {
  constexpr bool wide = sizeof(Acc) == 8;
  const Bits<Acc>* bits = static_cast<const Bits<Acc>*>(s.row_bits);
  const int64_t n = merge.row_length;
  const Cut outer = loops.row_cut(wide, bits, n, task.rank_end, s.row_scratch);
  const Cut inner = loops.row_cut(wide, bits, n, task.rank_begin, s.row_scratch);
  for (int64_t i = 0; i < n; ++i) {
    const bool inside = bits[i] > outer.bits || (bits[i] == outer.bits && i < outer.tie_end);
    const bool removed = bits[i] > inner.bits || (bits[i] == inner.bits && i < inner.tie_end);
    multiplier[i] = inside && !removed ? Acc{1} : Acc{0};
  }
}

// DELLA: the keep probability grows linearly with the ascending rank in the row, in float32. Sets, per rank, the bound of the random
// words that keep an entry and what survivors are multiplied by.
template <class Acc>
inline void fill_rank_table(const MergeView& merge, const MergeTask& task, const Scratch<Acc>& s) {
  const int64_t n = merge.row_length;
  const float lowest = static_cast<float>(task.density - task.epsilon);
  const float spread = static_cast<float>(2 * task.epsilon);
  const float last = static_cast<float>(n - 1);
  for (int64_t rank = 0; rank < n; ++rank) {
    float probability = static_cast<float>(task.density);
    if (n > 1 && task.epsilon != 0) {
      const float share = static_cast<float>(rank) / last;
      const float raised = share * spread;
      probability = lowest + raised;
    }
    const int64_t limit = keep_limit(static_cast<double>(probability));
    s.rank_limits[rank] = limit;
    // What is never kept has a factor all the same, which is multiplied by zero: it must be finite.
    s.rank_factors[rank] = merge.rescale == Rescale::density && limit > 0 ? Acc{1} / static_cast<Acc>(probability) : Acc{1};
  }
}

template <class Acc>
inline void keep_row_by_rank(const MergeView& merge, const MergeTask& task, const ThresholdLoops& loops, int64_t begin,
                             const Scratch<Acc>& s, Acc* __restrict__ multiplier) {
  const int64_t n = merge.row_length;
  philox_words(merge.seed, task.key, begin, n, s.words);
  loops.row_ranks(sizeof(Acc) == 8, s.row_bits, n, s.ranks, s.row_scratch);
  for (int64_t i = 0; i < n; ++i) {
    // Loaded whether kept or not: which it is cannot be guessed, and a branch would be.
    const Acc factor = s.rank_factors[s.ranks[i]];
    const Acc kept = static_cast<Acc>(static_cast<int64_t>(s.words[i]) < s.rank_limits[s.ranks[i]]);
    multiplier[i] = kept * factor;
  }
}

template <class Acc>
inline void fill_multipliers(const MergeView& merge, int64_t begin, int64_t n, int64_t stride, const ThresholdLoops& loops,
                             const Scratch<Acc>& s) {
  for (int t = 0; t < merge.count; ++t) {
    if (merge.tasks[t].recorded != nullptr) continue;
    if (merge.select == Select::rank_dropout) fill_rank_table(merge, merge.tasks[t], s);
    for (int64_t row = 0; row < n; row += merge.row_length) {
      Acc* multiplier = s.multiplier + t * stride + row;
      row_magnitudes(merge, merge.tasks[t], begin + row, s);
      if (merge.select == Select::row_magnitude) {
        keep_row_band(merge, merge.tasks[t], loops, s, multiplier);
      } else {
        keep_row_by_rank(merge, merge.tasks[t], loops, begin + row, s, multiplier);
      }
    }
  }
}

// keep[] (-1 or 0) from packed bits; a block starts at a multiple of 8 entries of its tensor.
template <class B>
inline void unpack_keep(const uint8_t* __restrict__ packed, int64_t n, B* __restrict__ keep) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    uint32_t bits;
    std::memcpy(&bits, packed + i / 8, sizeof bits);
    for (int bit = 0; bit < 32; ++bit) keep[i + bit] = -static_cast<B>((bits >> bit) & 1u);
  }
  for (; i < n; ++i) keep[i] = -static_cast<B>((packed[i / 8] >> (i & 7)) & 1);
}

template <class B>
inline void pack_keep(const B* __restrict__ keep, int64_t n, uint8_t* __restrict__ packed) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    uint32_t bits = 0;
    for (int bit = 0; bit < 32; ++bit) bits |= static_cast<uint32_t>(keep[i + bit] & 1) << bit;
    std::memcpy(packed + i / 8, &bits, sizeof bits);
  }
  for (int64_t byte = i / 8; byte < (n + 7) / 8; ++byte) {
    uint8_t bits = 0;
    for (int64_t k = 8 * byte; k < n && k < 8 * byte + 8; ++k) bits = static_cast<uint8_t>(bits | ((keep[k] & 1) << (k & 7)));
    packed[byte] = bits;
  }
}

// Sets keep[] (-1 or 0) for one task's block; false where everything is kept and keep[] is not set.
template <class Acc>
inline bool select_block(const MergeView& merge, const MergeTask& task, const Acc* __restrict__ delta, int64_t at, int64_t n,
                         const Acc* multiplier, uint32_t* words, Bits<Acc>* __restrict__ keep) {
  using B = Bits<Acc>;
  if (task.recorded != nullptr) {
    unpack_keep(task.recorded + at / 8, n, keep);
    return true;
  }
  switch (merge.select) {
    case Select::all:
      return false;
    case Select::magnitude: {
      auto clamp = [&](int64_t end) { return static_cast<B>(end <= at ? 0 : end - at < n ? end - at : n); };
      const B outer_ties = clamp(task.outer.tie_end), inner_ties = clamp(task.inner.tie_end);
      const B outer = static_cast<B>(task.outer.bits), inner = static_cast<B>(task.inner.bits);
      for (int64_t i = 0; i < n; ++i) {
        const B bits = magnitude_bits(delta[i]);
        const B index = static_cast<B>(i);
        const B inside = bits > (index < outer_ties ? outer - 1 : outer) ? B{-1} : B{0};
        const B removed = bits > (index < inner_ties ? inner - 1 : inner) ? B{-1} : B{0};
        keep[i] = inside & ~removed;
      }
      return true;
    }
    case Select::mask: {
      unpack_keep(task.mask + at / 8, n, keep);
      return true;
    }
    case Select::dropout: {
      const int64_t limit = keep_limit(task.density);
      if (limit >= int64_t{1} << 32) return false;
      philox_words(merge.seed, task.key, at, n, words);
      const uint32_t bound = static_cast<uint32_t>(limit);
      for (int64_t i = 0; i < n; ++i) keep[i] = words[i] < bound ? B{-1} : B{0};
      return true;
    }
    default:
      for (int64_t i = 0; i < n; ++i) keep[i] = multiplier[i] != Acc{0} ? B{-1} : B{0};
      return true;
  }
}

template <class Acc>
inline double dot(const Acc* __restrict__ a, const Acc* __restrict__ b, int64_t n) {
  Acc sums[lanes] = {};
  for (int64_t i = 0; i < n; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Acc product = a[i + lane] * b[i + lane];
      sums[lane] += product;
    }
  }
  double total = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) total += static_cast<double>(sums[lane]);
  return total;
}

// The lanes of a block's inner product, each rounded to Acc, onto the chunk's.
template <class Acc>
inline void add_lane_dots(const Acc* __restrict__ a, const Acc* __restrict__ b, int64_t n, double* __restrict__ lane_sums) {
  Acc sums[lanes] = {};
  for (int64_t i = 0; i < n; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Acc product = a[i + lane] * b[i + lane];
      sums[lane] += product;
    }
  }
  for (int64_t lane = 0; lane < lanes; ++lane) lane_sums[lane] += static_cast<double>(sums[lane]);
}

template <class Acc>
inline double absolute_sum(const Acc* values, int64_t n) {
  Acc sums[lanes] = {};
  for (int64_t i = 0; i < n; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += values[i + lane] < 0 ? -values[i + lane] : values[i + lane];
  }
  double total = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) total += static_cast<double>(sums[lane]);
  return total;
}

// Loads one block of every task and leaves delta[t] and part[t] = weight * (factor * selected delta).
template <class Acc>
inline void prepare_block(const MergeView& merge, MergePass pass, int64_t at, int64_t n, int64_t in_group, int64_t stride,
                          const Scratch<Acc>& s, ChunkStatistics* statistics) {
  using B = Bits<Acc>;
  const int64_t padded = (n + lanes - 1) / lanes * lanes;
  if (merge.base != nullptr) load_block(merge.base_dtype, merge.base, at, n, s.base);
  for (int t = 0; t < merge.count; ++t) {
    const MergeTask& task = merge.tasks[t];
    Acc* __restrict__ delta = s.delta + t * block;
    Acc* __restrict__ part = s.part + t * block;
    load_delta(merge, task, s.base, at, n, delta);
    for (int64_t i = n; i < padded; ++i) delta[i] = part[i] = Acc{0};
    constexpr B infinity = sizeof(Acc) == 8 ? static_cast<B>(0x7ff0000000000000ll) : static_cast<B>(0x7f800000);
    B bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= magnitude_bits(delta[i]) >= infinity ? 1 : 0;
    statistics->nonfinite |= static_cast<int32_t>(bad);
    const Acc* multiplier = s.multiplier + t * stride + in_group;
    const bool selective = select_block(merge, task, delta, at, n, multiplier, s.words, s.keep);
    const Acc weight = static_cast<Acc>(task.weight), factor = static_cast<Acc>(task.factor);
    int64_t kept = n;
    if (selective) {
      B count = 0;
      for (int64_t i = 0; i < n; ++i) {
        B bits;
        std::memcpy(&bits, &delta[i], sizeof bits);
        bits &= s.keep[i];
        std::memcpy(&part[i], &bits, sizeof bits);
        count -= s.keep[i];
      }
      kept = count;
    } else {
      for (int64_t i = 0; i < n; ++i) part[i] = delta[i];
    }
    statistics->kept[t] += kept;
    if (merge.vote == Vote::selected) {
      for (int64_t i = 0; i < n; ++i) s.selected[t * block + i] = selective ? -static_cast<int32_t>(s.keep[i]) : 1;
    }
    if (pass == MergePass::norms) {
      if (task.record != nullptr) {
        if (selective) {
          pack_keep(s.keep, n, task.record + at / 8);
        } else {
          // A probability just below one keeps everything too, without a draw.
          std::memset(task.record + at / 8, 0xff, static_cast<size_t>((n + 7) / 8));
        }
      }
      statistics->before[t] += absolute_sum(delta, padded);
      statistics->after[t] += absolute_sum(part, padded);
      continue;
    }
    if (merge.select == Select::rank_dropout && merge.rescale == Rescale::density) {
      for (int64_t i = 0; i < n; ++i) part[i] = weight * (multiplier[i] * part[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) part[i] = weight * (factor * part[i]);
    }
  }
}

// elected[] = +1 or -1.
template <class Acc>
inline void elect_block(const MergeView& merge, int64_t n, const Scratch<Acc>& s) {
  Acc* __restrict__ sum = s.sum;
  for (int64_t i = 0; i < n; ++i) sum[i] = Acc{0};
  for (int t = 0; t < merge.count; ++t) {
    const Acc* __restrict__ part = s.part + t * block;
    if (merge.elect == Elect::sign_sum) {
      for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
    } else {
      for (int64_t i = 0; i < n; ++i) sum[i] += (part[i] > 0 ? Acc{1} : Acc{0}) - (part[i] < 0 ? Acc{1} : Acc{0});
    }
  }
  const Acc zero = static_cast<Acc>(merge.zero_sign);
  for (int64_t i = 0; i < n; ++i) s.elected[i] = sum[i] > 0 ? Acc{1} : sum[i] < 0 ? Acc{-1} : zero;
}

template <class Acc>
inline void combine_block(const MergeView& merge, int64_t n, const Scratch<Acc>& s) {
  Acc* __restrict__ combined = s.combined;
  Acc* __restrict__ weight_sum = s.weight_sum;
  for (int64_t i = 0; i < n; ++i) combined[i] = weight_sum[i] = Acc{0};
  Acc all_weights = 0;
  for (int t = 0; t < merge.count; ++t) {
    const Acc* __restrict__ part = s.part + t * block;
    const Acc weight = static_cast<Acc>(merge.tasks[t].weight);
    all_weights += weight;
    if (merge.elect == Elect::none) {
      for (int64_t i = 0; i < n; ++i) combined[i] += part[i];
      if (merge.combine == Combine::disjoint_mean) {
        for (int64_t i = 0; i < n; ++i) weight_sum[i] += part[i] != 0 ? weight : Acc{0};
      }
    } else {
      const Acc* __restrict__ elected = s.elected;
      for (int64_t i = 0; i < n; ++i) {
        const bool agrees = part[i] * elected[i] > 0;
        combined[i] += agrees ? part[i] : Acc{0};
        weight_sum[i] += agrees ? weight : Acc{0};
      }
    }
  }
  if (merge.combine == Combine::disjoint_mean) {
    for (int64_t i = 0; i < n; ++i) combined[i] /= weight_sum[i] == 0 ? Acc{1} : weight_sum[i];
  } else if (merge.combine == Combine::weighted_mean) {
    const Acc size = all_weights < 0 ? -all_weights : all_weights;
    const Acc divisor = size < static_cast<Acc>(1e-8) ? Acc{1} : all_weights;
    for (int64_t i = 0; i < n; ++i) combined[i] /= divisor;
  }
}

template <class Acc>
inline void count_votes(const MergeView& merge, int64_t n, const Scratch<Acc>& s) {
  for (int64_t i = 0; i < n; ++i) s.votes[i] = 0;
  for (int t = 0; t < merge.count; ++t) {
    if (merge.vote == Vote::selected) {
      for (int64_t i = 0; i < n; ++i) s.votes[i] += s.selected[t * block + i];
      continue;
    }
    const Acc weight = static_cast<Acc>(merge.tasks[t].weight), lambda = static_cast<Acc>(merge.tasks[t].tall_mask_lambda);
    const Acc* __restrict__ delta = s.delta + t * block;
    for (int64_t i = 0; i < n; ++i) {
      const Acc own = weight * delta[i];
      const Acc rest = s.combined[i] - own;
      const Acc bound = lambda * (rest < 0 ? -rest : rest);
      s.votes[i] += (own < 0 ? -own : own) > bound ? 1 : 0;
    }
  }
}

template <class Acc>
inline void count_statistics(const MergeView& merge, int64_t at, int64_t n, const Scratch<Acc>& s, ChunkStatistics* statistics) {
  const int64_t padded = (n + lanes - 1) / lanes * lanes;
  const bool all_pairs = merge.dot_stride <= 1 || (at / block) % merge.dot_stride == 0;
  double* lane_dots = s.lane_dots;
  for (int t = 0; t < merge.count; ++t) {
    for (int other = t; other < merge.count; ++other, lane_dots += lanes) {
      if (other == t || all_pairs) add_lane_dots(s.delta + t * block, s.delta + other * block, padded, lane_dots);
    }
  }
  int32_t* signs = s.votes;
  for (int64_t i = 0; i < n; ++i) signs[i] = 0;
  for (int t = 0; t < merge.count; ++t) {
    const Acc* part = s.part + t * block;
    for (int64_t i = 0; i < n; ++i) signs[i] |= (part[i] > 0 ? 1 : 0) | (part[i] < 0 ? 2 : 0);
  }
  int32_t conflicts = 0;
  for (int64_t i = 0; i < n; ++i) conflicts += signs[i] == 3 ? 1 : 0;
  statistics->conflicts += conflicts;
}

template <class Acc>
inline void finish_block(const MergeView& merge, int64_t n, int64_t done, const Scratch<Acc>& s, void* out) {
  if (merge.elect != Elect::none) elect_block(merge, n, s);
  combine_block(merge, n, s);
  if (merge.vote != Vote::none) count_votes(merge, n, s);
  const Acc scale = static_cast<Acc>(merge.scale);
  for (int64_t i = 0; i < n; ++i) s.combined[i] = scale * s.combined[i];
  if (merge.vote != Vote::none) {
    for (int64_t i = 0; i < n; ++i) s.combined[i] = s.votes[i] >= merge.consensus_k ? s.combined[i] : Acc{0};
  }
  if (merge.base != nullptr) {
    for (int64_t i = 0; i < n; ++i) s.combined[i] = s.base[i] + s.combined[i];
  }
  store_block(merge.out_dtype, s.combined, n, out, done);
}

// The chunk's inner products from their lanes; those that only some blocks counted are scaled up.
template <class Acc>
inline void finish_dots(const MergeView& merge, const Scratch<Acc>& s, double* dots) {
  const double* lane_dots = s.lane_dots;
  for (int t = 0; t < merge.count; ++t) {
    for (int other = t; other < merge.count; ++other, lane_dots += lanes, ++dots) {
      double sum = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) sum += lane_dots[lane];
      *dots += other == t ? sum : merge.dot_stride * sum;
    }
  }
}

template <class Acc>
void chunk_of(MergePass pass, const MergeView& merge, int64_t begin, int64_t n, void* memory, void* out, ChunkStatistics* statistics) {
  int64_t bytes = 0;
  const Scratch<Acc> s = carve<Acc>(merge, memory, &bytes);
  const bool rows = merge.select == Select::row_magnitude || merge.select == Select::rank_dropout;
  const int64_t group = rows ? group_length(merge, n) : n;
  const ThresholdLoops& loops = *TASKLOOM_PASTE(taskloom_threshold_loops_, TASKLOOM_LEVEL)();
  const bool counting = pass == MergePass::merge && merge.statistics;
  if (counting) std::memset(s.lane_dots, 0, static_cast<size_t>(merge.count * (merge.count + 1) / 2 * lanes) * sizeof(double));
  const bool fused = sizeof(Acc) == 4 && fused_serves(merge);
  for (int64_t first = 0; first < n; first += group) {
    const int64_t length = n - first < group ? n - first : group;
    if (rows) fill_multipliers(merge, begin + first, length, group, loops, s);
    for (int64_t done = 0; done < length; done += block) {
      const int64_t size = length - done < block ? length - done : block;
      const int64_t at = begin + first + done;
      if (fused && pass == MergePass::merge && fused_block(merge, at, size, out, first + done, s.lane_dots, statistics)) continue;
      if (fused && pass == MergePass::norms && merge.select == Select::dropout) {
        fused_dropout_norms(merge, at, size, s.words, statistics);
        continue;
      }
      prepare_block(merge, pass, at, size, done, rows ? group : 0, s, statistics);
      if (pass == MergePass::norms) continue;
      if (pass == MergePass::signs) {
        elect_block(merge, size, s);
        int64_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += (s.sum[i] > 0 ? 1 : 0) - (s.sum[i] < 0 ? 1 : 0);
        statistics->sign_sum += sum;
        continue;
      }
      if (merge.statistics) count_statistics(merge, at, size, s, statistics);
      finish_block(merge, size, first + done, s, out);
    }
  }
  if (counting) finish_dots(merge, s, statistics->dots);
}

void chunk(bool wide, MergePass pass, const MergeView& merge, int64_t begin, int64_t n, void* scratch, void* out,
           ChunkStatistics* statistics) {
  if (wide) {
    chunk_of<double>(pass, merge, begin, n, scratch, out, statistics);
  } else {
    chunk_of<float>(pass, merge, begin, n, scratch, out, statistics);
  }
}

void inner_products(const MergeTask& a, const MergeTask& b, int64_t begin, int64_t n, double* sums) {
  alignas(64) double x[block];
  alignas(64) double y[block];
  for (int64_t done = 0; done < n; done += block) {
    const int64_t size = n - done < block ? n - done : block;
    const int64_t padded = (size + lanes - 1) / lanes * lanes;
    load_block(a.dtype, a.tuned, begin + done, size, x);
    load_block(b.dtype, b.tuned, begin + done, size, y);
    for (int64_t i = size; i < padded; ++i) x[i] = y[i] = 0;
    sums[0] += dot(x, x, padded);
    sums[1] += dot(x, y, padded);
    sums[2] += dot(y, y, padded);
  }
}

void convert(DType from_dtype, const void* from, int64_t begin, int64_t n, DType to_dtype, void* to) {
  alignas(64) double values[block];
  for (int64_t done = 0; done < n; done += block) {
    const int64_t size = n - done < block ? n - done : block;
    load_block(from_dtype, from, begin + done, size, values);
    store_block(to_dtype, values, size, to, done);
  }
}

// Bits are or-ed without a branch, so that this keeps up with what was written a moment ago.
template <class Word>
bool any_exponent_full(const void* values, int64_t n, Word exponent) {
  Word found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Word word = load_at<Word>(values, i);
    found |= static_cast<Word>((word & exponent) == exponent ? 1 : 0);
  }
  return found != 0;
}

bool any_nonfinite(DType dtype, const void* values, int64_t n) {
  switch (dtype) {
    case DType::f32:
      return any_exponent_full<uint32_t>(values, n, 0x7F800000u);
    case DType::f16:
      return any_exponent_full<uint16_t>(values, n, 0x7C00u);
    case DType::bf16:
      return any_exponent_full<uint16_t>(values, n, 0x7F80u);
    default:
      return any_exponent_full<uint64_t>(values, n, 0x7FF0000000000000ull);
  }
}

const SparseMergeLoops table = {scratch_bytes, chunk, inner_products, convert, any_nonfinite};

}  // namespace

TASKLOOM_EXPORT_LOOPS(SparseMergeLoops, sparse_merge_loops, table)

}  // namespace taskloom
