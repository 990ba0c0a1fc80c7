// Cases of the loops of topk_gate and its backward: rows of all lengths, each piece with exactly the scratch that it was promised.
#include <algorithm>
#include <vector>

#include "check.h"
#include "gating/topk_gate.h"
#include "groups.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

struct Shape {
  int64_t tokens, experts, k, groups, kept_groups;
};

constexpr int64_t rows_of_piece = 3;

// Weights, ids and, with statistics, the pieces' counts and sums and the rows' log-sum-exps, one after the other.
std::vector<char> gated(const Shape& shape, TopKGate gate, bool wide, bool statistics, Placement placement) {
  const int64_t unit = wide ? 8 : 4, chosen = shape.tokens * shape.k, pieces = chunk_count(shape.tokens, rows_of_piece);
  const int64_t ids = chosen * unit, counts = ids + chosen * (gate.long_ids ? 8 : 4);
  const int64_t sums = counts + (statistics ? pieces * shape.experts * 4 : 0);
  const int64_t lse = sums + (statistics ? pieces * shape.experts * unit : 0), all = lse + (statistics ? shape.tokens * unit : 0);
  return agree_bytes(all, placement, [&](char* out) {
    // The arrays of a tensor are aligned, so that each is made apart and copied.
    const Buffer weight(ids, placement), places(counts - ids, placement), counted(sums - counts, Placement::heap);
    const Buffer summed(lse - sums, Placement::page), each(all - lse, Placement::page);
    gate.weight = weight.data(), gate.ids = places.data(), gate.log_sum_exp = statistics ? each.data() : nullptr;
    team()(pieces, [&](int64_t piece) {
      const Buffer scratch(gate_scratch(wide, shape.experts, shape.groups), Placement::page);
      const int64_t begin = piece * rows_of_piece, first = statistics ? piece * shape.experts : 0;
      topk_gate_loops().forward(wide, gate, begin, std::min(begin + rows_of_piece, shape.tokens),
                                reinterpret_cast<int32_t*>(counted.data()) + first, summed.data() + first * unit, scratch.data());
    });
    for (const Buffer* part : {&weight, &places, &counted, &summed, &each}) {
      std::copy_n(part->data(), part->bytes(), out);
      out += part->bytes();
    }
  });
}

void check_ids(const Shape& shape, bool long_ids, const char* ids) {
  for (int64_t row = 0; row < shape.tokens; ++row) {
    std::vector<char> seen(static_cast<size_t>(shape.experts));
    for (int64_t slot = 0; slot < shape.k; ++slot) {
      const int64_t place = row * shape.k + slot;
      int64_t id = 0;
      std::memcpy(&id, ids + place * (long_ids ? 8 : 4), long_ids ? 8 : 4);
      EXPECT(id >= 0 && id < shape.experts);
      EXPECT(seen[static_cast<size_t>(id)] == 0);
      seen[static_cast<size_t>(id)] = 1;
    }
  }
}

void differentiated(const Shape& shape, const TopKGate& gate, bool wide, const char* weight, const char* ids, Placement placement,
                    Random& random) {
  const DType arithmetic = wide ? DType::f64 : DType::f32;
  const Buffer slopes = values(arithmetic, shape.tokens * shape.k, Kind::plain, placement, random);
  const Buffer sums = values(arithmetic, shape.experts, Kind::plain, placement, random);
  const Buffer lse = values(arithmetic, shape.tokens, Kind::plain, placement, random);
  const auto given = [&](const Buffer& one) -> const void* { return random.below(3) == 0 ? nullptr : one.data(); };
  TopKGateBackward view{gate.logits,   gate.row_stride,  gate.experts,  gate.k,      ids,
                        gate.long_ids, weight,           given(slopes), given(sums), given(lse),
                        gate.sigmoid,  gate.renormalize, gate.scale,    gate.eps,    gate.inverse_temperature,
                        nullptr};
  agree(gate.logits.dtype, shape.tokens * shape.experts, placement, [&](char* out) {
    view.for_logits = out;
    team()(chunk_count(shape.tokens, rows_of_piece), [&](int64_t piece) {
      const Buffer scratch(gate_scratch(wide, shape.experts, 0), Placement::page);
      const int64_t begin = piece * rows_of_piece;
      topk_gate_backward_loops().backward(wide, view, begin, std::min(begin + rows_of_piece, shape.tokens), scratch.data());
    });
  });
}

void run_case(const Shape& shape, Random& random) {
  const DType dtype = random.pick(dtypes), bias_dtype = random.pick(dtypes);
  const Kind kind = random.pick(kinds);
  const Placement placement = random.pick(placements);
  const bool biased = random.below(2) == 0, statistics = random.below(2) == 0;
  const bool wide = dtype == DType::f64 || (biased && bias_dtype == DType::f64);
  const bool two = shape.experts / shape.groups >= 2 && random.below(2) == 0;
  begin_case("topk_gate tokens=%ld experts=%ld k=%ld groups=%ld kept=%ld %s kind=%d placement=%d biased=%d statistics=%d two=%d",
             shape.tokens, shape.experts, shape.k, shape.groups, shape.kept_groups, dtype_name(dtype), static_cast<int>(kind),
             static_cast<int>(placement), biased, statistics, two);
  const int64_t stride = shape.experts + random.below(2);
  const Buffer logits = values(dtype, shape.tokens == 0 ? 0 : (shape.tokens - 1) * stride + shape.experts, kind, placement, random);
  const Buffer bias = values(bias_dtype, shape.experts, Kind::plain, placement, random);
  TopKGate gate{};
  gate.logits = {logits.data(), dtype};
  gate.row_stride = stride, gate.experts = shape.experts, gate.k = shape.k;
  if (biased) gate.bias = {bias.data(), bias_dtype};
  gate.sigmoid = random.below(2) == 0, gate.renormalize = random.below(2) == 0, gate.long_ids = random.below(2) == 0;
  gate.groups = shape.groups, gate.kept_groups = shape.kept_groups, gate.by_two_best = two;
  gate.group_mask = random.below(2) == 0 ? 0.0 : -__builtin_inf();
  gate.scale = 2.5, gate.eps = random.below(2) == 0 ? 0.0 : 0.1, gate.inverse_temperature = 0.7;
  const std::vector<char> found = gated(shape, gate, wide, statistics, placement);
  const int64_t chosen = shape.tokens * shape.k;
  const char* const ids = found.data() + chosen * (wide ? 8 : 4);
  check_ids(shape, gate.long_ids, ids);
  Buffer kept_ids(chosen * (gate.long_ids ? 8 : 4), placement), weight(chosen * (wide ? 8 : 4), placement);
  std::copy_n(ids, kept_ids.bytes(), kept_ids.data());
  std::copy_n(found.data(), weight.bytes(), weight.data());
  differentiated(shape, gate, wide, weight.data(), kept_ids.data(), placement, random);
}

}  // namespace

void gates() {
  Random random(31);
  for (const int64_t experts : {1, 2, 7, 16, 31, 32, 33, 60, 64, 100, 160, 257}) {
    for (int round = 0; round < 24; ++round) {
      int64_t groups = 1 + random.below(experts);
      while (experts % groups != 0) groups = 1 + random.below(experts);
      const int64_t size = experts / groups, kept = 1 + random.below(groups);
      const Shape shape{random.below(9), experts, 1 + random.below(std::min(most_chosen, kept * size)), groups, kept};
      run_case(shape, random);
    }
  }
}

}  // namespace taskloom::sanitize
