"""The operator on a GPU: Triton kernels, the choice of their tiles, and their compiled code.

backend.py is what the dispatcher calls, operator_launches.py says which kernels run for given tensors, and launch.py starts them. The
kernels are in banded/ and sums/, what they share in common/, the choice of tiles in tiles/, and the layer around the operator in layer/.
"""
