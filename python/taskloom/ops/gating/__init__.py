"""The gating family: gates that weigh experts, and what moves rows to experts and back."""
