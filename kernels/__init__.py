"""Triton kernels and their launchers, one operation a file.

Import this as `fused_resblock.kernels`. Importing a submodule imports Triton; importing this package does not.
"""
