"""The operator on a CPU: a C++ kernel compiled at first use, and PyTorch code where there is no compiler."""
