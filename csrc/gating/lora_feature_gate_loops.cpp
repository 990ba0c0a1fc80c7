// CPU loops of lora_feature_gate, compiled once per CPU level, with the same bits at all levels.
#include "gating/logistic.h"
#include "gating/lora_feature_gate.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

template <class Acc>
void forward_as(const GateRow& row) {
  const Acc *const logits = static_cast<const Acc*>(row.logits), *const x = static_cast<const Acc*>(row.x);
  const Acc* const weight = static_cast<const Acc*>(row.weight);
  Acc* const out = static_cast<Acc*>(row.out);
  const Lanes<Acc> two = every_lane(Acc{2});
  const int64_t maps = row.maps, stride = row.map_stride;
  over_lanes(row.features, [&](int64_t place, auto count) __attribute__((always_inline)) {
    Lanes<Acc> total = every_lane(Acc{0});
    for (int64_t map = 0; map < maps; ++map) {
      const Lanes<Acc> gate = two * gate_of(load_some(logits + map * stride + place, count, Acc{0}));
      total = total + every_lane(weight[map]) * gate;
    }
    store_some(out + place, count, load_some(x + place, count, Acc{0}) * total);
  });
}

// Map after map; `out` holds the gates' sum until the last.
template <class Acc>
void backward_as(const GateRow& row, const Acc* gradient, Acc* for_weight) {
  const Acc* const x = static_cast<const Acc*>(row.x);
  const Acc* const weight = static_cast<const Acc*>(row.weight);
  Acc* const out = static_cast<Acc*>(row.out);
  const Lanes<Acc> one = every_lane(Acc{1}), two = every_lane(Acc{2}), half = every_lane(Acc{0.5});
  for (int64_t map = 0; map < row.maps; ++map) {
    Acc* const logits = static_cast<Acc*>(row.logits) + map * row.map_stride;
    const Lanes<Acc> share = every_lane(weight[map]);
    const bool first = map == 0, last = map + 1 == row.maps;
    Lanes<Acc> sum = every_lane(Acc{0});
    over_lanes(row.features, [&](int64_t place, auto count) __attribute__((always_inline)) {
      const Lanes<Acc> slope = load_some(gradient + place, count, Acc{0});
      const Lanes<Acc> gate = two * gate_of(load_some(logits + place, count, Acc{0}));
      const Lanes<Acc> outer = slope * load_some(x + place, count, Acc{0}) * gate;
      sum = sum + outer;
      store_some(logits + place, count, outer * share * (one - half * gate));
      const Lanes<Acc> added = share * gate;
      const Lanes<Acc> total = first ? added : load_some(out + place, count, Acc{0}) + added;
      store_some(out + place, count, last ? slope * total : total);
    });
    for_weight[map] = sum_of_lanes(sum);
  }
}

void load(bool wide, const Elements& from, int64_t offset, int64_t n, void* to) {
  if (wide) {
    load_block(from.dtype, from.data, offset, n, static_cast<double*>(to));
  } else {
    load_block(from.dtype, from.data, offset, n, static_cast<float*>(to));
  }
}

void store(bool wide, const void* from, int64_t n, DType dtype, void* to, int64_t offset) {
  if (wide) {
    store_block(dtype, static_cast<const double*>(from), n, to, offset);
  } else {
    store_block(dtype, static_cast<const float*>(from), n, to, offset);
  }
}

void forward(bool wide, const GateRow& row) { (wide ? forward_as<double> : forward_as<float>)(row); }

void backward(bool wide, const GateRow& row, const void* gradient, void* for_weight) {
  if (wide) {
    backward_as(row, static_cast<const double*>(gradient), static_cast<double*>(for_weight));
  } else {
    backward_as(row, static_cast<const float*>(gradient), static_cast<float*>(for_weight));
  }
}

const LoraFeatureGateLoops table = {load, store, forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(LoraFeatureGateLoops, lora_feature_gate_loops, table)

}  // namespace taskloom
