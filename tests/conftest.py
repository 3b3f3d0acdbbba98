import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # timings on shared machines are noise
    derandomize=True,  # CI tells the truth about a commit, not about luck
    max_examples=int(os.environ.get("ILVAE_FAST_EXAMPLES", "40")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(
        1
    )  # workers share the cores; pools of threads that spin on them would stand in each other's way


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
