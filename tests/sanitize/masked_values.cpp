// Cases of the loops that change values where a mask says so, or block by block: masked_update, masked_switch, block_scale_merge.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "groups.h"
#include "masked/block_scale_merge.h"
#include "masked/masked_switch.h"
#include "masked/masked_update.h"
#include "sizes.h"

namespace taskloom::sanitize {
namespace {

// Of a block of 512 entries: none, a few that are gathered, about as many as that way takes, half, all.
constexpr int64_t spreads[] = {0, 200, 64, 2, 1};

// The mask as packed bits, or as bytes of which any value but 0 sets an entry.
Buffer mask_of(int64_t n, bool packed, int64_t spread, Placement placement, Random& random) {
  Buffer bits = packed_mask(n, spread, placement, random);
  if (packed) return bits;
  Buffer bytes(n, placement);
  for (int64_t i = 0; i < n; ++i) bytes.u8()[i] = bit_at(bits.u8(), i) ? static_cast<uint8_t>(1 + random.below(255)) : uint8_t{0};
  return bytes;
}

void masked_update_case(DType target_dtype, DType delta_dtype, bool packed, bool in_place, int64_t spread, int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const int64_t begin = 8 * random.below(3), total = begin + n;
  const bool wide = target_dtype == DType::f64 || delta_dtype == DType::f64;
  begin_case("masked_update %s += %s packed=%d in_place=%d spread=%ld n=%ld begin=%ld placement=%d", dtype_name(target_dtype),
             dtype_name(delta_dtype), packed, in_place, spread, n, begin, static_cast<int>(placement));
  const Buffer target = values(target_dtype, total, random.pick(kinds), placement, random);
  const Buffer delta = values(delta_dtype, total, random.pick(kinds), placement, random);
  const Buffer mask = mask_of(total, packed, spread, placement, random);
  const std::vector<char> done = agree(target_dtype, total, placement, [&](char* out) {
    const auto skipped = static_cast<size_t>(in_place ? total : begin) * static_cast<size_t>(element_size(target_dtype));
    std::copy_n(target.data(), skipped, out);
    const MaskedUpdate update{{in_place ? out : target.data(), target_dtype}, {delta.data(), delta_dtype}, mask.u8(), packed, 0.7, out};
    masked_update_loops().update(wide, update, begin, n);
  });
  const int64_t size = element_size(target_dtype);
  for (int64_t i = 0; i < total; ++i) {
    const bool set = packed ? bit_at(mask.u8(), i) : mask.u8()[i] != 0;
    if (!set || i < begin) EXPECT(std::equal(target.data() + i * size, target.data() + (i + 1) * size, done.data() + i * size));
  }
}

void masked_switch_case(DType target_dtype, DType base_dtype, DType delta_dtype, int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const int64_t begin = 8 * random.below(3), total = begin + n;
  const bool wide = target_dtype == DType::f64 || base_dtype == DType::f64 || delta_dtype == DType::f64;
  const int64_t spread = random.pick(spreads);
  begin_case("masked_switch %s = %s + %s spread=%ld n=%ld begin=%ld placement=%d", dtype_name(target_dtype), dtype_name(base_dtype),
             dtype_name(delta_dtype), spread, n, begin, static_cast<int>(placement));
  const Buffer target = values(target_dtype, total, Kind::plain, placement, random);
  const Buffer base = values(base_dtype, total, random.pick(kinds), placement, random);
  const Buffer delta = values(delta_dtype, total, random.pick(kinds), placement, random);
  const Buffer before = packed_mask(total, spread, placement, random), after = packed_mask(total, random.pick(spreads), placement, random);
  agree(target_dtype, total, placement, [&](char* out) {
    std::copy_n(target.data(), target.bytes(), out);
    const MaskedSwitch change{{base.data(), base_dtype}, {delta.data(), delta_dtype}, before.u8(), after.u8(), out, target_dtype};
    masked_switch_loops().change(wide, change, begin, n);
  });
}

void block_scale_case(int64_t tasks, int64_t groups, DType base_dtype, int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const int64_t begin = random.below(20), total = begin + n;
  const bool partitioned = groups > 1 || random.below(2) == 0;
  // Tasks of one dtype are read side by side, and entries that are all of known groups are looked up in registers.
  const bool alike = tasks > 5 || random.below(2) == 0, too_many = random.below(2) == 0;
  const DType delta_dtype = random.pick(dtypes);
  begin_case("block_scale_merge tasks=%ld groups=%ld partitioned=%d base=%s n=%ld begin=%ld placement=%d", tasks, groups, partitioned,
             dtype_name(base_dtype), n, begin, static_cast<int>(placement));
  std::vector<Buffer> tensors;
  std::vector<Elements> deltas;
  bool wide = base_dtype == DType::f64;
  for (int64_t t = 0; t < tasks; ++t) {
    const DType dtype = alike ? delta_dtype : random.pick(dtypes);
    tensors.push_back(values(dtype, total, random.pick(kinds), placement, random));
    deltas.push_back({tensors.back().data(), dtype});
    wide = wide || dtype == DType::f64;
  }
  const Buffer base = values(base_dtype, total, Kind::plain, placement, random);
  Buffer partition(total, placement);
  // Where there is one group too many among them, the loop counts it as the last and tells.
  int64_t largest = 0;
  for (int64_t i = 0; i < total; ++i) {
    partition.u8()[i] = static_cast<uint8_t>(random.below(std::min<int64_t>(256, groups + (too_many ? 1 : 0))));
    if (partitioned && i >= begin) largest = std::max<int64_t>(largest, partition.u8()[i]);
  }
  // Coefficients and sums are the wrapper's own, at addresses of whole numbers of their size.
  const Buffer coef = values(wide ? DType::f64 : DType::f32, tasks * groups, Kind::plain, Placement::page, random);
  ScaleBlock block{
      {base.data(), base_dtype}, deltas.data(), 1, tasks, coef.data(), groups, groups, partitioned ? partition.u8() : nullptr, nullptr};
  agree(base_dtype, total, placement, [&](char* out) {
    std::memset(out, 0, static_cast<size_t>(begin * element_size(base_dtype)));
    block.out = out;
    const Buffer scratch(scale_merge_scratch(tasks), Placement::page);
    scratch.fill(0x33);
    EXPECT(block_scale_merge_loops().merge(wide, block, begin, n, scratch.data()) == largest);
  });
  agree(DType::f64, tasks * groups, Placement::page, [&](char* out) {
    const Buffer scratch(8 * scale_dots_scratch(tasks), Placement::page);
    scratch.fill(0x33);
    EXPECT(block_scale_merge_loops().dots(block, begin, n, reinterpret_cast<double*>(out), reinterpret_cast<double*>(scratch.data())) ==
           largest);
  });
}

}  // namespace

void masked_updates() {
  Random random(5);
  for (const int64_t n : sizes_and_chunks()) {
    for (const DType target : dtypes) {
      for (const DType delta : dtypes) {
        if (n > 5000 && target != delta) continue;
        for (const int64_t spread : spreads) {
          for (int form = 0; form < 4; ++form) masked_update_case(target, delta, (form & 1) != 0, (form & 2) != 0, spread, n, random);
        }
      }
    }
  }
}

void masked_switches() {
  Random random(6);
  for (const int64_t n : sizes_and_chunks()) {
    for (const DType target : dtypes) {
      for (const DType base : dtypes) {
        if (n > 5000 && target != base) continue;
        for (const DType delta : dtypes) {
          for (int repeat = 0; repeat < (n > 5000 ? 1 : 3); ++repeat) masked_switch_case(target, base, delta, n, random);
        }
      }
    }
  }
}

void block_scales() {
  Random random(7);
  for (const int64_t n : sizes_and_chunks()) {
    for (const DType base : dtypes) {
      for (const int64_t tasks : {1, 2, 5, 14, 25}) {
        for (const int64_t groups : {1, 2, 7, 16, 17, 32, 33, 256}) {
          if (n > 5000 && (tasks > 2 || groups > 16)) continue;
          if (tasks > 5 && groups > 7) continue;
          block_scale_case(tasks, groups, base, n, random);
        }
      }
    }
  }
}

}  // namespace taskloom::sanitize
