"""The operator as products with banded matrices, and the launches that prepare their features and weights."""
