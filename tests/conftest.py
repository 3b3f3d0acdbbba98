import os
import signal
import threading

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # timings on shared machines are noise
    derandomize=True,  # the same commit gives the same result
    max_examples=int(os.environ.get("ILVAE_FAST_EXAMPLES", "40")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")

# A shell lets what it starts in the background ignore Ctrl-C, and processes inherit that. Tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores, where threads of several pools would only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
