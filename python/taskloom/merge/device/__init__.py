"""Merges on a GPU: the executor's work done by the ops, with reading, copying, merging and writing overlapped.

Nothing here is imported by a merge on the CPU, and only :mod:`~taskloom.merge.device.account` does without torch.
"""
