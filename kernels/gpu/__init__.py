"""The operator on a GPU: Triton kernels, the choice of their tiles, and compiling them offline."""
