"""The model card: the sections of the Hub's template, each filled from the run's record or left out."""

import json
import re
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard

from regrow.reporting import content, measurement, method, records
from regrow.reporting.blocks import Bullets, Code, Details, Pairs, Paragraph, Section, without_empty
from regrow.reporting.citations import bibtex, plain_citations
from regrow.reporting.facts import Facts, section
from regrow.reporting.metadata import card_data
from regrow.reporting.table import before_after_table
from regrow.reporting.text import code_span, escape_markdown, is_hub_id, one_line

TEMPLATES = Path(__file__).parent / "templates"
_WHOLE = "---\n{{ card_data }}\n---\n\n{{ body }}\n"


def render_card(facts: Facts) -> ModelCard:
    """The card of the published model, as huggingface_hub's object."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": escape_markdown, "code": code_span, "fence": _fence, "kind": _kind}
    body = environment.get_template("card.md.jinja").render(
        title=f"Model Card for {one_line(facts.name)}",
        summary=content.summary(facts),
        sections=card_sections(facts),
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return ModelCard.from_template(card_data(facts), template_str=_WHOLE, body=body)


def card_sections(facts: Facts) -> list[Section]:
    """Every section of the card, without the empty ones; titles are those of the Hub's template."""
    sections = [
        *_details(facts),
        *_uses(facts),
        *_training(facts),
        *_evaluation(facts),
        *_technical(facts),
    ]
    return without_empty(sections)


def get_started(facts: Facts) -> str:
    """Code that loads the model and lets it answer; runs as it stands in the model's folder."""
    name = section(facts.recipe, "report").get("model_id")
    source = (
        json.dumps(name)
        if is_hub_id(name)
        else '"."  # the folder of this card, or the model\'s name on the Hub'
    )
    trust = ", trust_remote_code=True" if facts.recipe.get("trust_remote_code") else ""
    chat = facts.has_chat_template
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"source = {source}",
        f"tokenizer = AutoTokenizer.from_pretrained(source{trust})",
        f'model = AutoModelForCausalLM.from_pretrained(source, dtype="auto"{trust})',
    ]
    if chat:
        thinking = facts.recipe.get("enable_thinking")
        mode = f", enable_thinking={thinking}" if isinstance(thinking, bool) else ""
        lines += [
            'messages = [{"role": "user", "content": "Name three uses of a paper clip."}]',
            "inputs = tokenizer.apply_chat_template(",
            f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{mode}',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _details(facts: Facts) -> list[Section]:
    parent = facts.parent_card
    authors = section(facts.recipe, "report").get("authors")
    licence = parent.get("license_name") or parent.get("license")
    pairs = [
        ("Developed by", one_line(authors) if authors else ""),
        ("Model type", one_line(facts.config.get("model_type") or "")),
        ("Language(s)", ", ".join(_listed(parent.get("language")))),
        ("License", f"{licence} (inherited; read from {parent.get('license_source')})" if licence else ""),
        ("Pruned from", facts.parent),
        ("Made with", _made_with(facts)),
    ]
    return [
        Section(2, "Model Details"),
        Section(
            3,
            "Model Description",
            (
                Paragraph(one_line(parent.get("origin") or "")),
                Bullets(method.procedure(facts)),
                Pairs([(key, value) for key, value in pairs if value]),
            ),
        ),
    ]


def _uses(facts: Facts) -> list[Section]:
    return [
        Section(2, "Uses"),
        Section(3, "Direct Use", (Paragraph(content.direct_use(facts)),)),
        Section(3, "Downstream Use", (Bullets(method.engines(facts)),)),
        Section(3, "Out-of-Scope Use", (Paragraph(content.out_of_scope(facts)),)),
        Section(2, "Bias, Risks, and Limitations", (Bullets(content.limitations(facts)),)),
        Section(3, "Recommendations", (Paragraph(content.recommendations(facts)),)),
        Section(
            2,
            "How to Get Started with the Model",
            (Code(get_started(facts), "python"), Paragraph(method.loading_note(facts))),
        ),
    ]


def _training(facts: Facts) -> list[Section]:
    return [
        Section(2, "Training Details"),
        Section(3, "Training Data", (records.data_table(facts),)),
        Section(3, "Training Procedure"),
        Section(4, "Preprocessing", (Bullets(method.preprocessing(facts)),)),
        Section(
            4,
            "Training Hyperparameters",
            (Pairs(method.training_regime(facts)), records.settings_table(facts)),
        ),
        Section(
            4, "Speeds, Sizes, Times", (records.times_table(facts), Bullets(method.training_course(facts)))
        ),
    ]


def _evaluation(facts: Facts) -> list[Section]:
    types = records.types_table(facts)
    return [
        Section(2, "Evaluation"),
        Section(3, "Testing Data, Factors & Metrics"),
        Section(4, "Testing Data", (Bullets(measurement.testing_data(facts)),)),
        Section(4, "Factors", (Paragraph(method.factors(facts)),)),
        Section(4, "Metrics", (Pairs(measurement.metrics(facts)),)),
        Section(3, "Results", (before_after_table(facts), Details("By type of instruction", types))),
        Section(4, "Summary", (Paragraph(content.comparison_sentence(facts)),)),
        Section(
            2,
            "Model Examination",
            (
                Bullets(method.pruned_and_preserved(facts)),
                Paragraph(records.layer_summary(facts)),
                Details("Every MLP", records.layer_table(facts)),
            ),
        ),
    ]


def _technical(facts: Facts) -> list[Section]:
    authors = section(facts.recipe, "report").get("authors")
    return [
        Section(2, "Environmental Impact", (Pairs(records.impact_lines(facts)),)),
        Section(2, "Technical Specifications"),
        Section(
            3,
            "Model Architecture and Objective",
            (Pairs(records.architecture_lines(facts)), Paragraph(method.objective(facts))),
        ),
        Section(3, "Compute Infrastructure"),
        Section(4, "Hardware", (Pairs(records.hardware_lines(facts)),)),
        Section(4, "Software", (Pairs(records.versions_lines(facts)),)),
        Section(2, "Citation", (Bullets(plain_citations(facts)), Code(bibtex(facts), "bibtex"))),
        Section(2, "Glossary", (Pairs(content.glossary(facts)),)),
        Section(2, "More Information", (Bullets(content.notes(facts)),)),
        Section(2, "Model Card Authors", (Paragraph(one_line(authors) if authors else ""),)),
    ]


def _made_with(facts: Facts) -> str:
    versions = section(facts.environment, "versions")
    return f"regrow {one_line(versions['regrow'])}" if versions.get("regrow") else ""


def _listed(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value] if value else []
    return [one_line(item) for item in values]


def _kind(block: object) -> str:
    return type(block).__name__


def _fence(text: str) -> str:
    """A fence that the text itself does not contain."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
