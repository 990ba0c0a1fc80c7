// CPU loops of window_layer_norm, compiled once per CPU level. Sums go by sixteen lanes at every level, and no product is fused with an
// add, so that the bits are the same at all of them.
#include "routed/lane_spans.h"
#include "routed/window_layer_norm.h"

namespace taskloom {
namespace {

// The channels of a sample's rows: begin .. end are computed, start .. stop of them are the window.
struct Range {
  int64_t begin, start, stop, end;

  Range(const Windows& windows, int64_t sample, int64_t channels, bool outside)
      : start(windows.start[sample]), stop(windows.start[sample] + windows.width[sample]) {
    begin = outside ? 0 : start;
    end = outside ? channels : stop;
  }
};

// 1 + scale, or ones.
template <class Acc>
void load_gain(const Elements& scale, int64_t sample, int64_t channels, Acc* gain) {
  if (scale.data == nullptr) {
    fill_run(gain, channels, Acc{1});
    return;
  }
  load_block(scale.dtype, scale.data, sample * channels, channels, gain);
  for (int64_t c = 0; c < channels; ++c) gain[c] = Acc{1} + gain[c];
}

template <class Acc>
inline void modulate_constant(Acc value, const Acc* gain, const Acc* shift, int64_t n, Acc* out) {
  const Lanes<Acc> all = every_lane(value);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(out + place, count, all * load_some(gain + place, count, Acc{0}) + load_some(shift + place, count, Acc{0}));
  });
}

template <class Acc>
inline void modulate_run(const Acc* values, Acc mean, Acc rstd, const Acc* gain, const Acc* shift, int64_t n, Acc* out) {
  const Lanes<Acc> middle = every_lane(mean), factor = every_lane(rstd);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> normal = (load_some(values + place, count, Acc{0}) - middle) * factor;
    store_some(out + place, count, normal * load_some(gain + place, count, Acc{0}) + load_some(shift + place, count, Acc{0}));
  });
}

template <class Acc>
void forward_as(const WindowLayerNorm& view, int64_t sample, int64_t begin, int64_t n, Acc* scratch) {
  const int64_t channels = view.channels;
  Acc *const gain = scratch, *const shift = gain + channels, *const loaded = shift + channels, *const made = loaded + channels;
  load_gain(view.scale, sample, channels, gain);
  if (view.shift.data == nullptr) {
    fill_run(shift, channels, Acc{0});
  } else {
    load_block(view.shift.dtype, view.shift.data, sample * channels, channels, shift);
  }
  const Range range(view.windows, sample, channels, view.outside);
  const int64_t width = range.stop - range.start;
  const Acc total = static_cast<Acc>(channels), outside = static_cast<Acc>(channels - width);
  for (int64_t row = sample * view.rows + begin; row < sample * view.rows + begin + n; ++row) {
    const Acc* const values = read_run(view.x, row * channels + range.start, width, loaded);
    const Acc mean = sum_of_run(values, width) / total;
    const Acc variance = (squares_of_run(values, width, mean) + outside * (mean * mean)) / total;
    const Acc rstd = inverse_deviation(variance, view.eps), constant = -mean * rstd;
    static_cast<Acc*>(view.mean)[row] = mean;
    static_cast<Acc*>(view.rstd)[row] = rstd;
    Acc* const out = target_run(view.x.dtype, view.y, row * channels, made);
    if (view.outside) {
      modulate_constant(constant, gain, shift, range.start, out);
      modulate_constant(constant, gain + range.stop, shift + range.stop, channels - range.stop, out + range.stop);
    } else {
      fill_run(out, range.start, Acc{0});
      fill_run(out + range.stop, channels - range.stop, Acc{0});
    }
    modulate_run(values, mean, rstd, gain + range.start, shift + range.start, width, out + range.start);
    write_run(view.x.dtype, view.y, row * channels, channels, out);
  }
}

// What the gradient of a row's normalised values adds up to, by itself and times them.
template <class Acc>
struct RowSums {
  Acc plain, times_normal;
};

// Channels outside of the window, whose normalised value is one constant.
template <class Acc>
inline Acc add_constant(const Acc* slopes, Acc constant, const Acc* gain, int64_t n, Acc* for_shift, Acc* for_scale) {
  Lanes<Acc> sum = every_lane(Acc{0});
  const Lanes<Acc> normal = every_lane(constant);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> slope = load_some(slopes + place, count, Acc{0});
    sum = sum + slope * load_some(gain + place, count, Acc{0});
    if (for_shift == nullptr) return;
    store_some(for_shift + place, count, load_some(for_shift + place, count, Acc{0}) + slope);
    store_some(for_scale + place, count, load_some(for_scale + place, count, Acc{0}) + slope * normal);
  });
  return sum_of_lanes(sum);
}

