"""The gating family in plain torch: the definition of each op."""
