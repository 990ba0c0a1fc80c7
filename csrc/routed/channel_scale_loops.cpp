// CPU loops of channel_scale, compiled once per CPU level. Sums go by sixteen lanes at every level and from block to block in double, and
// no product is fused with an add, so that the bits are the same at all levels.
#include "routed/activations.h"
#include "routed/channel_scale.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

constexpr int64_t block = channel_scale_block;

// The factor and the addend of a block's entries: one for all of them, or one for each.
template <class Acc>
struct OneForAll {
  Lanes<Acc> factor, addend;

  Lanes<Acc> factors(int64_t, int64_t) const { return factor; }
  Lanes<Acc> addends(int64_t, int64_t) const { return addend; }
};

template <class Acc>
struct OneForEach {
  const Acc *factor, *addend;

  Lanes<Acc> factors(int64_t place, int64_t count) const { return load_some(factor + place, count, Acc{0}); }
  Lanes<Acc> addends(int64_t place, int64_t count) const { return load_some(addend + place, count, Acc{0}); }
};

template <Activation activation, class Acc, class Map>
inline void apply_block(const Acc* x, const Map& map, int64_t n, Acc* out) {
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> inner = load_some(x + place, count, Acc{0}) * map.factors(place, count) + map.addends(place, count);
    store_some(out + place, count, activated<activation>(inner));
  });
}

// slopes = gradient * activation'(x * factor + addend), and, unless null, out = slopes * factor.
template <Activation activation, class Acc, class Map>
inline void differentiate_block(const Acc* x, const Acc* gradient, const Map& map, int64_t n, Acc* slopes, Acc* out) {
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> factors = map.factors(place, count);
    const Lanes<Acc> inner = load_some(x + place, count, Acc{0}) * factors + map.addends(place, count);
    const Lanes<Acc> slope = load_some(gradient + place, count, Acc{0}) * slope_of<activation>(inner);
    store_some(slopes + place, count, slope);
    if (out != nullptr) store_some(out + place, count, slope * factors);
  });
}

template <class Acc>
inline Acc products_of_runs(const Acc* a, const Acc* b, int64_t n) {
  Lanes<Acc> sum = every_lane(Acc{0});
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    sum = sum + load_some(a + place, count, Acc{0}) * load_some(b + place, count, Acc{0});
  });
  return sum_of_lanes(sum);
}

// The channels begin .. end of one sample that a call is for, and those of them that the window holds.
struct Range {
  int64_t begin, start, stop, end;

  Range(const Windows& windows, int64_t sample, int64_t first, int64_t n) : begin(first), end(first + n) {
    const int64_t low = windows.start[sample], high = low + windows.width[sample];
    start = low < begin ? begin : low > end ? end : low;
    stop = high < start ? start : high > end ? end : high;
  }
};

inline void zero_run(DType dtype, void* data, int64_t offset, int64_t n) {
  if (n > 0) std::memset(static_cast<char*>(data) + offset * element_size(dtype), 0, static_cast<size_t>(n * element_size(dtype)));
}

template <class Acc>
inline void load_factors(const ChannelScale& view, int64_t sample, const Range& range, Acc* scale, Acc* bias) {
  const int64_t n = range.stop - range.start;
  load_block(view.scale.dtype, view.scale.data, sample * view.channels + range.start, n, scale);
  if (view.bias.data == nullptr) {
    fill_run(bias, n, Acc{0});
  } else {
    load_block(view.bias.dtype, view.bias.data, range.start, n, bias);
  }
}

// Calls work(channel, offset, n, map) for blocks of the window's entries, `channel` counted from its first. Where a channel has few places
// a block holds several whole channels.
template <class Acc, class F>
inline void over_blocks(int64_t first, int64_t channels, int64_t places, const Acc* scale, const Acc* bias, Acc* spread, const F& work) {
  if (places >= lanes) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      const OneForAll<Acc> map{every_lane(scale[channel]), every_lane(bias[channel])};
      for (int64_t done = 0; done < places; done += block) {
        work(channel, (first + channel) * places + done, places - done < block ? places - done : block, map);
      }
    }
    return;
  }
  const int64_t together = block / places;
  Acc *const factors = spread, *const addends = spread + block;
  for (int64_t channel = 0; channel < channels; channel += together) {
    const int64_t count = channels - channel < together ? channels - channel : together;
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t place = 0; place < places; ++place) {
        factors[c * places + place] = scale[channel + c];
        addends[c * places + place] = bias[channel + c];
      }
    }
    work(channel, (first + channel) * places, count * places, OneForEach<Acc>{factors, addends});
  }
}