template <class Acc>
inline RowSums<Acc> add_window(const Acc* slopes, const Acc* values, Acc mean, Acc rstd, const Acc* gain, int64_t n, Acc* for_shift,
                               Acc* for_scale) {
  Lanes<Acc> plain = every_lane(Acc{0}), times_normal = plain;
  const Lanes<Acc> middle = every_lane(mean), factor = every_lane(rstd);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> slope = load_some(slopes + place, count, Acc{0});
    const Lanes<Acc> normal = (load_some(values + place, count, Acc{0}) - middle) * factor;
    const Lanes<Acc> inner = slope * load_some(gain + place, count, Acc{0});
    plain = plain + inner;
    times_normal = times_normal + inner * normal;
    if (for_shift == nullptr) return;
    store_some(for_shift + place, count, load_some(for_shift + place, count, Acc{0}) + slope);
    store_some(for_scale + place, count, load_some(for_scale + place, count, Acc{0}) + slope * normal);
  });
  return {sum_of_lanes(plain), sum_of_lanes(times_normal)};
}

// dx = rstd (g gain - plain / C - normal times_normal / C) in the window.
template <class Acc>
inline void window_gradient(const Acc* slopes, const Acc* values, Acc mean, Acc rstd, const Acc* gain, int64_t n,
                            const RowSums<Acc>& mean_of, Acc* out) {
  const Lanes<Acc> middle = every_lane(mean), factor = every_lane(rstd), plain = every_lane(mean_of.plain),
                   times_normal = every_lane(mean_of.times_normal);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> normal = (load_some(values + place, count, Acc{0}) - middle) * factor;
    const Lanes<Acc> inner = load_some(slopes + place, count, Acc{0}) * load_some(gain + place, count, Acc{0});
    store_some(out + place, count, factor * ((inner - plain) - normal * times_normal));
  });
}

template <class Acc>
void backward_as(const WindowLayerNormBackward& view, int64_t sample, int64_t begin, int64_t n, Acc* sums, Acc* scratch) {
  const int64_t channels = view.channels;
  Acc *const gain = scratch, *const loaded_x = gain + channels, *const loaded = loaded_x + channels, *const made = loaded + channels;
  Acc *const for_shift = sums, *const for_scale = sums == nullptr ? nullptr : sums + channels;
  const auto at = [](Acc* from, int64_t place) { return from == nullptr ? nullptr : from + place; };
  load_gain(view.scale, sample, channels, gain);
  if (sums != nullptr) fill_run(sums, 2 * channels, Acc{0});
  const Range range(view.windows, sample, channels, view.outside);
  const int64_t width = range.stop - range.start;
  const Acc total = static_cast<Acc>(channels);
  for (int64_t row = sample * view.rows + begin; row < sample * view.rows + begin + n; ++row) {
    const Acc mean = static_cast<const Acc*>(view.mean)[row], rstd = static_cast<const Acc*>(view.rstd)[row], constant = -mean * rstd;
    const Acc* const values = read_run(view.x, row * channels + range.start, width, loaded_x);
    // From the first channel that is computed on.
    const Acc* const below = read_run(view.gradient, row * channels + range.begin, range.end - range.begin, loaded);
    const Acc *const slopes = below + (range.start - range.begin), *const above = slopes + width;
    RowSums<Acc> found =
        add_window(slopes, values, mean, rstd, gain + range.start, width, at(for_shift, range.start), at(for_scale, range.start));
    const Acc around =
        add_constant(below, constant, gain + range.begin, range.start - range.begin, at(for_shift, range.begin),
                     at(for_scale, range.begin)) +
        add_constant(above, constant, gain + range.stop, range.end - range.stop, at(for_shift, range.stop), at(for_scale, range.stop));
    if (view.dx == nullptr) continue;
    found.plain = found.plain + around;
    found.times_normal = found.times_normal + constant * around;
    if (view.for_mean != nullptr) found.plain = found.plain - static_cast<const Acc*>(view.for_mean)[row] / rstd;
    if (view.for_rstd != nullptr) found.times_normal = found.times_normal + static_cast<const Acc*>(view.for_rstd)[row] * rstd;
    Acc* const out = target_run(view.x.dtype, view.dx, row * channels, made);
    fill_run(out, range.start, Acc{0});
    fill_run(out + range.stop, channels - range.stop, Acc{0});
    window_gradient(slopes, values, mean, rstd, gain + range.start, width, {found.plain / total, found.times_normal / total},
                    out + range.start);
    write_run(view.x.dtype, view.dx, row * channels, channels, out);
  }
}

void forward(bool wide, const WindowLayerNorm& view, int64_t sample, int64_t begin, int64_t n, void* scratch) {
  if (wide) {
    forward_as(view, sample, begin, n, static_cast<double*>(scratch));
  } else {
    forward_as(view, sample, begin, n, static_cast<float*>(scratch));
  }
}

void backward(bool wide, const WindowLayerNormBackward& view, int64_t sample, int64_t begin, int64_t n, void* sums, void* scratch) {
  if (wide) {
    backward_as(view, sample, begin, n, static_cast<double*>(sums), static_cast<double*>(scratch));
  } else {
    backward_as(view, sample, begin, n, static_cast<float*>(sums), static_cast<float*>(scratch));
  }
}

const WindowLayerNormLoops table = {forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(WindowLayerNormLoops, window_layer_norm_loops, table)

}  // namespace taskloom
