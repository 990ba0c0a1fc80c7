// CPU loops of lowrank_merge, compiled once per CPU level. Every entry of a product is summed in the order of the ranks by fused
// multiply-adds at every level (nothing is decided here, and they are twice as fast), so that tiles, threads and levels do not change a
// bit.
#include <cmath>

#include "common/convert.h"
#include "lowrank/lowrank_merge.h"

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace taskloom {
namespace {

constexpr int64_t panel = lowrank_panel;
// Rows that share a panel while it is in the first cache.
constexpr int64_t row_block = 24;

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64, tile_rows = 6, tile_vectors = 4;
#elif defined(__FMA__)
constexpr int64_t vector_bytes = 32, tile_rows = 4, tile_vectors = 2;
#else
constexpr int64_t vector_bytes = 16, tile_rows = 4, tile_vectors = 2;
#endif

template <class Acc>
struct Lanes {
  using Vector __attribute__((vector_size(vector_bytes))) = Acc;
  static constexpr int64_t count = vector_bytes / static_cast<int64_t>(sizeof(Acc));
};

template <class Acc>
inline typename Lanes<Acc>::Vector load_vector(const Acc* from) {
  typename Lanes<Acc>::Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Acc>
inline void store_vector(Acc* to, typename Lanes<Acc>::Vector value) {
  std::memcpy(to, &value, sizeof value);
}

// a * b + c, rounded once.
template <class Acc>
inline typename Lanes<Acc>::Vector fused(typename Lanes<Acc>::Vector a, typename Lanes<Acc>::Vector b, typename Lanes<Acc>::Vector c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    return _mm512_fmadd_ps(a, b, c);
  } else {
    return _mm512_fmadd_pd(a, b, c);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(Acc) == 4) {
    return _mm256_fmadd_ps(a, b, c);
  } else {
    return _mm256_fmadd_pd(a, b, c);
  }
#else
  for (int64_t lane = 0; lane < Lanes<Acc>::count; ++lane) {
    if constexpr (sizeof(Acc) == 4) {
      c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    } else {
      c[lane] = __builtin_fma(a[lane], b[lane], c[lane]);
    }
  }
  return c;
#endif
}

// product[r, c] = sum over k of left[r, k] * right[k, c] for `rows` rows and the panel's columns.
template <class Acc, int64_t rows>
inline void multiply_rows(const Acc* left, const Acc* right, int64_t rank, Acc* product) {
  using Vector = typename Lanes<Acc>::Vector;
  constexpr int64_t lanes = Lanes<Acc>::count, width = lanes * tile_vectors;
  static_assert(panel % width == 0);
  for (int64_t column = 0; column < panel; column += width) {
    Vector sums[rows][tile_vectors] = {};
    for (int64_t k = 0; k < rank; ++k) {
      // One vector at a time: an array whose address is taken would go through memory.
      Vector values[tile_vectors];
      for (int64_t v = 0; v < tile_vectors; ++v) values[v] = load_vector<Acc>(right + k * panel + column + v * lanes);
      for (int64_t r = 0; r < rows; ++r) {
        const Vector factor = left[r * rank + k] - Vector{};
        for (int64_t v = 0; v < tile_vectors; ++v) sums[r][v] = fused<Acc>(values[v], factor, sums[r][v]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < tile_vectors; ++v) store_vector<Acc>(product + r * panel + column + v * lanes, sums[r][v]);
    }
  }
}

// The same for any number of rows up to row_block.
template <class Acc>
inline void multiply(const Acc* left, const Acc* right, int64_t rank, int64_t rows, Acc* product) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows) multiply_rows<Acc, tile_rows>(left + r * rank, right, rank, product + r * panel);
  for (; r < rows; ++r) multiply_rows<Acc, 1>(left + r * rank, right, rank, product + r * panel);
}

template <class Acc>
void pack_left_of(const Elements& from, int64_t rank, double weight, int64_t at, const LowrankFactors& to, int64_t begin, int64_t n) {
  const auto factor = static_cast<Acc>(weight);
  for (int64_t row = begin; row < begin + n; ++row) {
    Acc* out = static_cast<Acc*>(to.left) + row * to.rank + at;
    load_block(from.dtype, from.data, row * rank, rank, out);
    for (int64_t k = 0; k < rank; ++k) out[k] = factor * out[k];
  }
}

template <class Acc>
void pack_right_of(const Elements& from, int64_t rank, int64_t columns, int64_t at, const LowrankFactors& to) {
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t column = 0; column < columns; column += panel) {
      const int64_t n = columns - column < panel ? columns - column : panel;
      Acc* out = static_cast<Acc*>(to.right) + (column * to.rank) + (at + k) * panel;
      load_block(from.dtype, from.data, k * columns + column, n, out);
      for (int64_t i = n; i < panel; ++i) out[i] = 0;
    }
  }
}

