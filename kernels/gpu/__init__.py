"""The operator on a GPU: Triton kernels, the choice of their tiles, and their compiled code."""
