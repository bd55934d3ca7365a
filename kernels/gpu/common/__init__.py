"""What all Triton kernels share: records of parameters, blocks of features, and the step from logits to weights."""