template <Activation activation, class Acc>
void forward_as(const ChannelScale& view, int64_t sample, int64_t begin, int64_t n, Acc* scratch) {
  Acc *const loaded = scratch, *const made = loaded + block, *const spread = made + block;
  Acc *const scale = spread + 2 * block, *const bias = scale + n;
  const Range range(view.windows, sample, begin, n);
  const int64_t origin = sample * view.channels, places = view.places;
  zero_run(view.x.dtype, view.y, (origin + range.begin) * places, (range.start - range.begin) * places);
  zero_run(view.x.dtype, view.y, (origin + range.stop) * places, (range.end - range.stop) * places);
  load_factors(view, sample, range, scale, bias);
  over_blocks(origin + range.start, range.stop - range.start, places, scale, bias, spread,
              [&](int64_t, int64_t offset, int64_t count, const auto& map) {
                const Acc* const x = read_run(view.x, offset, count, loaded);
                Acc* const out = target_run(view.x.dtype, view.y, offset, made);
                apply_block<activation>(x, map, count, out);
                write_run(view.x.dtype, view.y, offset, count, out);
              });
}

template <Activation activation, class Acc>
void backward_as(const ChannelScaleBackward& view, int64_t sample, int64_t begin, int64_t n, Acc* scratch) {
  const ChannelScale& f = view.forward;
  Acc *const loaded = scratch, *const made = loaded + block, *const spread = made + block, *const loaded_gradient = spread + 2 * block,
             *const slopes = loaded_gradient + block;
  Acc *const scale = slopes + 2 * block, *const bias = scale + n, *const for_scale = bias + n, *const for_bias = for_scale + n;
  const Range range(f.windows, sample, begin, n);
  const int64_t origin = sample * f.channels, places = f.places;
  if (f.y != nullptr) {
    zero_run(f.x.dtype, f.y, (origin + range.begin) * places, (range.start - range.begin) * places);
    zero_run(f.x.dtype, f.y, (origin + range.stop) * places, (range.end - range.stop) * places);
  }
  load_factors(f, sample, range, scale, bias);
  fill_run(for_scale, n, Acc{0});
  fill_run(for_bias, n, Acc{0});
  const int64_t skipped = range.start - range.begin;
  double scale_sum = 0, bias_sum = 0;
  over_blocks(origin + range.start, range.stop - range.start, places, scale, bias, spread,
              [&](int64_t channel, int64_t offset, int64_t count, const auto& map) {
                const Acc *const x = read_run(f.x, offset, count, loaded), *const gradient =
                                                                               read_run(view.gradient, offset, count, loaded_gradient);
                Acc* const out = f.y == nullptr ? nullptr : target_run(f.x.dtype, f.y, offset, made);
                differentiate_block<activation>(x, gradient, map, count, slopes, out);
                if (out != nullptr) write_run(f.x.dtype, f.y, offset, count, out);
                if (places < lanes) {
                  for (int64_t c = 0; c * places < count; ++c) {
                    for (int64_t i = c * places; i < (c + 1) * places; ++i) {
                      const Acc product = slopes[i] * load_at<Acc>(x, i);
                      for_scale[skipped + channel + c] += product;
                      for_bias[skipped + channel + c] += slopes[i];
                    }
                  }
                  return;
                }
                if (offset % places == 0) scale_sum = bias_sum = 0;
                scale_sum += static_cast<double>(products_of_runs(slopes, x, count));
                bias_sum += static_cast<double>(sum_of_run(slopes, count));
                for_scale[skipped + channel] = static_cast<Acc>(scale_sum);
                for_bias[skipped + channel] = static_cast<Acc>(bias_sum);
              });
  if (view.for_scale != nullptr) store_block(f.scale.dtype, for_scale, n, view.for_scale, origin + begin);
  if (view.for_bias != nullptr) store_block(dtype_of_arithmetic<Acc>, for_bias, n, view.for_bias, origin + begin);
}

// Calls body<activation>().
template <class F>
inline void with_activation(Activation activation, const F& body) {
  switch (activation) {
    case Activation::relu:
      return body.template operator()<Activation::relu>();
    case Activation::gelu:
      return body.template operator()<Activation::gelu>();
    case Activation::silu:
      return body.template operator()<Activation::silu>();
    case Activation::none:
      return body.template operator()<Activation::none>();
  }
}

void forward(bool wide, const ChannelScale& view, int64_t sample, int64_t begin, int64_t n, void* scratch) {
  with_activation(view.activation, [&]<Activation activation>() {
    if (wide) {
      forward_as<activation>(view, sample, begin, n, static_cast<double*>(scratch));
    } else {
      forward_as<activation>(view, sample, begin, n, static_cast<float*>(scratch));
    }
  });
}

void backward(bool wide, const ChannelScaleBackward& view, int64_t sample, int64_t begin, int64_t n, void* scratch) {
  with_activation(view.forward.activation, [&]<Activation activation>() {
    if (wide) {
      backward_as<activation>(view, sample, begin, n, static_cast<double*>(scratch));
    } else {
      backward_as<activation>(view, sample, begin, n, static_cast<float*>(scratch));
    }
  });
}

const ChannelScaleLoops table = {forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(ChannelScaleLoops, channel_scale_loops, table)

}  // namespace taskloom
