// Cases of sparse_merge: every combination of its stages with 1 to 9 tasks, every mix of storage types, its loops with exactly their
// scratch.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "groups.h"
#include "masked/sparse_merge.h"
#include "sizes.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

constexpr Select selects[] = {Select::all, Select::magnitude, Select::row_magnitude, Select::mask, Select::dropout, Select::rank_dropout};
constexpr Rescale rescales[] = {Rescale::none, Rescale::density, Rescale::l1};
constexpr Elect elects[] = {Elect::none, Elect::sign_sum, Elect::sign_count};
constexpr Vote votes[] = {Vote::none, Vote::selected, Vote::tall};
constexpr Combine combines[] = {Combine::sum, Combine::weighted_mean, Combine::disjoint_mean};

struct Stages {
  Select select;
  Rescale rescale;
  Elect elect;
  Vote vote;
  Combine combine;
};

// Where tensors lie and what they hold.
struct Tensors {
  DType base, tuned, out;
  bool based, uniform;  // uniform: every tuned tensor has `tuned`; else each its own
  Kind kind;
  Placement placement;
};

// A merge with the memory of its tensors and masks.
struct MergeCase {
  std::vector<Buffer> memory;
  SparseMerge merge;

  MergeCase(const Stages& stages, const Tensors& tensors, int64_t tasks, int64_t rows, int64_t row_length, Random& random) {
    merge.numel = rows * row_length;
    merge.row_length = merge.numel == 0 ? 0 : row_length;
    merge.select = stages.select;
    merge.rescale = stages.rescale;
    merge.elect = stages.elect;
    merge.vote = stages.vote;
    merge.combine = stages.combine;
    merge.consensus_k = static_cast<int>(random.below(tasks + 1));
    merge.zero_sign = random.below(2) == 0 ? 1 : -1;
    merge.statistics = random.below(3) > 0;
    merge.scale = random.below(4) == 0 ? 0.3 : 1.0;
    merge.seed = random.next();
    merge.out_dtype = tensors.out;
    merge.base_dtype = tensors.base;
    if (tensors.based) merge.base = keep(values(tensors.base, merge.numel, tensors.kind, tensors.placement, random));
    for (int64_t t = 0; t < tasks; ++t) merge.tasks.push_back(task(tensors, random));
  }

  const char* keep(Buffer buffer) {
    memory.push_back(std::move(buffer));
    return memory.back().data();
  }

  MergeTask task(const Tensors& tensors, Random& random) {
    MergeTask made;
    made.dtype = tensors.uniform ? tensors.tuned : random.pick(dtypes);
    made.tuned = keep(values(made.dtype, merge.numel, tensors.kind, tensors.placement, random));
    made.weight = random.below(6) == 0 ? 0 : 2 * random.share() - 0.5;
    const int64_t length = merge.by_row() ? merge.row_length : merge.numel;
    made.rank_begin = random.below(3) > 0 ? 0 : random.below(length + 1);
    made.rank_end = random.below(4) == 0 ? length : made.rank_begin + random.below(length - made.rank_begin + 1);
    constexpr int64_t spreads[] = {0, 1, 3};
    if (merge.select == Select::mask) {
      made.mask = reinterpret_cast<const uint8_t*>(keep(packed_mask(merge.numel, random.pick(spreads), tensors.placement, random)));
    }
    constexpr double densities[] = {0, 1, 0.5, 0.1, 0.9999999999};
    made.density = random.pick(densities);
    made.epsilon = merge.select == Select::rank_dropout && random.below(3) > 0 ? std::min(made.density, 1 - made.density) / 2 : 0;
    made.key = random.next();
    made.tall_mask_lambda = random.share();
    return made;
  }
};

bool same_statistics(const MergeStatistics& a, const MergeStatistics& b) {
  // Sums that hold a NaN hold one at every level.
  auto equal = [](double x, double y) { return x == y || (x != x && y != y); };
  return a.kept == b.kept && a.conflicts == b.conflicts && a.nonfinite == b.nonfinite &&
         std::equal(a.dots.begin(), a.dots.end(), b.dots.begin(), b.dots.end(), equal);
}

struct Written {
  char* data;
  int64_t bytes;
};

void write_chunk(void* context, int64_t offset, const void* chunk, int64_t bytes) {
  const auto* written = static_cast<const Written*>(context);
  EXPECT(offset >= 0 && bytes >= 0 && offset + bytes <= written->bytes);
  std::memcpy(written->data + offset, chunk, static_cast<size_t>(bytes));
}

