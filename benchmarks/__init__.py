"""Benchmarks of fused networks; not part of the installed package. Run from the root of a checkout."""
