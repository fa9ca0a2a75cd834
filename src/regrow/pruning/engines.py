"""Which inference engines take a checkpoint, judged from names, shapes and config.

What each engine does with a contradiction was read in its source: one scalar width serves the trunk and the
multi-token-prediction (MTP) layer; an MTP head that is declared and missing stops vLLM's speculative decoding
("weights were not initialized") and, in some versions, llama.cpp (its issue 26916). llama.cpp's converter of
2026 asserts that there is a head unless it is told `--no-mtp` (tried with both settings).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from regrow.families import Family, Faults

Verdict = dict[str, Any]


def engine_support(
    family: Family, config: Mapping[str, Any], problems: Sequence[str], faults: Faults
) -> dict[str, Verdict]:
    """Engine -> `{"ok", "why"}`.

    Args:
        family: the checkpoint's family.
        config: its config.json.
        problems: what is wrong with its files, names and shapes.
        faults: how its tensors depart from its config.
    """
    first = problems[0] if problems else ""
    whole = faults.main_ok and not faults.extra
    if not whole:
        reason = _no(first or "names or shapes do not fit the config")
        return dict.fromkeys(("transformers", "vllm", "vllm_speculative", "sglang", "llama_cpp"), reason)
    architecture = _architecture(config)
    trunk = _yes(f"every tensor of {architecture} is there at the width that config.json gives")
    mtp_fault = (
        "config.json declares a multi-token-prediction head whose tensors are missing or do not fit"
        if faults.mtp_declared
        else "multi-token-prediction tensors are there that config.json does not declare"
    )
    if family.mtp_key is None:
        speculative = _no("the model has no multi-token-prediction head; a draft model or n-grams work")
    elif not faults.mtp_ok:
        speculative = _no(mtp_fault)
    elif faults.mtp_declared:
        speculative = _yes("the multi-token-prediction head has the trunk's width")
    else:
        speculative = _no("the multi-token-prediction head was dropped, and config.json says so")
    llama_cpp = _yes("the converter finds every tensor; see alignment for quantised types")
    if not faults.mtp_ok:
        llama_cpp = _no(f"versions of llama.cpp fail on this: {mtp_fault}")
    elif family.mtp_key and not faults.mtp_declared:
        llama_cpp = _yes("convert with --no-mtp, for the converter looks for the head that was dropped")
    others = trunk
    if family.text_key is None and "language_model" in faults.prefix:
        others = _no("its names lie under model.language_model., which a text-only model does not use")
        speculative = llama_cpp = others
    return {
        "transformers": trunk,
        "vllm": others,
        "vllm_speculative": speculative,
        "sglang": others,
        "llama_cpp": llama_cpp,
    }


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type"))


def _yes(why: str) -> Verdict:
    return {"ok": True, "why": why}


def _no(why: str) -> Verdict:
    return {"ok": False, "why": why}