// The passes before the merge and the merge itself at every level: alone into memory, by the team chunk by chunk.
std::vector<char> merge_everywhere(const SparseMerge& merge, Placement placement) {
  MergeStatistics first;
  int64_t first_sum = 0;
  bool again = false;
  return agree(merge.out_dtype, merge.numel, placement, [&](char* out) {
    for (const bool together : {false, true}) {
      const ParallelFor parallel = together ? team() : serial();
      SparseMerge ready = merge;
      if (ready.select == Select::magnitude) find_magnitude_cuts(&ready, parallel);
      set_rescale_factors(&ready, parallel);
      const int64_t sum = ready.elect == Elect::none ? 0 : elected_sign_sum(ready, parallel);
      if (together) drop_records(&ready);
      Written written{out, merge.numel * element_size(merge.out_dtype)};
      MergeOutput output;
      if (together) {
        output.write = write_chunk;
        output.context = &written;
      } else {
        output.data = out;
      }
      const std::vector<char> alone(out, out + written.bytes);
      const MergeStatistics statistics = sparse_merge(ready, output, parallel);
      if (again) EXPECT(same_statistics(first, statistics) && first_sum == sum);
      if (together && merge.numel > 0) EXPECT(same_values(merge.out_dtype, alone.data(), out, merge.numel));
      first = statistics;
      first_sum = sum;
      again = true;
    }
  });
}

// The loop itself on part of the tensor, with no byte more than it asks for.
void loop_alone(SparseMerge merge, Placement placement, Random& random) {
  if (merge.select == Select::magnitude) find_magnitude_cuts(&merge, serial());
  set_rescale_factors(&merge, serial());
  const int64_t tasks = static_cast<int64_t>(merge.tasks.size());
  const MergeView view{merge.base,         merge.base_dtype,
                       merge.out_dtype,    merge.by_row() ? merge.row_length : 0,
                       merge.tasks.data(), static_cast<int>(tasks),
                       merge.select,       merge.rescale,
                       merge.elect,        merge.zero_sign,
                       merge.vote,         merge.consensus_k,
                       merge.combine,      merge.scale,
                       merge.seed,         merge.statistics,
                       tasks <= 8 ? 1 : 2};
  const int64_t rows = merge.by_row() && merge.numel > 0 ? merge.numel / merge.row_length : 0;
  const int64_t begin = merge.by_row() ? random.below(rows + 1) * merge.row_length : std::min<int64_t>(merge.numel, 512 * random.below(2));
  const int64_t n = merge.numel - begin;
  // Masks and records are read from whole bytes on, so a chunk begins at one.
  if (begin % 8 != 0) return;
  const bool wide = merge.wide();
  agree(merge.out_dtype, n, placement, [&](char* out) {
    const Buffer kept(8 * tasks, Placement::page), dots(merge.statistics ? 4 * tasks * (tasks + 1) : 0, Placement::page);
    const Buffer before(8 * tasks, Placement::page), after(8 * tasks, Placement::page);
    for (const Buffer* sums : {&kept, &dots, &before, &after}) sums->fill(0);
    ChunkStatistics statistics{reinterpret_cast<int64_t*>(kept.data()),
                               reinterpret_cast<double*>(dots.data()),
                               reinterpret_cast<double*>(before.data()),
                               reinterpret_cast<double*>(after.data()),
                               0,
                               0,
                               0};
    const Buffer scratch(sparse_merge_loops().scratch_bytes(wide, view), Placement::page);
    scratch.fill(0xff);
    sparse_merge_loops().chunk(wide, MergePass::merge, view, begin, n, scratch.data(), out, &statistics);
  });
}

void merge_case(const Stages& stages, const Tensors& tensors, int64_t tasks, int64_t rows, int64_t row_length, Random& random) {
  begin_case(
      "sparse_merge select=%d rescale=%d elect=%d vote=%d combine=%d tasks=%ld %ldx%ld base=%s%s tuned=%s%s out=%s kind=%d placement=%d",
      static_cast<int>(stages.select), static_cast<int>(stages.rescale), static_cast<int>(stages.elect), static_cast<int>(stages.vote),
      static_cast<int>(stages.combine), tasks, rows, row_length, tensors.based ? "" : "none, ", dtype_name(tensors.base),
      dtype_name(tensors.tuned), tensors.uniform ? "" : " and others", dtype_name(tensors.out), static_cast<int>(tensors.kind),
      static_cast<int>(tensors.placement));
  const MergeCase made(stages, tensors, tasks, rows, row_length, random);
  merge_everywhere(made.merge, tensors.placement);
  loop_alone(made.merge, tensors.placement, random);
}

