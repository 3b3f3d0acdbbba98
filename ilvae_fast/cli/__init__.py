"""The command line ``ilvae-fast``."""

from .commands import app as app
from .commands import main as main
from .display import COLUMNS as COLUMNS
