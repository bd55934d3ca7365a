"""The operator on a GPU: Triton kernels, the tiles they are cut into, and what is compiled of them."""
