"""Values that the stages pass to each other, and the legend of shapes.

Shape suffixes: B batch, S sequence, T tokens (flattened B x S, real tokens only), D hidden size,
F intermediate size (channels), K channels kept, V vocabulary, E experts. `down_DF` is a matrix [D, F].

A *channel* is one unit of a gated MLP: row j of gate_proj and up_proj and column j of down_proj.
This module imports neither torch nor numpy.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

SiteKind = Literal["dense", "expert", "shared_expert", "mtp"]
Tokens = Literal["all", "response"]  # which tokens count: those the assistant writes, or every one


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: safetensors' name of the dtype, e.g. `"BF16"`.
        shape: the tensor's shape.
        file: file name of the shard, relative to the checkpoint's folder.
        begin: absolute offset of the first byte in that file.
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    nbytes: int


@dataclass(frozen=True)
class TensorRef:
    """Where one projection of an MLP lies in a checkpoint.

    Attributes:
        name: tensor name.
        channel_axis: the axis that runs over channels (0 for gate and up, 1 for down; counted in the stored
            tensor, so a stacked expert tensor [E, 2F, D] has 1).
        start: index of channel 0 along that axis (F for the up half of a fused `gate_up_proj`).
        expert: index along axis 0 of a stacked [E, ...] tensor, or None.
    """

    name: str
    channel_axis: int
    start: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class MlpSite:
    """One gated MLP whose channels can be removed.

    Attributes:
        name: stable short name: `layers.3`, `layers.3.shared_expert`, `layers.3.experts.7`, `mtp.layers.0`.
        kind: what it is; sites of one kind share one width key of the config.
        layer: index of the decoder layer.
        width: channels F.
        hidden_size: D.
        gate, up, down: weights; `gate_bias`, `up_bias` are cut with them (a down bias stays whole).
        module: dotted path of the MLP module inside `AutoModelForCausalLM`, or None where that class does
            not hold it (the multi-token-prediction layer).
    """

    name: str
    kind: SiteKind
    layer: int
    width: int
    hidden_size: int
    gate: TensorRef
    up: TensorRef
    down: TensorRef
    gate_bias: TensorRef | None = None
    up_bias: TensorRef | None = None
    module: str | None = None


@dataclass(frozen=True)
class PruningPlan:
    """Which channels stay, per site.

    Attributes:
        parent: fingerprint of the parent checkpoint (`CheckpointReader.fingerprint`).
        width: channels kept, K, per kind of site.
        kept: site name -> ascending channel indices, length K.
        origin: how the choice was made: criterion, citation, statistics' hash, seed, notes. JSON values.
    """

    parent: str
    width: dict[str, int]
    kept: dict[str, tuple[int, ...]]
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """Measured figures of one benchmark on one model.

    Attributes:
        benchmark: `"fidelity"`, `"ifeval"`, `"latency"` ...
        figures: name -> figure, as written into results.json.
        records: per-item results (one JSON object each) that paired statistics need later.
        settings: everything that must be equal for two results to be comparable.
    """

    benchmark: str
    figures: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
