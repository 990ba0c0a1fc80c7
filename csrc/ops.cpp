// Every op's schema: the table of contents of the compiled side. Implementations are registered in csrc/FAMILY/NAME_ops.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(taskloom, m) {
  // masked
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor packed, SymInt[] shape) -> Tensor");
  m.def("magnitude_threshold(Tensor[] tuned, Tensor[] base, SymInt[] rank, bool by_row) -> (Tensor, Tensor)");
  m.def("magnitude_histogram(Tensor tuned, Tensor? base, int shift, int prefix, bool wide) -> Tensor");
  m.def(
      "magnitude_mask(Tensor tuned, Tensor? base, SymInt rank_begin, SymInt rank_end, bool by_row, Tensor? threshold, Tensor? equal_kept, "
      "bool packed) -> Tensor");
  m.def(
      "sparse_merge(Tensor? base, Tensor[] tuned, float[] weight, str select, bool by_row, SymInt[] rank_begin, SymInt[] rank_end, Tensor? "
      "threshold, Tensor? equal_kept, Tensor[] masks, float[] density, float[] epsilon, int seed, int key, str rescale, str elect, int "
      "zero_sign, str vote, int consensus_k, float[] tall_mask_lambda, str combine, float scale, *, ScalarType dtype) -> Tensor");
  m.def(
      "sparse_merge_out(Tensor? base, Tensor[] tuned, float[] weight, str select, bool by_row, SymInt[] rank_begin, SymInt[] rank_end, "
      "Tensor? threshold, Tensor? equal_kept, Tensor[] masks, float[] density, float[] epsilon, int seed, int key, str rescale, str elect, "
      "int zero_sign, str vote, int consensus_k, float[] tall_mask_lambda, str combine, float scale, Tensor(a!) out) -> ()");
}
