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
  m.def(
      "sparse_merge_statistics_out(Tensor? base, Tensor[] tuned, float[] weight, str select, bool by_row, SymInt[] rank_begin, SymInt[] "
      "rank_end, Tensor? threshold, Tensor? equal_kept, Tensor[] masks, float[] density, float[] epsilon, int seed, int key, str rescale, "
      "str elect, int zero_sign, str vote, int consensus_k, float[] tall_mask_lambda, str combine, float scale, Tensor(a!) out) -> (Tensor "
      "kept, Tensor conflicts, Tensor dots, Tensor nonfinite, Tensor sign_sum)");
  m.def("task_mask(Tensor base, Tensor tuned, Tensor multi_task_vector, float tall_mask_lambda) -> Tensor");
  m.def("multi_task_vector(Tensor base, Tensor[] tuned, float[] weight) -> Tensor");
  m.def("mask_count(Tensor[] packed, SymInt numel, int k) -> (Tensor, Tensor)");
  m.def("masked_compress(Tensor values, Tensor packed) -> Tensor");
  m.def("masked_restore(Tensor compressed, Tensor packed, Tensor base) -> Tensor");
  m.def("masked_update(Tensor target, Tensor mask, Tensor delta, float scale) -> Tensor");
  m.def("masked_update_(Tensor(a!) target, Tensor mask, Tensor delta, float scale) -> ()");
  m.def("masked_switch_(Tensor(a!) target, Tensor base, Tensor delta, Tensor old_packed, Tensor new_packed) -> ()");
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor[] active, float[] step, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize) -> ()");
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffer, Tensor[] active, float[] step, float lr, float "
      "momentum, float dampening, float weight_decay, bool nesterov, bool maximize) -> ()");
  m.def("weighted_ce(Tensor hidden, Tensor? weight, Tensor targets, Tensor weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "weighted_ce_backward(Tensor hidden, Tensor? weight, Tensor targets, Tensor coefficient, Tensor log_sum_exp, bool for_hidden, bool "
      "for_weight) -> (Tensor, Tensor)");
  m.def("block_scale_merge(Tensor[] base, Tensor[] deltas, Tensor coef, Tensor[] partition) -> Tensor[]");
  m.def("block_scale_merge_backward(Tensor[] gradients, Tensor[] deltas, Tensor[] partition, int groups) -> Tensor");

  // lowrank
  m.def(
      "kernel_quantile(Tensor A, Tensor B, Tensor coef, Tensor? alpha, Tensor? gamma, Tensor? beta, str kernel, float sparsity, str gate) "
      "-> Tensor");
  m.def(
      "kernel_merge(Tensor A, Tensor B, Tensor coef, Tensor? alpha, Tensor? gamma, Tensor? beta, Tensor? base, str kernel, float sparsity, "
      "str gate) -> (Tensor, Tensor, Tensor)");
  m.def(
      "kernel_merge_out(Tensor A, Tensor B, Tensor coef, Tensor? alpha, Tensor? gamma, Tensor? beta, Tensor? base, str kernel, float "
      "sparsity, str gate, Tensor(a!) out) -> ()");
  m.def(
      "kernel_merge_backward(Tensor gradient, Tensor A, Tensor B, Tensor coef, Tensor? alpha, Tensor? gamma, Tensor? beta, Tensor "
      "threshold, Tensor row_stats, str kernel, str gate) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "kernel_linear(Tensor x, Tensor A, Tensor B, Tensor coef, Tensor? alpha, Tensor? gamma, Tensor? beta, Tensor? base, Tensor? bias, "
      "str kernel, float sparsity, str gate) -> (Tensor, Tensor, Tensor)");
  m.def(
      "kernel_linear_backward(Tensor gradient, Tensor x, Tensor A, Tensor B, Tensor coef, Tensor? alpha, Tensor? gamma, Tensor? beta, "
      "Tensor? base, Tensor threshold, Tensor row_stats, str kernel, str gate, bool for_x, bool for_base, bool for_factors) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("lowrank_merge(Tensor base, Tensor[] A, Tensor[] B, Tensor weight, Tensor? row_scale) -> Tensor");
  m.def("lowrank_merge_(Tensor(a!) target, Tensor? base, Tensor[] A, Tensor[] B, Tensor weight, Tensor? row_scale) -> ()");
  m.def(
      "lowrank_merge_backward(Tensor gradient, Tensor? base, Tensor[] A, Tensor[] B, Tensor weight, Tensor? row_scale, bool[] needed) -> "
      "Tensor[]");
  m.def("lowrank_merge_tasks(Tensor base, Tensor A, Tensor B, Tensor weight) -> Tensor");
  m.def("lowrank_norm(Tensor base, Tensor[] A, Tensor[] B, Tensor weight) -> Tensor");
  m.def("lowrank_apply(Tensor x, Tensor A, Tensor B, Tensor weight, Tensor? task, Tensor? start) -> Tensor");
  m.def("lowrank_apply_backward(Tensor gradient, Tensor x, Tensor A, Tensor B, Tensor weight, Tensor? task, bool[] needed) -> Tensor[]");
  m.def("rmm_fit(Tensor vectors, int rank, bool center) -> (Tensor, Tensor, Tensor)");
  m.def("rmm_reconstruct(Tensor mean, Tensor basis, Tensor coefficients) -> Tensor");
  m.def(
      "rmm_linear(Tensor x, Tensor task, Tensor mean_a, Tensor basis_a, Tensor coef_a, Tensor mean_b, Tensor basis_b, Tensor coef_b) -> "
      "Tensor");

  // routed
  m.def(
      "window_linear(Tensor x, Tensor weight, Tensor? bias, Tensor start, SymInt width, Tensor? widths, Tensor? out_start, SymInt "
      "out_width, Tensor? out_widths) -> Tensor");
  m.def(
      "window_linear_backward(Tensor gradient, Tensor x, Tensor weight, Tensor start, SymInt width, Tensor? widths, Tensor? out_start, "
      "SymInt out_width, Tensor? out_widths, bool[] needed) -> Tensor[]");
  m.def(
      "window_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor start, SymInt width, Tensor? widths, Tensor? out_start, SymInt "
      "out_width, Tensor? out_widths, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor");
  m.def(
      "window_conv2d_backward(Tensor gradient, Tensor x, Tensor weight, Tensor start, SymInt width, Tensor? widths, Tensor? out_start, "
      "SymInt out_width, Tensor? out_widths, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool[] needed) -> Tensor[]");
  m.def("prefix_linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features) -> Tensor");
  m.def("prefix_linear_backward(Tensor gradient, Tensor x, Tensor weight, Tensor? bias, bool[] needed) -> Tensor[]");
  m.def(
      "prefix_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt out_channels, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "SymInt groups) -> Tensor");
  m.def(
      "prefix_conv2d_backward(Tensor gradient, Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] "
      "dilation, SymInt groups, bool[] needed) -> Tensor[]");
  m.def(
      "ragged_prefix_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor in_channels, Tensor out_channels, SymInt[] stride, SymInt[] "
      "padding, SymInt[] dilation, bool zero_tail) -> Tensor");
  m.def(
      "ragged_prefix_conv2d_backward(Tensor gradient, Tensor x, Tensor weight, Tensor? bias, Tensor in_channels, Tensor out_channels, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool[] needed) -> Tensor[]");
  m.def(
      "prefix_norm(Tensor x, Tensor? weight, Tensor? bias, str kind, SymInt groups, Tensor? running_mean, Tensor? running_var, float eps, "
      "bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "prefix_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, str kind, bool running, "
      "float eps, bool relu, bool[] needed) -> Tensor[]");
  m.def(
      "window_layer_norm(Tensor x, Tensor? shift, Tensor? scale, Tensor start, SymInt width, Tensor? widths, float eps, bool outside) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "window_layer_norm_backward(Tensor gradient, Tensor x, Tensor? shift, Tensor? scale, Tensor start, SymInt width, Tensor? widths, "
      "Tensor mean, Tensor rstd, Tensor? for_mean, Tensor? for_rstd, bool outside, bool for_x, bool for_modulation) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "window_group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, int groups, Tensor start, SymInt width, Tensor? widths, float eps, "
      "bool outside) -> (Tensor, Tensor, Tensor)");
  m.def(
      "window_group_norm_silu_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, int groups, Tensor start, SymInt width, "
      "Tensor? widths, Tensor mean, Tensor rstd, Tensor? for_mean, Tensor? for_rstd, bool outside, bool for_x, bool for_affine) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("channel_scale(Tensor x, Tensor scale, Tensor? bias, Tensor? start, SymInt width, Tensor? widths, str activation) -> Tensor");
  m.def(
      "channel_scale_backward(Tensor gradient, Tensor x, Tensor scale, Tensor? bias, Tensor? start, SymInt width, Tensor? widths, str "
      "activation, bool for_x, bool for_scale, bool for_bias) -> (Tensor, Tensor, Tensor)");

  // gating
  m.def(
      "multi_gate_combine(Tensor logits, Tensor z, Tensor? mask, str activation, Tensor? self_logits, Tensor? self_mask) -> (Tensor, "
      "Tensor)");
  m.def(
      "multi_gate_combine_backward(Tensor gradient, Tensor? for_probs, Tensor logits, Tensor z, Tensor? mask, str activation, Tensor? "
      "self_logits, Tensor? self_mask, bool for_logits, bool for_z, bool for_self) -> (Tensor, Tensor, Tensor)");
  m.def("stream_softmax_mix(Tensor x, Tensor y, Tensor experts, float sigma) -> (Tensor, Tensor)");
  m.def(
      "stream_softmax_mix_backward(Tensor? for_pred, Tensor? for_lse, Tensor x, Tensor y, Tensor experts, Tensor pred, Tensor lse, float "
      "sigma, bool for_x, bool for_y, bool for_experts) -> (Tensor, Tensor, Tensor)");
  m.def("lora_feature_gate(Tensor x, Tensor down, Tensor up, Tensor weight) -> (Tensor, Tensor)");
  m.def(
      "lora_feature_gate_backward(Tensor gradient, Tensor x, Tensor down, Tensor up, Tensor weight, Tensor inner, bool for_x, bool "
      "for_down, bool for_up, bool for_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_silu(Tensor z, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, float eps, str activation) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_silu_backward(Tensor gradient, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool running, float eps, "
      "str activation, bool for_z, bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "topk_gate(Tensor logits, Tensor? bias, SymInt k, str score, SymInt n_group, SymInt topk_group, str group_score, float group_mask, "
      "bool renormalize, float scale, float eps, float temperature, bool long_ids, bool statistics) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "topk_gate_backward(Tensor logits, Tensor ids, Tensor weight, Tensor? dweight, Tensor? dprob_sum, Tensor? dlse, str score, bool "
      "renormalize, float scale, float eps, float temperature) -> Tensor");
  m.def("expert_sort(Tensor ids, SymInt num_experts, int block) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("expert_combine(Tensor y, Tensor weight, Tensor inverse) -> Tensor");
  m.def(
      "expert_combine_backward(Tensor gradient, Tensor y, Tensor weight, Tensor inverse, bool for_y, bool for_weight) -> (Tensor, Tensor)");
  m.def("manifold_loss(Tensor r, Tensor reference, Tensor ids, Tensor weight) -> Tensor");
  m.def("manifold_loss_backward(Tensor gradient, Tensor r, Tensor reference, Tensor ids, Tensor weight) -> Tensor");
}
