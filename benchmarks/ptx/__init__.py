"""Runs compiled kernels without a GPU: the PTX that Triton emits, on numpy, for all threads at once.

Triton's interpreter runs a kernel's source. What lies between the source and the machine (pipelining, layouts, the
hardware's matrix instructions, asynchronous copies and their barriers) is seen only in the compiled code, and this
runs that code. Asynchronous copies and matrix instructions land either at once or as late as the program allows (boxes
that are stored, late where loads land at once); a program that waits for what it reads gives the same result both ways.
Reads and writes outside of the tensors, reads of shared memory that were not fenced for the asynchronous proxy, and
barriers that not all threads reach are faults.

Source of the semantics: NVIDIA's PTX ISA, version 8.7.
"""
