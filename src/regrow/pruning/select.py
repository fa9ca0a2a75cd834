"""From scores to kept channels, and what is said about a width."""

import torch
from torch import Tensor

from regrow.errors import RunError, UserError
from regrow.pruning.alignment import alignment_notes


def check_width(width: int, step: int, model_width: int) -> list[str]:
    """Notes on a width, after refusing an impossible one.

    Raises:
        UserError: not a positive multiple of `step`, or above the model's width.
    """
    if step < 1 or width < 1 or width % step:
        raise UserError(f"Width {width} is no positive multiple of the step {step}; change one of them.")
    if width > model_width:
        raise UserError(
            f"Width {width} is above the model's intermediate size {model_width}; "
            f"choose {model_width} or less."
        )
    notes = []
    if width == model_width:
        notes.append(f"Width {width} is the model's own: nothing is removed.")
    return notes + alignment_notes(width)


def top_channels(scores_F: Tensor, keep: int, site: str) -> Tensor:
    """The `keep` channels with the highest scores, ascending [K]; of equals, the lower index stays.

    Raises:
        RunError: a score is NaN.
    """
    if bool(torch.isnan(scores_F).any()):
        raise RunError(
            f"{site}: a channel's score is not a number; check the model's weights and calibrate again."
        )
    order = torch.sort(scores_F, descending=True, stable=True).indices
    return order[:keep].sort().values
