"""What regrow must know of an architecture family, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.errors import UserError
from regrow.types import SiteKind

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Settings = Mapping[str, Any]

_MOST_LAYERS, _MOST_EXPERTS, _LARGEST_SIZE = 10_000, 4_096, 1 << 31


@dataclass(frozen=True)
class MlpSpec:
    """One gated MLP of a decoder layer.

    Attributes:
        kind: which width governs it.
        path: where it lies below the layer, e.g. `mlp` or `mlp.shared_expert`; for routed experts the parent
            of the numbered entries.
        width_key: the config's key for its width.
        names: gate, up and down as the checkpoint calls them when they are stored apart.
        module: where transformers keeps it below the layer (experts are merged there); `path` if None.
    """

    kind: SiteKind
    path: str
    width_key: str
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    module: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        name: what people call it.
        mlps: the gated MLPs that a layer may hold.
        layer: shapes of a decoder layer's tensors from the settings and the layer's index.
        defaults: values of config keys that a config.json may leave out, as transformers sets them.
        text_key: the key under which the language model's settings are nested, or None.
        text_prefixes: where the language model lies in a checkpoint, e.g. `model.`; the first is what
            transformers saves, the others are older layouts.
        head_names: what the output head is called under each of them; the first where the list ends.
        renames: (checkpoint prefix, prefix in `AutoModelForCausalLM`'s state dict); the first match counts,
            and a name that matches none is not in that class.
        patterns: (regular expression, replacement) applied to a name afterwards.
        vision: shapes of everything outside the language model, from the whole config.
        vision_prefixes: how their names begin.
        mtp_key: the config's key for the number of multi-token-prediction layers, or None.
        mtp_prefix: where these layers lie, e.g. `mtp.`.
        mtp: shapes of the multi-token-prediction tensors outside the layers.
        mtp_layer: index of a trunk layer whose structure a multi-token-prediction layer has.
    """

    name: str
    mlps: tuple[MlpSpec, ...]
    layer: Callable[[Settings, int], Shapes]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    text_key: str | None = None
    text_prefixes: tuple[str, ...] = ("model.",)
    head_names: tuple[str, ...] = ("lm_head.weight",)
    renames: tuple[tuple[str, str], ...] = (("model.", "model."), ("lm_head.", "lm_head."))
    patterns: tuple[tuple[str, str], ...] = ()
    vision: Callable[[Mapping[str, Any]], Shapes] | None = None
    vision_prefixes: tuple[str, ...] = ()
    mtp_key: str | None = None
    mtp_prefix: str = "mtp."
    mtp: Callable[[Settings], Shapes] | None = None
    mtp_layer: Callable[[Settings, int], Shapes] | None = None

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's settings with the defaults filled in, checked for type and range.

        Raises:
            UserError: a size that the family needs is missing or impossible.
        """
        text = config.get(self.text_key, config) if self.text_key else config
        if not isinstance(text, Mapping):
            raise UserError(f"config.json: {self.text_key} holds no settings; fetch the file again.")
        given = {key: value for key, value in text.items() if value is not None}
        settings: dict[str, Any] = {**self.defaults, **given}
        # transformers reads the tie of a nested model from the outer config.
        if config.get("tie_word_embeddings") is not None:
            settings["tie_word_embeddings"] = config["tie_word_embeddings"]
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for key in (*sizes, *(key for key, value in self.defaults.items() if type(value) is int)):
            _require_size(settings, key)
        settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
        settings.setdefault("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
        for key in ("num_key_value_heads", "head_dim"):
            _require_size(settings, key)
        for spec in self.mlps:
            _require_size(settings, spec.width_key)
        if settings["num_hidden_layers"] > _MOST_LAYERS:
            raise UserError(f"config.json: num_hidden_layers is {settings['num_hidden_layers']}; mend it.")
        # Two names for one thing; transformers writes either.
        if "num_local_experts" in given and "num_experts" not in given:
            settings["num_experts"] = given["num_local_experts"]
        if "num_experts" in settings and _require_size(settings, "num_experts") > _MOST_EXPERTS:
            raise UserError(f"config.json: num_experts is {settings['num_experts']}; mend it.")
        return settings

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor belongs to the multi-token-prediction head."""
        return self.mtp_key is not None and name.startswith(self.mtp_prefix)

    def num_mtp_layers(self, config: Mapping[str, Any]) -> int:
        """How many multi-token-prediction layers the config declares."""
        count = self.settings(config).get(self.mtp_key, 0) if self.mtp_key else 0
        if type(count) is not int or not 0 <= count <= _MOST_LAYERS:
            raise UserError(f"config.json: {self.mtp_key} is {count!r:.40}; it must be a small number.")
        return count


def _require_size(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if isinstance(value, list) and key.endswith("intermediate_size"):
        raise UserError(
            f"config.json gives {key} per layer; regrow prunes models with one width for all layers."
        )
    if type(value) is not int or not 0 < value < _LARGEST_SIZE:
        raise UserError(f"config.json: {key} is {value!r:.40} and must be a positive whole number; mend it.")
    return value
