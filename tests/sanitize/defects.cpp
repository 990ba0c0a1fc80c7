// What the sanitizers must report: wrong calls of the loops, so that a report shows that the loops' own objects are watched.
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "groups.h"
#include "masked/mask_count.h"
#include "masked/packed_mask.h"
#include "masked/sparse_merge.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

// One byte behind a heap block is read.
void read_beyond() {
  const Buffer mask(64, Placement::heap), packed(16, Placement::heap);
  mask.fill(1);
  packed_mask_loops().pack(mask.u8(), 65, packed.u8());
}

// One entry behind a page is read, at the v4 level by a masked vector instruction.
void read_beyond_page() {
  const Buffer tuned(2 * 100, Placement::page), out(2 * 101, Placement::page);
  tuned.fill(0);
  SparseMerge merge;
  merge.numel = 101;
  merge.out_dtype = DType::bf16;
  merge.tasks.resize(1);
  merge.tasks[0].tuned = tuned.data();
  merge.tasks[0].dtype = DType::bf16;
  MergeOutput output;
  output.data = out.data();
  sparse_merge(merge, output, serial());
}

// A loop's counts lie at an odd address.
void misaligned() {
  const Buffer mask(1, Placement::heap), packed(1, Placement::heap), histogram(16, Placement::odd);
  mask.fill(1);
  histogram.fill(0);
  const uint8_t* masks[] = {mask.u8()};
  mask_count_loops().count(masks, 1, 1, 0, 8, packed.u8(), reinterpret_cast<int64_t*>(histogram.data()));
}

void leak() {
  char* volatile lost = new char[100];
  lost[0] = 1;
  lost = nullptr;
}

// Several threads pack into the same bytes.
void race() {
  constexpr int64_t n = 8 << 10;
  const Buffer mask(n, Placement::heap), packed(n / 8, Placement::heap);
  mask.fill(1);
  ThreadPool pool(4, {});
  pool.parallel()(10000, [&](int64_t) { packed_mask_loops().pack(mask.u8(), n, packed.u8()); });
}

}  // namespace

void seeded_defect(const char* name) {
  const std::string wanted(name);
  begin_case("defect %s", name);
  if (wanted == "read_beyond") return read_beyond();
  if (wanted == "read_beyond_page") return read_beyond_page();
  if (wanted == "misaligned") return misaligned();
  if (wanted == "leak") return leak();
  if (wanted == "race") return race();
  throw std::invalid_argument("unknown defect '" + wanted + "'");
}

}  // namespace taskloom::sanitize
