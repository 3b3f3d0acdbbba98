"""Training on one core or many devices, built on Hugging Face accelerate; nothing in the models needs it.

    config = TrainConfig(data="mnist", model="il-lidvae", L=1.0, epochs=2)
    measures = train(config)               # the command line's ilvae-fast train

``config.py`` what a run is; ``loop.py`` the loop; ``state.py`` what a checkpoint holds and how it is written;
``evaluation.py`` the measures of a trained model; ``sweep.py`` grids of runs;
``study.py`` grids of runs that a file describes, ``study_report.py`` their figures and tables; ``distributed.py``
FSDP2.
"""

from .config import TrainConfig as TrainConfig
from .config import advice_for as advice_for
from .config import build_model as build_model
from .config import load_dataset as load_dataset
from .distributed import gather_in_methods as gather_in_methods
from .distributed import shard as shard
from .evaluation import evaluate as evaluate
from .loop import Diverged as Diverged
from .loop import reproduce as reproduce
from .loop import train as train
from .study import Study as Study
from .study import run_study as run_study
from .sweep import sweep as sweep
