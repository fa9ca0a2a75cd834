"""A results.json as a whole run leaves it, with made-up figures, and smaller ones derived from it."""

import copy
import math
from typing import Any

LAYERS = 30


def full_results() -> dict[str, Any]:
    """Every stage and every benchmark of a run like the shipped SmolLM2 recipe."""
    return copy.deepcopy(_FULL)


def only_pruned() -> dict[str, Any]:
    """Magnitude pruning, nothing trained, nothing measured."""
    results = full_results()
    results["recipe"] |= {"distill": None, "recover": None}
    results["recipe"]["prune"] |= {"criterion": "magnitude", "refit": False}
    results["stages"] = {"prune": results["stages"]["prune"]}
    report = results["stages"]["prune"]["report"]
    report |= {"refitted": 0, "criterion": "magnitude", "refit": False}
    del report["layers"]
    results |= {"models": {}, "final": None, "notes": [], "parent_card": {}, "verification": {}}
    return results


def without(results: dict[str, Any], benchmark: str) -> dict[str, Any]:
    """The same run without one benchmark."""
    for figures in results["models"].values():
        figures.pop(benchmark, None)
    return results


def _losses(steps: int, start: float, end: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": end + (start - end) * math.exp(-3 * step / steps) + 0.004 * math.sin(step),
            "learning_rate": 5e-5 * (1 - step / steps),
            "tokens": 2048 * step,
            "grad_norm": 0.31,
        }
        for step in range(10, steps + 1, 10)
    ]


