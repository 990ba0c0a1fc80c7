// Cases of the loops that take and make masks: packed_mask, mask_count, masked_compress, task_mask with multi_task_vector.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "groups.h"
#include "masked/mask_count.h"
#include "masked/masked_compress.h"
#include "masked/multi_task_vector.h"
#include "masked/packed_mask.h"
#include "masked/task_mask.h"
#include "sizes.h"

namespace taskloom::sanitize {

void packed_masks() {
  Random random(1);
  for (const int64_t n : sizes_and_chunks()) {
    for (const Placement placement : placements) {
      begin_case("packed_mask n=%ld placement=%d", n, static_cast<int>(placement));
      Buffer flags(n, placement);
      for (int64_t i = 0; i < n; ++i) flags.u8()[i] = static_cast<uint8_t>(random.below(2) * random.below(256));
      std::vector<char> packed =
          agree_bytes((n + 7) / 8, placement, [&](char* out) { packed_mask_loops().pack(flags.u8(), n, reinterpret_cast<uint8_t*>(out)); });
      Buffer bits((n + 7) / 8, placement);
      std::copy(packed.begin(), packed.end(), bits.data());
      const std::vector<char> back =
          agree_bytes(n, placement, [&](char* out) { packed_mask_loops().unpack(bits.u8(), n, reinterpret_cast<uint8_t*>(out)); });
      for (int64_t i = 0; i < n; ++i) EXPECT(back[static_cast<size_t>(i)] == (flags.u8()[i] != 0 ? 1 : 0));
    }
  }
}

void mask_counts() {
  Random random(2);
  for (const int64_t tasks : {1, 2, 3, 7, 8, 9, 15, 16, 17, 33}) {
    for (const int64_t n : sizes_and_chunks()) {
      if (n > 5000 && tasks != 3 && tasks != 9) continue;
      const Placement placement = random.pick(placements);
      const int64_t begin = 8 * random.below(80), k = random.below(tasks + 3);
      begin_case("mask_count tasks=%ld n=%ld begin=%ld k=%ld placement=%d", tasks, n, begin, k, static_cast<int>(placement));
      std::vector<Buffer> masks;
      std::vector<const uint8_t*> pointers;
      for (int64_t t = 0; t < tasks; ++t) {
        masks.push_back(packed_mask(begin + n, random.below(4), placement, random));
        pointers.push_back(masks.back().u8());
      }
      std::vector<int64_t> expected(static_cast<size_t>(tasks + 1)), histogram;
      for (int64_t i = begin; i < begin + n; ++i) {
        int64_t count = 0;
        for (const uint8_t* mask : pointers) count += bit_at(mask, i);
        ++expected[static_cast<size_t>(count)];
      }
      agree_bytes((n + 7) / 8, placement, [&](char* out) {
        histogram.assign(static_cast<size_t>(tasks + 1), 0);
        // The loop counts bytes from entry 0; only those of its entries are there.
        auto* whole = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(out) - static_cast<uintptr_t>(begin / 8));
        mask_count_loops().count(pointers.data(), tasks, k, begin, n, whole, histogram.data());
        EXPECT(histogram == expected);
      });
    }
  }
}

void masked_compressions() {
  Random random(3);
  for (const int64_t size : {1, 2, 4, 8}) {
    for (const int64_t n : sizes_and_chunks()) {
      for (const int64_t spread : {0, 1, 2, 60}) {
        const Placement placement = random.pick(placements);
        const int64_t begin = 8 * random.below(3), place = random.below(3);
        begin_case("masked_compress size=%ld n=%ld spread=%ld begin=%ld placement=%d", size, n, spread, begin, static_cast<int>(placement));
        const Buffer mask = packed_mask(begin + n, spread, placement, random);
        int64_t set = 0;
        for (int64_t i = begin; i < begin + n; ++i) set += bit_at(mask.u8(), i);
        Buffer whole((begin + n) * size, placement), base((begin + n) * size, placement);
        for (int64_t i = 0; i < whole.bytes(); ++i) whole.u8()[i] = static_cast<uint8_t>(random.next());
        base.fill(7);
        const std::vector<char> stored = agree_bytes((place + set) * size, placement, [&](char* out) {
          std::memset(out, 1, static_cast<size_t>(place * size));
          EXPECT(masked_compress_loops().count(mask.u8(), begin, n) == set);
          masked_compress_loops().compress(size, whole.data(), mask.u8(), begin, n, place, out);
        });
        Buffer compressed(static_cast<int64_t>(stored.size()), placement);
        std::copy(stored.begin(), stored.end(), compressed.data());
        const std::vector<char> back = agree_bytes((begin + n) * size, placement, [&](char* out) {
          std::memset(out, 7, static_cast<size_t>(begin * size));
          masked_compress_loops().restore(size, compressed.data(), mask.u8(), base.data(), begin, n, place, out);
        });
        for (int64_t i = begin; i < begin + n; ++i) {
          const char* expected = (bit_at(mask.u8(), i) ? whole : base).data() + i * size;
          EXPECT(std::equal(expected, expected + size, back.data() + i * size));
        }
      }
    }
  }
}

