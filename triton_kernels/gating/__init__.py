"""Launchers of the gating family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""
