// CPU loops of window_conv2d, compiled once per CPU level. Weights of a few outputs are packed tap by tap, so that the channels of any
// window follow each other; pixels of the output are taken a tile at a time, whose input is copied with its padding.
#include "common/convert.h"
#include "routed/window_conv2d.h"

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace taskloom {
namespace {

// Outputs of a packed panel of weights.
constexpr int64_t panel = 32;
constexpr int64_t panels = window_conv2d_outputs / panel;
// Products in one chain: the sum of a longer one is less accurate.
constexpr int64_t chain = 512;
// Entries that are copied at a time; scratch has as many behind what is used.
constexpr int64_t step = 16;
// Entries of a tile, where one channel has no more: chains are shorter where pixels lie far apart.
constexpr int64_t most_entries = 1 << 16;
// Narrower images are taken several rows at a time.
constexpr int64_t narrow = 8;

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64, most_pixels = 14, tile_pixels = 14;
#elif defined(__FMA__)
constexpr int64_t vector_bytes = 32, most_pixels = 6, tile_pixels = 12;
#else
constexpr int64_t vector_bytes = 16, most_pixels = 4, tile_pixels = 12;
#endif
constexpr int64_t lanes = vector_bytes / 4, tile_vectors = 2;
static_assert(tile_pixels <= step && panel % (lanes * tile_vectors) == 0);

typedef float Vector __attribute__((vector_size(vector_bytes)));
typedef float Four __attribute__((vector_size(16)));

template <class V>
inline V load_vector(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
inline void store_vector(float* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// a * b + c, rounded once.
inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int64_t lane = 0; lane < lanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#endif
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How pixels of the output are taken, and where their input is in a tile: [channel][row][column].
struct Plan {
  bool by_row;                    // a tile has pixels of one row only
  int64_t taps, block;            // of a channel; channels of a chain
  int64_t runs, run, tiles;       // runs of pixels, pixels of a run, tiles of a run
  int64_t rows, columns;          // of the tile, at most
  int64_t channel;                // entries of the tile per channel
  int64_t row_step;               // rows of the input from one row of the tile to the next
  int64_t first, channels;        // that any window of the part has
  int64_t panel_size, tile_size;  // entries of scratch
};

int64_t extent_of(int64_t pixels, int64_t stride, int64_t kernel, int64_t dilation) {
  return (pixels - 1) * stride + (kernel - 1) * dilation + 1;
}

int64_t columns_of(const WindowConv2d& conv, int64_t pixels) {
  const int64_t across = conv.out.across < narrow ? conv.out.across : smaller(conv.out.across, pixels);
  return extent_of(across, conv.stride.across, conv.kernel.across, conv.dilation.across);
}

int64_t rows_of(const WindowConv2d& conv, int64_t pixels) {
  if (conv.out.across >= narrow) return conv.kernel.down;
  const int64_t down = smaller((pixels + conv.out.across - 2) / conv.out.across + 1, conv.out.down);
  return extent_of(down, conv.stride.down, conv.kernel.down, conv.dilation.down);
}

Plan plan_of(const WindowConv2d& conv, const WindowConv2dPart& part) {
  Plan plan{};
  plan.by_row = conv.out.across >= narrow;
  plan.taps = conv.kernel.down * conv.kernel.across;
  // Of as many pixels at every level, so that chains are the same.
  plan.block = larger(smaller(chain / plan.taps, most_entries / (rows_of(conv, step) * columns_of(conv, step))), 1);
  plan.runs = plan.by_row ? conv.out.down : 1;
  plan.run = plan.by_row ? conv.out.across : conv.out.down * conv.out.across;
  plan.tiles = (plan.run + tile_pixels - 1) / tile_pixels;
  plan.columns = columns_of(conv, (plan.run + plan.tiles - 1) / plan.tiles);
  plan.rows = rows_of(conv, tile_pixels);
  plan.row_step = plan.by_row ? conv.dilation.down : 1;
  plan.channel = plan.rows * plan.columns;
  int64_t end = 0, most = 0;
  plan.first = conv.weight_channels;
  for (int64_t n = part.first_sample; n < part.first_sample + part.samples; ++n) {
    const ChannelWindow& window = conv.windows[n];
    if (window.channels == 0) continue;
    plan.first = smaller(plan.first, window.first);
    end = larger(end, window.first + window.channels);
    most = larger(most, window.channels);
  }
  plan.channels = larger(end - plan.first, 0);
  plan.panel_size = rounded_up(plan.channels * plan.taps, step) * panel;
  plan.tile_size = rounded_up(smaller(plan.block, most) * plan.channel + step, step);
  return plan;
}

// Entries of scratch before those of panels and tile: sums of a tile's pixels, and steps of weights on their way to a panel.
constexpr int64_t sums_size = step * panel, rows_size = panel * step;

int64_t scratch_of(const WindowConv2d& conv, const WindowConv2dPart& part) {
  const Plan plan = plan_of(conv, part);
  const int64_t used = (part.outputs + panel - 1) / panel;
  const int64_t offsets = 8 * (plan.taps + step) + 4 * rounded_up(plan.columns, step);
  return 4 * (panels * sums_size + rows_size + used * plan.panel_size + plan.tile_size) + offsets;
}

// to[column, row] = from[row, column], four by four.
inline void transpose_four(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const Four a = load_vector<Four>(from), b = load_vector<Four>(from + from_stride);
  const Four c = load_vector<Four>(from + 2 * from_stride), d = load_vector<Four>(from + 3 * from_stride);
  const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store_vector(to, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
  store_vector(to + to_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
  store_vector(to + 2 * to_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  store_vector(to + 3 * to_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

// to[k, o] = weights of `outputs` outputs from `first` on, taps k of the channels that windows have; 0 after the last output.
template <DType dtype>
void pack_weights(const WindowConv2d& conv, const Plan& plan, int64_t first, int64_t outputs, float* rows, float* to) {
  const int64_t stride = conv.weight_channels * plan.taps, entries = plan.channels * plan.taps;
  const int64_t from = first * stride + plan.first * plan.taps;
  for (int64_t i = 0; i < rows_size; ++i) rows[i] = 0;
  for (int64_t k = 0; k < entries; k += step) {
    if (k + step <= entries) {
      for (int64_t o = 0; o < outputs; ++o) load_block(dtype, conv.weight, from + o * stride + k, step, rows + o * step);
    } else {
      for (int64_t o = 0; o < outputs; ++o) load_block(dtype, conv.weight, from + o * stride + k, entries - k, rows + o * step);
    }
    for (int64_t o = 0; o < panel; o += 4) {
      for (int64_t i = 0; i < step; i += 4) transpose_four(rows + o * step + i, step, to + (k + i) * panel + o, panel);
    }
  }
}

// The same of a weight that is turned.
template <DType dtype>
void pack_turned(const WindowConv2d& conv, const Plan& plan, int64_t first, int64_t outputs, float* rows, float* to) {
  constexpr int64_t some = rows_size / panel;
  for (int64_t i = 0; i < rows_size; ++i) rows[i] = 0;
  for (int64_t c = 0; c < plan.channels; ++c) {
    const int64_t from = ((plan.first + c) * conv.outputs + first) * plan.taps;
    for (int64_t tap = 0; tap < plan.taps; tap += some) {
      const int64_t n = smaller(plan.taps - tap, some);
      if (n == plan.taps) {
        load_block(dtype, conv.weight, from, outputs * n, rows);
      } else {
        for (int64_t o = 0; o < outputs; ++o) load_block(dtype, conv.weight, from + o * plan.taps + tap, n, rows + o * n);
        for (int64_t i = outputs * n; i < panel * n; ++i) rows[i] = 0;
      }
      float* out = to + ((c + 1) * plan.taps - 1 - tap) * panel;
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t o = 0; o < panel; ++o) out[o - t * panel] = rows[o * n + t];
      }
    }
  }
}

// sums[p, o] += the chain of products of weights[k, o] and the inputs of `pixels` pixels, for the panel's outputs. The pixels' inputs lie
// next to each other, or, where `apart`, `pixel[p]` entries from the first.
template <int64_t pixels, bool apart>
void add_products(const float* weights, const float* tile, int64_t channels, int64_t channel, const int64_t* tap, int64_t taps,
                  const int64_t* pixel, float* sums) {
  constexpr int64_t width = lanes * tile_vectors;
  for (int64_t column = 0; column < panel; column += width) {
    Vector chains[pixels][tile_vectors] = {};
    const float* factors = weights + column;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        const float* from = tile + c * channel + tap[t];
        Vector values[tile_vectors];
        for (int64_t v = 0; v < tile_vectors; ++v) values[v] = load_vector<Vector>(factors + v * lanes);
        factors += panel;
#pragma GCC unroll 16
        for (int64_t p = 0; p < pixels; ++p) {
          const Vector input = from[apart ? pixel[p] : p] - Vector{};
          for (int64_t v = 0; v < tile_vectors; ++v) chains[p][v] = fused(values[v], input, chains[p][v]);
        }
      }
    }
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t v = 0; v < tile_vectors; ++v) {
        float* sum = sums + p * panel + column + v * lanes;
        store_vector(sum, load_vector<Vector>(sum) + chains[p][v]);
      }
    }
  }
}

using AddProducts = void (*)(const float*, const float*, int64_t, int64_t, const int64_t*, int64_t, const int64_t*, float*);

template <int64_t pixels, bool apart>
inline AddProducts for_pixels(int64_t wanted) {
  if constexpr (pixels > 1) {
    if (wanted < pixels) return for_pixels<pixels - 1, apart>(wanted);
  }
  return add_products<pixels, apart>;
}

// Pixels of the output that a tile has, and the input that it starts at.
struct Tile {
  int64_t begin, pixels;
  int64_t top, left;
  int64_t rows, columns;
};

Tile tile_of(const WindowConv2d& conv, const Plan& plan, int64_t run, int64_t index) {
  const int64_t begin = plan.run * index / plan.tiles, end = plan.run * (index + 1) / plan.tiles;
  const int64_t row = plan.by_row ? run : begin / conv.out.across, column = plan.by_row ? begin : 0;
  Tile tile{run * plan.run + begin,
            end - begin,
            row * conv.stride.down - conv.padding.down,
            column * conv.stride.across - conv.padding.across,
            plan.rows,
            plan.columns};
  if (plan.by_row) {
    tile.columns = extent_of(tile.pixels, conv.stride.across, conv.kernel.across, conv.dilation.across);
  } else {
    tile.rows = extent_of((end - 1) / conv.out.across - row + 1, conv.stride.down, conv.kernel.down, conv.dilation.down);
  }
  return tile;
}

// Where the inputs of a tile's pixels are, from the first tap on.
void find_pixels(const WindowConv2d& conv, const Plan& plan, const Tile& tile, int64_t* pixel) {
  int64_t row = 0, column = plan.by_row ? 0 : tile.begin % conv.out.across;
  for (int64_t p = 0; p < tile.pixels; ++p) {
    pixel[p] = row * conv.stride.down * plan.columns + column * conv.stride.across;
    if (++column == conv.out.across && !plan.by_row) {
      column = 0;
      ++row;
    }
  }
}

// All bits of the entries of a tile's rows that are in the input, none of the padding's.
void find_inside(const WindowConv2d& conv, const Tile& tile, uint32_t* inside) {
  for (int64_t column = 0; column < rounded_up(tile.columns, step); ++column) {
    const int64_t at = tile.left + column;
    inside[column] = at >= 0 && at < conv.size.across && column < tile.columns ? ~uint32_t{0} : 0;
  }
}

// A row of the tile, whose first entry would be x[from]; its ends lie outside of x.
template <DType dtype>
void copy_row_at_end(const WindowConv2d& conv, int64_t from, int64_t columns, const uint32_t* inside, float* to) {
  for (int64_t column = 0; column < columns; ++column) {
    to[column] = 0;
    if (inside[column] != 0) load_block(dtype, conv.x, from + column, 1, to + column);
  }
}

// Copies the tile's input of `channels` channels from `first` on, with zeros for the padding. Whole steps are copied: what is too much is
// written over by what follows, or not used.
template <DType dtype>
void copy_tile(const WindowConv2d& conv, const Plan& plan, const Tile& tile, int64_t sample, int64_t first, int64_t channels,
               const uint32_t* inside, float* to) {
  const int64_t plane = conv.size.down * conv.size.across, columns = rounded_up(tile.columns, step);
  const int64_t last = conv.samples * conv.channels * plane - columns;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t origin = (sample * conv.channels + first + c) * plane + tile.left;
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* out = to + c * plan.channel + i * plan.columns;
      const int64_t row = tile.top + i * plan.row_step, from = origin + row * conv.size.across;
      if (row < 0 || row >= conv.size.down) {
        for (int64_t column = 0; column < tile.columns; ++column) out[column] = 0;
      } else if (from < 0 || from > last) {
        copy_row_at_end<dtype>(conv, from, tile.columns, inside, out);
      } else {
        for (int64_t column = 0; column < columns; column += step) {
          float values[step];
          uint32_t bits[step];
          load_block(dtype, conv.x, from + column, step, values);
          std::memcpy(bits, values, sizeof bits);
          for (int64_t lane = 0; lane < step; ++lane) bits[lane] &= inside[column + lane];
          std::memcpy(out + column, bits, sizeof bits);
        }
      }
    }
  }
}

// y of a tile's pixels and outputs begin .. end from sums[p, o], whose first output is `first`. Whole steps are written where there is
// room: what is too much is written over by the tiles that follow.
template <DType dtype>
void store_sums(const WindowConv2d& conv, const Tile& tile, int64_t sample, int64_t first, int64_t begin, int64_t end, const float* sums) {
  alignas(64) float values[panel * step];
  for (int64_t p = 0; p < step; p += 4) {
    for (int64_t o = 0; o < panel; o += 4) transpose_four(sums + p * panel + o, panel, values + o * step + p, step);
  }
  const int64_t plane = conv.out.down * conv.out.across;
  const int64_t at = sample * conv.outputs * plane + tile.begin;
  if (tile.begin + step <= plane) {
    for (int64_t o = begin; o < end; ++o) store_block(dtype, values + (o - first) * step, step, conv.y, at + o * plane);
  } else {
    for (int64_t o = begin; o < end; ++o) store_block(dtype, values + (o - first) * step, tile.pixels, conv.y, at + o * plane);
  }
}

void start_sums(const float* bias, float* sums) {
  for (int64_t p = 0; p < step; ++p) {
    for (int64_t o = 0; o < panel; ++o) sums[p * panel + o] = bias[o];
  }
}

// What one part works with.
struct Work {
  float *sums, *weights, *tile;
  int64_t *tap, *pixel;
  uint32_t* inside;
};

template <DType dtype>
void one_tile(const WindowConv2d& conv, const WindowConv2dPart& part, const Plan& plan, const Tile& tile, int64_t sample, const float* bias,
              const Work& work) {
  const ChannelWindow& window = conv.windows[sample];
  const int64_t begin = larger(part.first_output, window.first_output);
  const int64_t end = smaller(part.first_output + part.outputs, window.first_output + window.outputs);
  const int64_t first_panel = (begin - part.first_output) / panel, last_panel = (end - part.first_output + panel - 1) / panel;
  for (int64_t of = first_panel; of < last_panel; ++of) start_sums(bias + of * panel, work.sums + of * sums_size);
  const bool apart = !plan.by_row || conv.stride.across > 1;
  find_inside(conv, tile, work.inside);
  if (apart) find_pixels(conv, plan, tile, work.pixel);
  for (int64_t c = 0; c < window.channels; c += plan.block) {
    const int64_t channels = smaller(plan.block, window.channels - c);
    copy_tile<dtype>(conv, plan, tile, sample, window.first + c, channels, work.inside, work.tile);
    const int64_t at = (window.first - plan.first + c) * plan.taps * panel;
    const int64_t pieces = (tile.pixels + most_pixels - 1) / most_pixels;
    for (int64_t of = first_panel; of < last_panel; ++of) {
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t p = tile.pixels * piece / pieces, pixels = tile.pixels * (piece + 1) / pieces - p;
        const AddProducts add = apart ? for_pixels<most_pixels, true>(pixels) : for_pixels<most_pixels, false>(pixels);
        add(work.weights + of * plan.panel_size + at, work.tile + (apart ? 0 : p), channels, plan.channel, work.tap, plan.taps,
            work.pixel + p, work.sums + of * sums_size + p * panel);
      }
    }
  }
  for (int64_t of = first_panel; of < last_panel; ++of) {
    const int64_t first = part.first_output + of * panel;
    store_sums<dtype>(conv, tile, sample, first, larger(begin, first), smaller(end, first + panel), work.sums + of * sums_size);
  }
}