namespace {

void task_mask_case(DType base_dtype, DType tuned_dtype, DType vector_dtype, int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const Kind kind = random.pick(kinds);
  const int64_t begin = 8 * random.below(3), total = begin + n;
  const bool wide = base_dtype == DType::f64 || tuned_dtype == DType::f64 || vector_dtype == DType::f64;
  begin_case("task_mask %s %s %s n=%ld begin=%ld kind=%d placement=%d", dtype_name(base_dtype), dtype_name(tuned_dtype),
             dtype_name(vector_dtype), n, begin, static_cast<int>(kind), static_cast<int>(placement));
  const Buffer base = values(base_dtype, total, kind, placement, random), tuned = values(tuned_dtype, total, kind, placement, random);
  const Buffer vector = values(vector_dtype, total, Kind::plain, placement, random);
  const TaskMask task{{base.data(), base_dtype}, {tuned.data(), tuned_dtype}, {vector.data(), vector_dtype}, 0.4};
  agree_bytes((total + 7) / 8, placement, [&](char* out) {
    std::memset(out, 0, static_cast<size_t>(begin / 8));
    task_mask_loops().mask(wide, task, begin, n, reinterpret_cast<uint8_t*>(out));
  });
}

void multi_task_vector_case(int64_t tasks, DType base_dtype, int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const int64_t begin = 8 * random.below(3), total = begin + n;
  std::vector<Buffer> tensors;
  std::vector<Elements> tuned;
  std::vector<double> weight;
  bool wide = base_dtype == DType::f64;
  const Buffer base = values(base_dtype, total, Kind::plain, placement, random);
  for (int64_t t = 0; t < tasks; ++t) {
    const DType dtype = random.pick(dtypes);
    tensors.push_back(values(dtype, total, random.pick(kinds), placement, random));
    tuned.push_back({tensors.back().data(), dtype});
    weight.push_back(2 * random.share() - 1);
    wide = wide || dtype == DType::f64;
  }
  begin_case("multi_task_vector tasks=%ld base=%s n=%ld begin=%ld placement=%d", tasks, dtype_name(base_dtype), n, begin,
             static_cast<int>(placement));
  const MultiTaskVector view{{base.data(), base_dtype}, tuned.data(), weight.data(), tasks};
  // The sum is the op's own tensor, so its address is a multiple of its elements' size.
  agree(wide ? DType::f64 : DType::f32, total, placement == Placement::odd ? Placement::heap : placement, [&](char* out) {
    std::memset(out, 0, static_cast<size_t>(begin * (wide ? 8 : 4)));
    multi_task_vector_loops().sum(wide, view, begin, n, out);
  });
}

}  // namespace

void task_masks() {
  Random random(4);
  for (const int64_t n : sizes_and_chunks()) {
    for (const DType base : dtypes) {
      for (const DType tuned : dtypes) {
        if (n > 5000 && base != tuned) continue;
        for (const DType vector : dtypes) task_mask_case(base, tuned, vector, n, random);
      }
      for (int64_t tasks = 1; tasks <= 9; tasks += n > 5000 ? 4 : 1) multi_task_vector_case(tasks, base, n, random);
    }
  }
}

}  // namespace taskloom::sanitize
