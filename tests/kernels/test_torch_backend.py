"""The operator in plain PyTorch, at random sizes."""

import pytest
from hypothesis import given, settings
from operator_calls import assert_call_matches_definition, drawn_calls

pytestmark = pytest.mark.usefixtures("poisoned_memory", "threads_restored")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(drawn_calls())
def test_matches_the_definition(call):
    assert_call_matches_definition("torch", call)
