"""What card and page call the models of a run and the stages that made them: one row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A stage that makes a model.

    Attributes:
        stage: its name in the recipe.
        model: the model's name in results.json.
        model_label: the model's name in tables.
        title: the stage's name over columns and plots.
        noun: the stage within a sentence that begins with it.
        made: what the stage did to the model, after "pruned, then ...".
        lora: it trained adapters, which were merged.
        distils: it trained toward the parent's distributions.
    """

    stage: str
    model: str
    model_label: str
    title: str
    noun: str = ""
    made: str = ""
    lora: bool = False
    distils: bool = False


STEPS = (
    Step("prune", "pruned", "Pruned", "Prune"),
    Step(
        "distill",
        "distilled",
        "Distilled",
        "Distil",
        "Distillation",
        "distilled from the unpruned parent over the full vocabulary",
        distils=True,
    ),
    Step(
        "recover",
        "recovered",
        "Recovered",
        "Recover (LoRA)",
        "LoRA recovery",
        "recovered with LoRA on the same distillation loss and merged",
        lora=True,
        distils=True,
    ),
    Step(
        "finish",
        "finished",
        "Finished on-policy",
        "Finish (on-policy)",
        "On-policy finish",
        "trained on answers of its own, judged by the parent token by token",
        distils=True,
    ),
    Step(
        "sft",
        "finetuned",
        "Fine-tuned",
        "Fine-tune (LoRA)",
        "Fine-tuning",
        "fine-tuned with LoRA on the corpus' answers and merged",
        lora=True,
    ),
    Step(
        "dpo",
        "aligned",
        "Aligned (DPO)",
        "Preferences (LoRA)",
        "Preference tuning",
        "tuned with LoRA (DPO) toward answers that follow checkable instructions and merged",
        lora=True,
    ),
)
TRAINING_STEPS = STEPS[1:]
STEP_OF_STAGE = {step.stage: step for step in STEPS}
STEP_OF_MODEL = {step.model: step for step in STEPS}
