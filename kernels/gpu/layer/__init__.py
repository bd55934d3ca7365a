"""The layer around the operator: encoder, norm and gradients of the parameters, in inference and in training."""