def _held_out(steps: int, kl: tuple[float, float], top1: tuple[float, float]) -> list[dict[str, Any]]:
    found = []
    for step in range(0, steps + 1, steps // 10):
        way = math.exp(-3 * step / steps)
        found.append(
            {
                "step": step,
                "kl": kl[1] + (kl[0] - kl[1]) * way,
                "top1_agreement": top1[1] + (top1[0] - top1[1]) * way,
                "top5_agreement": 0.99,
            }
        )
    return found


def _fidelity(agreement: float, kl: float, perplexity: float) -> dict[str, Any]:
    figures = {
        "top1_agreement": agreement,
        "top5_agreement": min(1.0, agreement + 0.125),
        "kl_mean": kl,
        "kl_p95": 4.1 * kl,
        "student_perplexity": perplexity,
        "teacher_perplexity": 7.378,
        "num_tokens": 21_337,
        "num_rows": 96,
        "intervals": {
            "top1_agreement": [agreement - 0.006, agreement + 0.006],
            "top5_agreement": [agreement + 0.121, agreement + 0.129],
            "kl_mean": [kl * 0.94, kl * 1.07],
            "kl_p95": [kl * 3.8, kl * 4.5],
            "student_perplexity": [perplexity * 0.96, perplexity * 1.04],
            "teacher_perplexity": [7.1, 7.66],
        },
    }
    answers = {"top1_agreement": agreement - 0.021, "kl_mean": kl * 1.2, "num_tokens": 12_004}
    corpus = {"top1_agreement": agreement + 0.011, "kl_mean": kl * 0.9, "num_tokens": 40_121}
    settings = {"dtype": "bfloat16", "device": "cpu"}
    return {**figures, "tokens": "all", "response": answers, "corpus": corpus, "settings": settings}


def _share(correct: int, total: int) -> dict[str, Any]:
    return {"correct": correct, "total": total, "accuracy": correct / total}


TYPES = (
    ("change_case:english_capital", 25),
    ("combination:repeat_prompt", 41),
    ("detectable_content:number_placeholders", 27),
    ("detectable_format:json_format", 17),
    ("detectable_format:number_bullet_lists", 31),
    ("detectable_format:title", 37),
    ("keywords:existence", 39),
    ("keywords:forbidden_words", 49),
    ("keywords:frequency", 42),
    ("length_constraints:number_paragraphs", 27),
    ("length_constraints:number_sentences", 52),
    ("length_constraints:number_words", 52),
    ("punctuation:no_comma", 66),
    ("startend:end_checker", 26),
    ("startend:quotation", 41),
)


def _ifeval(prompt_strict: int, inst_strict: int, level: float) -> dict[str, Any]:
    inst = inst_strict / 834
    return {
        "prompt_level_strict": _share(prompt_strict, 541),
        "inst_level_strict": _share(inst_strict, 834),
        "prompt_level_loose": _share(prompt_strict + 9, 541),
        "inst_level_loose": _share(inst_strict + 12, 834),
        "by_type": {
            name: {
                "strict": _share(min(total, round(total * level * (0.4 + (7 * i % 10) / 10))), total),
                "loose": _share(min(total, round(total * level * (0.5 + (7 * i % 10) / 10))), total),
            }
            for i, (name, total) in enumerate(TYPES)
        },
        "missing": 0,
        "intervals": {
            "prompt_level_strict": [prompt_strict / 541 - 0.03, prompt_strict / 541 + 0.034],
            "inst_level_strict": [inst - 0.035, inst + 0.036],
            "prompt_level_loose": [prompt_strict / 541 - 0.015, prompt_strict / 541 + 0.05],
            "inst_level_loose": [inst - 0.021, inst + 0.05],
        },
        "mean_response_words": 171.3,
        "repetition_rate": round(0.31 - level / 10, 4),
        "mean_response_tokens": 241.5 + 90 * (0.4 - level),
        "median_response_tokens": 201.0,
        "no_stop_rate": round(0.21 - level / 10, 4),
        "settings": {
            "prompts": "google/IFEval",
            "comparable": {"do_sample": False, "max_new_tokens": 512, "checkers": "lm-eval 0.4.13"},
            "dtype": "bfloat16",
            "device": "cpu",
        },
    }


def _training(section: dict[str, Any], steps: int, **curves: Any) -> dict[str, Any]:
    report = {
        "losses": _losses(steps, *curves["loss"]),
        "held_out": _held_out(steps, curves["kl"], curves["top1"]),
        "best_step": steps,
        "chosen_step": steps,
        "steps": steps,
        "num_tokens": 1_987 * steps,
        "tokens_per_s": 812.4,
        "peak_memory_bytes": 3_141_592_653,
        "corpora": [
            {**_CORPUS, "weight": 0.9, "hash": "0123456789abcdef", "num_rows": 1_412, "num_tokens": 402_331},
        ],
        "held_out_corpus": {
            "source": "builtin:smollm2-held-out",
            "split": "train",
            "hash": "fedcba9876543210",
        },
        "weight_bytes": 242_503_680,
        "notes": [],
    }
    return report | section


_CORPUS: dict[str, Any] = {"source": "builtin:smollm2-chat", "split": "train", "weight": 1.0, "limit": None}
_FULL: dict[str, Any] = {
    "recipe": {
        "name": "smollm2-135m-mlp1280",
        "model": "builtin:smollm2-135m-instruct",
        "revision": None,
        "trust_remote_code": False,
        "seed": 0,
        "sequence_length": 512,
        "enable_thinking": None,
        "device": "auto",
        "synthesize": [{"out": "text/chat", "num_prompts": 2_000, "constraint_share": 0.25, "attempts": 1}],
        "corpora": [
            {**_CORPUS, "weight": 0.9},
            {"source": "yahma/alpaca-cleaned", "split": "train", "weight": 0.1, "limit": 5_000},
        ],
        "held_out": {"source": "builtin:smollm2-held-out", "split": "train"},
        "calibrate": {"num_tokens": 65_536, "batch_size": 8, "correlations": True},
        "prune": {"width": 1_280, "step": 128, "criterion": "obs", "refit": True, "mtp": "prune"},
        "distill": {
            "max_steps": 200,
            "loss": "forward_kl",
            "beta": 0.5,
            "temperature": 1.0,
            "tokens": "all",
            "learning_rate": 5e-5,
            "weight_decay": 0.0,
            "warmup_fraction": 0.05,
            "max_grad_norm": 1.0,
            "batch_tokens": 2_048,
            "gradient_accumulation_steps": 1,
            "precision": "bf16_mixed",
            "optimizer": "adamw_torch",
            "select_by": "held_out_kl",
            "train": "all_but_embeddings",
        },
        "recover": {
            "max_steps": 100,
            "loss": "forward_kl",
            "tokens": "all",
            "learning_rate": 2e-4,
            "precision": "bf16_mixed",
            "rank": 32,
            "alpha": 64,
            "dropout": 0.0,
            "targets": ["gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
        },
        "evaluate": {
            "benchmarks": ["fidelity", "ifeval", "latency"],
            "ifeval": {"prompts": "google/IFEval", "max_new_tokens": 512, "batch_size": 32, "limit": None},
        },
        "report": {"model_id": None, "authors": "Ada Example", "push_to_hub": False},
    },
    "parent": "builtin:smollm2-135m-instruct",
    "parent_card": {
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "license_source": "the parent's model card",
        "model_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "origin": "The parent used here is HuggingFaceTB/SmolLM2-135M-Instruct dequantised from a GGUF file.",
    },
    "environment": {
        "hardware": {"cpu": "AMD EPYC 9B14", "num_cores": 2, "memory_bytes": 8_335_544_320, "gpus": []},
        "versions": {"regrow": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.24.0"},
    },
    "stages": {
        "calibrate": {
            "report": {"num_tokens": 65_536, "num_sequences": 201, "notes": []},
            "seconds": 71.25,
            "manifest": "a1",
        },
        "prune": {
            "report": {
                "criterion": "obs",
                "width": {"dense": 1_280},
                "width_before": 1_536,
                "citation": "Greedy OBS: Kurtic et al., arXiv 2302.04089; Meng et al., arXiv 2403.12983.",
                "out": "/home/ada/runs/stages/prune/model",
                "parent": "3f1c9a",
                "refit": True,
                "refitted": LAYERS,
                "mtp": "none",
                "num_tensors": 272,
                "weight_bytes": 242_503_680,
                "layers": [
                    {
                        "name": f"layers.{i}",
                        "rho": 1e-3,
                        "error_before": 0.021 + 0.04 * abs(math.sin(1 + i / 3)),
                        "error_after": 0.009 + 0.014 * abs(math.sin(1 + i / 3)),
                    }
                    for i in range(LAYERS)
                ],
                "notes": [],
            },
            "seconds": 48.02,
            "manifest": "b2",
        },
        "distill": {
            "report": _training({}, 200, loss=(0.16, 0.1), kl=(0.12, 0.108), top1=(0.858, 0.865)),
            "seconds": 1_432.5,
            "manifest": "c3",
        },
        "recover": {
            "report": _training({}, 100, loss=(0.105, 0.097), kl=(0.108, 0.104), top1=(0.865, 0.868)),
            "seconds": 702.7,
            "manifest": "d4",
        },
        "evaluate": {
            "report": {
                "final": "recovered",
                "comparison": {
                    "verdict": "not enough data",
                    "metric": "inst_level_strict",
                    "margin": 0.01,
                    "num_prompts": 541,
                    "difference": -0.0156,
                    "ci95": [-0.0392, 0.0081],
                    "mcnemar_p": 0.21,
                    "flips": {"prompts": {"lost": 31, "gained": 22}},
                    "needed": {"if_no_difference": {"prompts": 11_204, "repeats": None}},
                },
                "notes": [],
            },
            "seconds": 1_804.1,
            "manifest": "e5",
        },
    },
    "models": {
        "teacher": {
            "num_parameters": 134_515_008,
            "weight_bytes": 269_030_016,
            "ifeval": _ifeval(101, 255, 0.31),
            "latency": {
                "prefill_tokens_per_s": 1_913.0,
                "decode_tokens_per_s": 21.9,
                "peak_memory_kind": "process_resident",
                "ttft_s": 0.134,
                "peak_memory_bytes": 412_000_000,
            },
        },
        "pruned": {"fidelity": _fidelity(0.858, 0.12, 7.79)},
        "distilled": {"fidelity": _fidelity(0.865, 0.108, 7.6)},
        "recovered": {
            "num_parameters": 121_243_968,
            "weight_bytes": 242_487_936,
            "fidelity": _fidelity(0.868, 0.104, 7.58),
            "ifeval": _ifeval(92, 242, 0.29),
            "latency": {
                "prefill_tokens_per_s": 2_122.0,
                "decode_tokens_per_s": 23.7,
                "prefill_speedup": 1.112,
                "decode_speedup": 1.085,
                "peak_memory_kind": "process_resident",
                "ttft_s": 0.121,
                "peak_memory_bytes": 385_000_000,
            },
        },
    },
    "verification": {
        "ok": True,
        "problems": [],
        "engines": {
            "transformers": {"ok": True, "why": "every tensor of LlamaForCausalLM is there"},
            "vllm_speculative": {"ok": False, "why": "the model has no multi-token-prediction head"},
        },
        "alignment": {"GGUF K-quants": "1280 is a multiple of 256; no tensor falls back."},
        "compared": {"untouched": 62, "cut": 30, "refitted": 30, "trained": 210},
    },
    "final": "recovered",
    "notes": [
        "distill: 3 rows of the corpus left out: no response within sequence_length.",
        "recover: 3 rows of the corpus left out: no response within sequence_length.",
    ],
}
