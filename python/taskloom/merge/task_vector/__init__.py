"""Task vectors: the differences between fine-tuned models and their base, with an algebra over them; needs torch."""

from taskloom.merge.task_vector.vector import TaskVector

__all__ = ["TaskVector"]