template <DType dtype>
void run_of(const WindowConv2d& conv, const WindowConv2dPart& part, void* scratch) {
  const Plan plan = plan_of(conv, part);
  Work work{};
  work.sums = static_cast<float*>(scratch);
  float* rows = work.sums + panels * sums_size;
  work.weights = rows + rows_size;
  const int64_t used = (part.outputs + panel - 1) / panel;
  work.tile = work.weights + used * plan.panel_size;
  work.tap = reinterpret_cast<int64_t*>(work.tile + plan.tile_size);
  work.pixel = work.tap + plan.taps;
  work.inside = reinterpret_cast<uint32_t*>(work.pixel + step);
  alignas(64) float bias[window_conv2d_outputs] = {};
  if (conv.bias != nullptr) load_block(dtype, conv.bias, part.first_output, part.outputs, bias);
  for (int64_t of = 0; of < used; ++of) {
    const int64_t first = of * panel;
    const auto pack = conv.turned ? pack_turned<dtype> : pack_weights<dtype>;
    pack(conv, plan, part.first_output + first, smaller(part.outputs - first, panel), rows, work.weights + of * plan.panel_size);
  }
  const int64_t apart = plan.by_row ? 1 : conv.dilation.down;
  for (int64_t i = 0; i < conv.kernel.down; ++i) {
    for (int64_t j = 0; j < conv.kernel.across; ++j) {
      work.tap[i * conv.kernel.across + j] = i * apart * plan.columns + j * conv.dilation.across;
    }
  }
  for (int64_t n = part.first_sample; n < part.first_sample + part.samples; ++n) {
    const ChannelWindow& window = conv.windows[n];
    if (window.first_output >= part.first_output + part.outputs || window.first_output + window.outputs <= part.first_output) continue;
    for (int64_t run = 0; run < plan.runs; ++run) {
      for (int64_t index = 0; index < plan.tiles; ++index) {
        one_tile<dtype>(conv, part, plan, tile_of(conv, plan, run, index), n, bias, work);
      }
    }
  }
}

void run(const WindowConv2d& conv, const WindowConv2dPart& part, void* scratch) {
  switch (conv.dtype) {
    case DType::bf16:
      run_of<DType::bf16>(conv, part, scratch);
      return;
    case DType::f16:
      run_of<DType::f16>(conv, part, scratch);
      return;
    default:
      run_of<DType::f32>(conv, part, scratch);
  }
}

const WindowConv2dLoops table = {scratch_of, run};

}  // namespace

TASKLOOM_EXPORT_LOOPS(WindowConv2dLoops, window_conv2d_loops, table)

}  // namespace taskloom
