"""What a width costs in formats that store weights in blocks."""

_SPLITS = (2, 4, 8)


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


def format_costs(width: int) -> dict[str, str]:
    """Format -> what this width means for it, one sentence each.

    Sources: llama.cpp's fallback table for rows that are no multiple of 256; vLLM's checks of
    `weight_block_size` and of the group size per tensor-parallel rank.
    """
    bf16 = _largest_split(width, 1)
    blocks = _largest_split(width, 128)
    if width % 256 == 0:
        gguf = "K-quants keep their own types for down_proj"
    else:
        gguf = "K-quants store down_proj in larger types (Q4_K as Q5_0, Q6_K as Q8_0)"
    if width % 128:
        fp8 = "does not fit: the width is no multiple of the block of 128"
        gptq = "group size 128 does not fit down_proj; 64 or 32 may"
    else:
        fp8 = f"fits with tensor parallelism up to {blocks}"
        gptq = f"group size 128 fits with tensor parallelism up to {blocks}"
    return {
        "bf16": f"fits with tensor parallelism up to {bf16}",
        "gguf_k_quants": gguf,
        "block_fp8_128": fp8,
        "gptq_group_128": gptq,
    }


def _largest_split(width: int, block: int) -> int:
    """The largest of 1, 2, 4, 8 devices that leaves each a whole number of blocks."""
    return max((n for n in (1, *_SPLITS) if width % (n * block) == 0), default=1)