Tensors any_tensors(Random& random) {
  const DType dtype = random.pick(dtypes);
  // One storage type throughout goes other ways through the loops than a mix.
  if (random.below(2) == 0) return {dtype, dtype, dtype, random.below(4) > 0, true, random.pick(kinds), random.pick(placements)};
  return {random.pick(dtypes),  random.pick(dtypes), random.pick(dtypes),    random.below(4) > 0,
          random.below(2) == 0, random.pick(kinds),  random.pick(placements)};
}

void every_combination_of_stages(Random& random) {
  constexpr int64_t lengths[] = {1, 2, 7, 15, 16, 17, 63, 64, 65, 513};
  for (const Select select : selects) {
    for (const Rescale rescale : rescales) {
      for (const Elect elect : elects) {
        for (const Vote vote : votes) {
          for (const Combine combine : combines) {
            for (int64_t tasks = 1; tasks <= 9; ++tasks) {
              const Stages stages{select, rescale, elect, vote, combine};
              const int64_t length = random.pick(lengths), rows = random.below(length > 100 ? 3 : 12);
              merge_case(stages, any_tensors(random), tasks, rows, length, random);
            }
          }
        }
      }
    }
  }
}

Stages any_stages(Random& random) {
  return {random.pick(selects), random.pick(rescales), random.pick(elects), random.pick(votes), random.pick(combines)};
}

void every_mix_of_dtypes(Random& random) {
  for (const int64_t n : sizes()) {
    for (const DType base : dtypes) {
      for (const DType tuned : dtypes) {
        for (const DType out : dtypes) {
          const Tensors tensors{base, tuned, out, random.below(4) > 0, true, random.pick(kinds), random.pick(placements)};
          merge_case(any_stages(random), tensors, 1 + random.below(5), 1, n, random);
        }
      }
    }
  }
}

void borders_of_chunks(Random& random) {
  constexpr int64_t chunk = 1 << 17;
  for (const int64_t n : {chunk - 1, chunk, chunk + 1, 2 * chunk + 1}) {
    for (const Select select : selects) {
      Stages stages = any_stages(random);
      stages.select = select;
      merge_case(stages, any_tensors(random), 1 + random.below(3), 1, n, random);
      stages.rescale = Rescale::l1;
      merge_case(stages, any_tensors(random), 2, n / 1000 + 1, 1000, random);
    }
  }
  // Rows of one entry, and rows longer than a chunk.
  for (const Select select : {Select::row_magnitude, Select::rank_dropout}) {
    merge_case({select, Rescale::l1, Elect::sign_sum, Vote::none, Combine::sum}, any_tensors(random), 2, chunk + 3, 1, random);
    merge_case({select, Rescale::density, Elect::none, Vote::selected, Combine::sum}, any_tensors(random), 2, 2, chunk + 3, random);
  }
}

void interpolations(Random& random) {
  for (const int64_t n : sizes_and_chunks()) {
    for (const double t : {0.0, 0.3, 1.0}) {
      const Tensors tensors = {
          random.pick(dtypes),    random.pick(dtypes), random.pick(dtypes), true, true, n > 5000 ? Kind::plain : random.pick(kinds),
          random.pick(placements)};
      begin_case("slerp n=%ld t=%g base=%s tuned=%s out=%s kind=%d placement=%d", n, t, dtype_name(tensors.base), dtype_name(tensors.tuned),
                 dtype_name(tensors.out), static_cast<int>(tensors.kind), static_cast<int>(tensors.placement));
      const Stages stages{Select::all, Rescale::none, Elect::none, Vote::none, Combine::sum};
      const MergeCase made(stages, tensors, 1, 1, n, random);
      agree(tensors.out, n, tensors.placement, [&](char* out) {
        MergeOutput output;
        output.data = out;
        sparse_merge(slerp_merge(made.merge, t, team()), output, team());
      });
    }
  }
}

}  // namespace

void sparse_merges() {
  Random random(13);
  every_combination_of_stages(random);
  every_mix_of_dtypes(random);
}

void sparse_merge_chunks() {
  Random random(15);
  borders_of_chunks(random);
  interpolations(random);
}

}  // namespace taskloom::sanitize
