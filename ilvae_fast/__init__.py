"""Fused input-convex networks, their gradient maps, and inverse-Lipschitz VAEs."""

from . import annealing as annealing
from . import convert as convert
from . import data as data
from . import export as export
from . import functional as functional
from . import metrics as metrics
from . import reference as reference
from . import vae as vae
from ._version import __version__ as __version__
from .layers import BrenierDecoder as BrenierDecoder
from .layers import BrenierMap as BrenierMap
from .layers import NonNegative as NonNegative
from .layers import Trained as Trained
from .metrics import Advice as Advice
from .metrics import advise as advise
from .operators.activations import Activation as Activation
from .operators.backend import use_backend as use_backend
from .operators.extension import build_info as build_info
from .operators.plan import plan as plan
