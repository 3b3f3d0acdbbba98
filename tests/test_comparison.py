"""The assertion helpers catch an error of the size they claim to catch."""

import pytest
import torch

from comparison import (
    assert_as_accurate_as_eager,
    assert_equal_to_rounding,
    inverse_lipschitz_violation,
    monotonicity_violation,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule_catches_three_times_eager(dtype):
    reference = torch.randn(100, dtype=torch.float64)
    step = 100 * torch.finfo(dtype).eps  # well above the floor
    eager = (reference + step).to(dtype)
    assert_as_accurate_as_eager("twice", (reference + 1.8 * step).to(dtype), eager, reference)
    with pytest.raises(AssertionError, match="thrice"):
        assert_as_accurate_as_eager("thrice", (reference + 3 * step).to(dtype), eager, reference)


def test_error_rule_catches_an_error_above_the_floor():
    reference = torch.ones(5, dtype=torch.float64)
    eager = reference.float()
    eps = torch.finfo(torch.float32).eps
    assert_as_accurate_as_eager("below", eager + 7 * eps, eager, reference)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager("above", eager + 10 * eps, eager, reference)
    assert_as_accurate_as_eager("sum of terms", eager + 10 * eps, eager, reference, absolute_terms=2 * reference)
    assert_as_accurate_as_eager("coarser operands", eager + 15 * eps, eager, reference, eps=2 * eps)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager("above those too", eager + 20 * eps, eager, reference, eps=2 * eps)


def test_error_rule_catches_one_wrong_element_shape_and_dtype():
    reference = torch.randn(4, 3, dtype=torch.float64)
    ours = reference.float()
    ours[2, 1] += 1e-3
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager("one element", ours, reference.float(), reference)
    with pytest.raises(AssertionError, match="reference"):
        assert_as_accurate_as_eager("shape", reference.float()[:3], reference.float(), reference)
    with pytest.raises(AssertionError, match="float64"):
        assert_as_accurate_as_eager("dtype", reference, reference.float(), reference)


def test_error_rule_catches_nan():
    reference = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager("nan", torch.tensor([1.0, torch.nan, 1.0]), reference.float(), reference)


def test_rounding_catches_1e_11():
    reference = torch.ones(7, dtype=torch.float64)
    assert_equal_to_rounding("fine", reference + 1e-15, reference)
    with pytest.raises(AssertionError):
        assert_equal_to_rounding("planted", reference + 1e-11, reference)


def test_violations_are_positive_for_a_map_that_contracts_too_much():
    x, y = torch.randn(2, 50, 3, dtype=torch.float64)
    assert (inverse_lipschitz_violation(x, y, 0.5 * x, 0.5 * y, 0.5) <= 1e-12).all()
    assert (inverse_lipschitz_violation(x, y, 0.49 * x, 0.49 * y, 0.5) > 0).all()
    assert (monotonicity_violation(x, y, 0.5 * x, 0.5 * y, 0.5) <= 1e-12).all()
    assert (monotonicity_violation(x, y, -0.5 * x, -0.5 * y, 0.5) > 0).all()
