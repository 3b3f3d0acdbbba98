"""Fused input-convex networks, their gradient maps, and inverse-Lipschitz VAEs."""

from . import annealing as annealing
from . import convert as convert
from . import data as data
from . import functional as functional
from . import metrics as metrics
from . import reference as reference
from . import vae as vae
from ._backend import build_info as build_info
from ._backend import plan as plan
from ._backend import use_backend as use_backend
from ._version import __version__ as __version__
from .activations import Activation as Activation
from .advice import Advice as Advice
from .advice import advise as advise
from .decoder import BrenierDecoder as BrenierDecoder
from .layers import BrenierMap as BrenierMap
from .layers import Trained as Trained
from .nonneg import NonNegative as NonNegative
