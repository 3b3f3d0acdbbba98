"""Measures of fit and of posterior collapse, over data that streams by in batches; no measure keeps a graph.

Arguments common to all functions:

- ``model``: a :class:`ilvae_fast.vae.VAE`, a model from elsewhere by :func:`adapt`, or any object with those of the
  parts that the function names
- ``data``: (N, D), or an iterable of batches (n, D), where a tuple or list stands for its first entry; on the model's
  device and in its dtype. For an adapted model (N, ...), as its encoder takes them
- ``batch_size``: how many data of a tensor go at once
- ``generator``: of the samples; by default torch's own
- ``reduce``: for data that are spread over processes: sums a float64 tensor over all of them (of each call's result
  every process has the same then), such as ``lambda t: accelerator.reduce(t, "sum")``

Units are nats. Errors name the argument: ValueError for data without a datum, TypeError.
"""

from .adapted import adapt as adapt
from .advice import Advice as Advice
from .advice import advise as advise
from .batches import Data as Data
from .batches import Reduce as Reduce
from .clustering import clustering_accuracy as clustering_accuracy
from .clustering import clustering_majority as clustering_majority
from .collapse import ActiveDirections as ActiveDirections
from .collapse import ActiveUnits as ActiveUnits
from .collapse import EpsilonCollapse as EpsilonCollapse
from .collapse import KLDivergence as KLDivergence
from .collapse import active_directions as active_directions
from .collapse import active_units as active_units
from .collapse import diagnose as diagnose
from .collapse import epsilon_collapse as epsilon_collapse
from .collapse import kl_divergence as kl_divergence
from .collapse import mutual_information as mutual_information
from .fit import elbo as elbo
from .fit import gain as gain
from .fit import negative_log_likelihood as negative_log_likelihood
from .fit import nll_without_latent as nll_without_latent
from .jacobian import InverseLipschitz as InverseLipschitz
from .jacobian import RelativeFisher as RelativeFisher
from .jacobian import certified_constant as certified_constant
from .jacobian import decoder_given as decoder_given
from .jacobian import decoder_jacobian as decoder_jacobian
from .jacobian import inverse_lipschitz as inverse_lipschitz
from .jacobian import relative_fisher as relative_fisher
