"""Brenier maps and decoders as modules, with what their weights and constants are made from."""

from .brenier_decoder import BrenierDecoder as BrenierDecoder
from .brenier_map import BrenierMap as BrenierMap
from .constant import Trained as Trained
from .nonneg import NonNegative as NonNegative
