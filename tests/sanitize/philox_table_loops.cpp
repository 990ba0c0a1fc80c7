// Philox words as a table of loops, so that each CPU level's copy can be called by itself.
#include "common/philox_words.h"
#include "philox_table.h"

namespace taskloom {
namespace {

void words(uint64_t seed, uint64_t tensor_key, int64_t begin, int64_t n, uint32_t* out) { philox_words(seed, tensor_key, begin, n, out); }

const PhiloxTable table = {words};

}  // namespace

TASKLOOM_EXPORT_LOOPS(PhiloxTable, philox_table_loops, table)

}  // namespace taskloom
