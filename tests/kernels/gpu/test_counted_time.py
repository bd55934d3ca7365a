"""Predictions of times from the counts of the emulator, against kernels that were measured on an H200."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from fit_counted_time import Costs, Counts, fit_all, predict, predict_unseen, read_counts


@pytest.mark.parametrize("groups", ["sites", "names"])
def test_half_of_the_kernels_of_an_unseen_kind_are_predicted_within_a_fifth(groups):
    measured = read_counts()
    errors = np.abs(predict_unseen(measured, getattr(measured, groups)) - 1)
    assert np.median(errors) < 0.2


def test_the_slowest_unit_and_few_warps_take_time():
    counts = Counts(np.array(100.0), np.array(50.0), np.array(20.0), np.array(16.0))
    time = predict(fit_all(), counts)
    for change in ({"issue": 110.0}, {"load_store": 60.0}, {"copy": 30.0}, {"warps": 8.0}):
        assert predict(fit_all(), counts._replace(**change)) > time
    assert predict(Costs(1, 1, 1, 0), Counts(3.0, 0.0, 4.0, 16.0)) == pytest.approx(5 + 1.5)
