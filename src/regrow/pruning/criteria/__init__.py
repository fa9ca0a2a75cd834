"""Channel scores: one pure file each, and the table of them."""

from regrow.errors import UserError
from regrow.pruning.criteria.activation import ACTIVATION
from regrow.pruning.criteria.channels import Channels, Criterion, Need
from regrow.pruning.criteria.fisher import FISHER
from regrow.pruning.criteria.flap import FLAP
from regrow.pruning.criteria.l2 import L2
from regrow.pruning.criteria.magnitude import MAGNITUDE
from regrow.pruning.criteria.obs import OBS
from regrow.pruning.criteria.obs_fisher import OBS_FISHER
from regrow.pruning.criteria.random import RANDOM
from regrow.pruning.criteria.wanda import WANDA

CRITERIA: dict[str, Criterion] = {
    "random": RANDOM,
    "magnitude": MAGNITUDE,
    "wanda": WANDA,
    "l2": L2,
    "activation": ACTIVATION,
    "flap": FLAP,
    "fisher": FISHER,
    "obs": OBS,
    "obs_fisher": OBS_FISHER,
}

__all__ = ["CRITERIA", "Channels", "Criterion", "Need", "find_criterion"]


def find_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in CRITERIA:
        raise UserError(f"There is no criterion {name!r}; choose one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]
