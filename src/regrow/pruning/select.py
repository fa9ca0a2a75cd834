"""From scores to kept channels, and what is said about a width."""

import torch
from torch import Tensor

from regrow.errors import RunError, UserError


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


def alignment_notes(width: int) -> list[str]:
    """At most one sentence on what a width costs quantised formats downstream.

    GGUF K-quants pack 256 values along a row of down_proj; block-scaled FP8 uses 128 x 128 blocks, which
    tensor parallelism over two devices needs whole in each half.
    """
    below, above = width // 256 * 256, -(-width // 256) * 256
    remedy = f"{below} and {above} avoid this" if below else f"{above} avoids this"
    if width % 256 == 0:
        return []
    costs = "GGUF K-quants fall back to larger types for down_proj"
    if width % 128:
        costs += ", and block-FP8 (128) does not fit"
    else:
        costs += ", and block-FP8 (128) is refused with tensor parallelism of 2 or more"
    return [f"Width {width} is no multiple of 256: {costs}; {remedy}."]


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
