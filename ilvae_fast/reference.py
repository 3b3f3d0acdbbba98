"""The functions of :mod:`ilvae_fast.functional` by plain autograd: the yardstick of every test."""

from .operators.reference import brenier_map as brenier_map
from .operators.reference import convex_network as convex_network
from .operators.reference import embed as embed
from .operators.reference import potential as potential
from .operators.reference import potential_and_map as potential_and_map
