"""The operator on a CPU: a C++ kernel compiled at first use."""
