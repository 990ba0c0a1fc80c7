"""Triton kernels, one package per family, one module per op. Importing this package does not import Triton; its sub-packages do."""
