// The groups of cases, one for each part of the C++ that they go through.
#pragma once

namespace taskloom::sanitize {

void packed_masks();
void mask_counts();
void masked_updates();
void masked_switches();
void masked_compressions();
void task_masks();
void block_scales();
void logit_tiles();
void kernel_merges();
void kernel_ranks();
void lowrank_merges();
void rmm_fits();
void gates();
void window_convolutions();
void window_layer_norms();
void window_group_norms();
void channel_scales();
void run_sums();
void expert_sorts();
void expert_rows();
void magnitude_loops();
void magnitude_drivers();
void magnitude_masks();
void sparse_merges();
void sparse_merge_chunks();
void conversions();
void philox();
void thread_pools();
void merges();

// Carries out what the sanitizers must report; returns where they do not.
void seeded_defect(const char* name);

}  // namespace taskloom::sanitize