template <class Acc>
void merge_of(const LowrankMerge& all, int64_t begin, int64_t n) {
  alignas(64) Acc product[row_block * panel], base[row_block * panel];
  const Acc* scale = static_cast<const Acc*>(all.row_scale);
  for (int64_t row = begin; row < begin + n; row += row_block) {
    const int64_t rows = begin + n - row < row_block ? begin + n - row : row_block;
    for (int64_t column = 0; column < all.columns; column += panel) {
      const int64_t size = all.columns - column < panel ? all.columns - column : panel;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * all.base.stride + column;
        prefetch_block(all.base.dtype, all.base.data, at + size, all.columns - column - size < panel ? all.columns - column - size : panel);
        load_block(all.base.dtype, all.base.data, at, size, base + r * panel);
      }
      for (int64_t t = 0; t < all.tasks; ++t) {
        const LowrankFactors& factors = all.factors[t];
        const Acc* left = static_cast<const Acc*>(factors.left) + row * factors.rank;
        const Acc* right = static_cast<const Acc*>(factors.right) + column * factors.rank;
        multiply(left, right, factors.rank, rows, product);
        for (int64_t r = 0; r < rows; ++r) {
          Acc* values = product + r * panel;
          for (int64_t i = 0; i < size; ++i) values[i] = base[r * panel + i] + values[i];
          if (scale != nullptr) {
            for (int64_t i = 0; i < size; ++i) values[i] = scale[row + r] * values[i];
          }
          store_block(all.out_dtype, values, size, all.out, t * all.out_task_stride + (row + r) * all.out_stride + column);
        }
      }
    }
  }
}

template <class Acc>
void norms_of(const LowrankMerge& all, int64_t begin, int64_t n, void* norms) {
  constexpr int64_t lanes = 8;
  alignas(64) Acc product[row_block * panel], base[panel];
  const LowrankFactors& factors = all.factors[0];
  for (int64_t row = begin; row < begin + n; row += row_block) {
    const int64_t rows = begin + n - row < row_block ? begin + n - row : row_block;
    alignas(64) double sums[row_block][lanes] = {};
    for (int64_t column = 0; column < all.columns; column += panel) {
      const int64_t size = all.columns - column < panel ? all.columns - column : panel;
      multiply(static_cast<const Acc*>(factors.left) + row * factors.rank, static_cast<const Acc*>(factors.right) + column * factors.rank,
               factors.rank, rows, product);
      for (int64_t r = 0; r < rows; ++r) {
        load_block(all.base.dtype, all.base.data, (row + r) * all.base.stride + column, size, base);
        for (int64_t i = 0; i < size; ++i) base[i] = base[i] + product[r * panel + i];
        for (int64_t i = size; i < panel; ++i) base[i] = 0;
        for (int64_t i = 0; i < panel; i += lanes) {
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const auto value = static_cast<double>(base[i + lane]);
            const double square = value * value;
            sums[r][lane] += square;
          }
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      double total = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) total += sums[r][lane];
      static_cast<Acc*>(norms)[row + r] = static_cast<Acc>(std::sqrt(total));
    }
  }
}

void pack_left(bool wide, const Elements& from, int64_t rank, double weight, int64_t at, const LowrankFactors& to, int64_t begin,
               int64_t n) {
  wide ? pack_left_of<double>(from, rank, weight, at, to, begin, n) : pack_left_of<float>(from, rank, weight, at, to, begin, n);
}

void pack_right(bool wide, const Elements& from, int64_t rank, int64_t columns, int64_t at, const LowrankFactors& to) {
  wide ? pack_right_of<double>(from, rank, columns, at, to) : pack_right_of<float>(from, rank, columns, at, to);
}

void merge(bool wide, const LowrankMerge& all, int64_t begin, int64_t n) {
  wide ? merge_of<double>(all, begin, n) : merge_of<float>(all, begin, n);
}

void norms(bool wide, const LowrankMerge& all, int64_t begin, int64_t n, void* out) {
  wide ? norms_of<double>(all, begin, n, out) : norms_of<float>(all, begin, n, out);
}

const LowrankMergeLoops table = {pack_left, pack_right, merge, norms};

}  // namespace

TASKLOOM_EXPORT_LOOPS(LowrankMergeLoops, lowrank_merge_loops, table)

}  // namespace taskloom
