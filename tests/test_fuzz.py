"""A bounded part of ``python -m tests.fuzz``, with inputs from hypothesis, which makes what it finds smaller; and what
the long run found, mended, each by its own test beside the code."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz
from fuzz import files, functions, operators

pytestmark = pytest.mark.filterwarnings("ignore")
quick = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@quick
@given(st.randoms(use_true_random=False))
def test_operators_compute_or_refuse(source):
    torch.manual_seed(0)
    operators.one(source)


@quick
@given(st.randoms(use_true_random=False))
def test_functions_and_layers_compute_or_refuse(source):
    functions.one(source)


@pytest.mark.parametrize("kind", sorted(files.KINDS))
def test_readers_read_or_name_what_is_wrong(kind):
    for number in range(60):
        files.one(fuzz.numbered("pytest", number), kind)
