"""Runs one call in a process of its own, under AddressSanitizer: process.py CALL RESULT, both pickled."""

import ctypes
import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import executor

library, entry, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
# fresh allocations of exactly their size, so that what lies beyond them is known to be nobody's
arguments = [np.array(a, copy=True, order="C") if isinstance(a, np.ndarray) else a for a in arguments]
result, findings = executor.call(ctypes.CDLL(library), entry, arguments)
Path(sys.argv[2]).write_bytes(pickle.dumps((result, findings, arguments)))
