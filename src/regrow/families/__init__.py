"""One declarative spec per architecture family."""

from regrow.families.config import causal_lm_name, pruned_config
from regrow.families.conformity import Faults, canonical_name, find_faults, require_whole
from regrow.families.count import count_by_part, count_parameters
from regrow.families.family import Family, MlpSpec
from regrow.families.layout import expected_tensors, head_name, part_of, text_prefix
from regrow.families.registry import FAMILIES, find_family
from regrow.families.sites import main_kinds, mlp_sites, site_tensors, width_key

__all__ = [
    "FAMILIES",
    "Family",
    "Faults",
    "MlpSpec",
    "canonical_name",
    "causal_lm_name",
    "count_by_part",
    "count_parameters",
    "expected_tensors",
    "find_family",
    "find_faults",
    "head_name",
    "main_kinds",
    "mlp_sites",
    "part_of",
    "pruned_config",
    "require_whole",
    "site_tensors",
    "text_prefix",
    "width_key",
]
