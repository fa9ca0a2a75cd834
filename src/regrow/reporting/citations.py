"""BibTeX of the methods that a run used, found by the arXiv number that each method records."""

import re
from collections.abc import Iterable

from regrow.reporting.facts import Facts, section

_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")

_DISTILLATION = "1503.02531"
_ON_POLICY = "2306.13649"
_LORA = "2106.09685"
_DPO = "2305.18290"
_IFEVAL = "2311.07911"
_LOSSES = {"jsd": "2306.13649", "skewed_kl": "2402.03898", "reverse_kl": "2306.08543"}
_CRITERIA = {
    "wanda": ("2306.11695",),
    "flap": ("2312.11983",),
    "activation": ("2407.14679",),
    "fisher": ("2204.09656",),
    "obs": ("2302.04089", "2403.12983"),
    "obs_fisher": ("2312.17244", "2302.04089"),
}
_REFIT = ("2403.12983",)

# arXiv number -> (key, authors, title, year)
_PAPERS = {
    "1503.02531": (
        "hinton2015distilling",
        "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
        "Distilling the Knowledge in a Neural Network",
        2015,
    ),
    "2106.09685": (
        "hu2021lora",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and "
        "Wang, Shean and Wang, Lu and Chen, Weizhu",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        2021,
    ),
    "2302.04089": (
        "kurtic2023ziplm",
        "Kurtic, Eldar and Frantar, Elias and Alistarh, Dan",
        "{ZipLM}: Inference-Aware Structured Pruning of Language Models",
        2023,
    ),
    "2204.09656": (
        "kwon2022fast",
        "Kwon, Woosuk and Kim, Sehoon and Mahoney, Michael W. and Hassoun, Joseph and Keutzer, Kurt and "
        "Gholami, Amir",
        "A Fast Post-Training Pruning Framework for Transformers",
        2022,
    ),
    "2312.17244": (
        "vanderouderaa2023llmsurgeon",
        "van der Ouderaa, Tycho F. A. and Nagel, Markus and van Baalen, Mart and Asano, Yuki M. and "
        "Blankevoort, Tijmen",
        "The {LLM} Surgeon",
        2023,
    ),
    "2305.18290": (
        "rafailov2023dpo",
        "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher "
        "D. and Finn, Chelsea",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        2023,
    ),
    "2306.08543": (
        "gu2023minillm",
        "Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie",
        "{MiniLLM}: Knowledge Distillation of Large Language Models",
        2023,
    ),
    "2306.11695": (
        "sun2023wanda",
        "Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico",
        "A Simple and Effective Pruning Approach for Large Language Models",
        2023,
    ),
    "2306.13649": (
        "agarwal2023gkd",
        "Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and "
        "Geist, Matthieu and Bachem, Olivier",
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        2023,
    ),
    "2311.07911": (
        "zhou2023ifeval",
        "Zhou, Jeffrey and Lu, Tianjian and Mishra, Swaroop and Brahma, Siddhartha and Basu, Sujoy and "
        "Luan, Yi and Zhou, Denny and Hou, Le",
        "Instruction-Following Evaluation for Large Language Models",
        2023,
    ),
    "2312.11983": (
        "an2023flap",
        "An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao",
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        2023,
    ),
    "2402.03898": (
        "ko2024distillm",
        "Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young",
        "{DistiLLM}: Towards Streamlined Distillation for Large Language Models",
        2024,
    ),
    "2403.12983": (
        "meng2024osscar",
        "Meng, Xiang and Ibrahim, Shibal and Behdin, Kayhan and Hazimeh, Hussein and Ponomareva, Natalia and "
        "Mazumder, Rahul",
        "{OSSCAR}: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization",
        2024,
    ),
    "2407.14679": (
        "muralidharan2024minitron",
        "Muralidharan, Saurav and Sreenivas, Sharath Turuvekere and Joshi, Raviraj and Chochowski, Marcin "
        "and Patwary, Mostofa and Shoeybi, Mohammad and Catanzaro, Bryan and Kautz, Jan and Molchanov, Pavlo",
        "Compact Language Models via Pruning and Knowledge Distillation",
        2024,
    ),
}


def bibtex(facts: Facts) -> str:
    """BibTeX entries of the methods that the run's stages report having used, in the order of the stages."""
    return "\n\n".join(_entry(number) for number in dict.fromkeys(_used(facts)) if number in _PAPERS)


def plain_citations(facts: Facts) -> list[str]:
    """Where the criterion comes from, as it was recorded."""
    return [f"Criterion: {text}" for text in _recorded(facts)]


def _used(facts: Facts) -> Iterable[str]:
    pruned = facts.reports.get("prune")
    if pruned is not None:
        options = section(facts.recipe, "prune")
        recorded = [number for text in _recorded(facts) for number in _ARXIV.findall(text)]
        yield from recorded or _CRITERIA.get(str(pruned.get("criterion") or options.get("criterion")), ())
        if pruned.get("refit", options.get("refit")):
            yield from _REFIT
    for stage in facts.distilling:
        yield _DISTILLATION
        settings = facts.settings(stage)
        if str(settings.get("loss")) in _LOSSES:
            yield _LOSSES[str(settings.get("loss"))]
        if settings.get("on_policy_fraction"):
            yield _ON_POLICY
    if facts.adapting:
        yield _LORA
    if "dpo" in facts.reports:
        yield _DPO
    if any(model.ifeval for model in facts.models):
        yield _IFEVAL


def _recorded(facts: Facts) -> list[str]:
    pruned = facts.reports.get("prune", {})
    return [str(pruned["citation"])] if pruned.get("citation") else []


def _entry(arxiv: str) -> str:
    key, authors, title, year = _PAPERS[arxiv]
    fields = {
        "title": title,
        "author": authors,
        "year": year,
        "eprint": arxiv,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{arxiv}",
    }
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{key},\n{body}\n}}"
