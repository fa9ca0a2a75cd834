"""Damaged checkpoints and plans: a clean refusal, or a result that is right; nothing else.

Input `i` is made from seed `i`, so a failure is repeated by its number. Three small releases are the corpus.
"""

import json
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from regrow.checkpoint import CheckpointReader
from regrow.errors import RunError, UserError
from regrow.families import expected_tensors, mlp_sites
from regrow.pruning.inspect import inspect_checkpoint
from regrow.pruning.plan import identity_plan, load_plan, save_plan
from regrow.pruning.rewrite import rewrite_checkpoint
from regrow.pruning.verify import verify_checkpoint
from surgery_helpers import tensor_bytes

INDEX = "model.safetensors.index.json"
_TEXT = {
    "vocab_size": 5, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "head_dim": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 2,
    "linear_value_head_dim": 2, "layer_types": ["linear_attention", "full_attention"],
    "mtp_num_hidden_layers": 1,
}  # fmt: skip
_VISION = {
    "depth": 1, "hidden_size": 2, "intermediate_size": 3, "in_channels": 1, "patch_size": 1, "num_heads": 1,
    "temporal_patch_size": 1, "spatial_merge_size": 1, "out_hidden_size": 4, "num_position_embeddings": 2,
}  # fmt: skip
CORPUS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> shards (0: a single file, no index) and config
    "llama": (0, {"model_type": "llama", **_TEXT}),
    "qwen3_5": (
        2,
        {
            "model_type": "qwen3_5",
            "text_config": {"model_type": "qwen3_5_text", **_TEXT, **_LINEAR},
            "vision_config": _VISION,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        3,
        {
            "model_type": "qwen3_moe",
            **_TEXT,
            "num_experts": 2,
            "moe_intermediate_size": 3,
            "mlp_only_layers": [0],
        },
    ),
}
WEIRD = [
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30, 1.5, -0.0, 1e308, "",
    "4", "BF16", "F4", "I8", "é", "\ud800", "../../x", "/etc/passwd", [], [0], [1, 2], [-1, 4], [4, -1],
    [0, 1 << 62], [[1]], [True, 2], [1.0, 2], {}, {"a": 1},
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
]  # fmt: skip
PATHS = [
    "../../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", ".", "", "x.bin",
    "model.safetensors\0", "config.json", "..\\x.safetensors", "absent.safetensors", "~/x.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base = tmp_path_factory.mktemp("fuzz")
    for name, (shards, config) in CORPUS.items():
        _write_release(base / name, shards, config)
        reader = CheckpointReader(base / name)
        plan = identity_plan(reader.fingerprint(), mlp_sites(reader.config, reader.tensors))
        save_plan(plan, base / f"{name}.plan.json")
    return base


def test_damaged_inputs_are_refused_or_read_rightly(corpus, tmp_path):
    counts = _fuzz(corpus, tmp_path, range(900))
    assert counts["refused"] > 450


@pytest.mark.slow
@pytest.mark.timeout(3_000)
def test_twelve_thousand_damaged_inputs(corpus, tmp_path):
    counts = _fuzz(corpus, tmp_path, range(12_000))
    assert counts["refused"] > 6_000
    assert counts["refused"] + counts["accepted"] == 12_000


def _fuzz(corpus: Path, tmp_path: Path, seeds: range) -> dict[str, int]:
    """Damage, read, cut; returns how many were refused and how many were harmless."""
    counts = {"refused": 0, "accepted": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work, out = tmp_path / "work", tmp_path / "out"
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(CORPUS))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(corpus / name, work)
        plan_path = tmp_path / "plan.json"
        shutil.copyfile(corpus / f"{name}.plan.json", plan_path)
        what = _damage(rng, work, plan_path)
        start = time.monotonic()
        try:
            _use(work, plan_path, out)
            counts["accepted"] += 1
        except (UserError, RunError) as error:
            message = str(error)
            assert 20 < len(message) < 1_000, (seed, what, message)
            assert message.count("\n") == 0, (seed, what, message)
            assert not out.exists(), (seed, what)
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} ({what}) gave {type(error).__name__}: {error}") from error
        shutil.rmtree(out, ignore_errors=True)
        assert not [p for p in tmp_path.iterdir() if p.name not in ("work", "plan.json")], (seed, what)
        assert time.monotonic() - start < 20, (seed, what)
    # Nothing was ever allocated because a damaged number asked for it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    return counts


def _use(folder: Path, plan_path: Path, out: Path) -> None:
    """Everything that reads a checkpoint; whatever is accepted must come out as it went in."""
    plan = load_plan(plan_path)
    verdict = verify_checkpoint(folder)
    assert verdict["ok"] or verdict["problems"]
    inspect_checkpoint(folder, width=1)
    reader = CheckpointReader(folder)
    sites = mlp_sites(reader.config, reader.tensors)
    if plan.parent != reader.fingerprint():
        # Damage that changes values but no structure makes another checkpoint, with a plan of its own.
        with pytest.raises(UserError):
            rewrite_checkpoint(parent=reader, plan=plan, out=out)
        assert not out.exists()
        plan = identity_plan(reader.fingerprint(), sites)
    rewrite_checkpoint(parent=reader, plan=plan, out=out, shards=2)
    written = CheckpointReader(out)
    kept = {site.name: plan.kept.get(site.name) for site in sites}
    if all(kept[site.name] == tuple(range(site.width)) for site in sites):
        names = set(written.tensors)
        assert tensor_bytes(written) == {n: t for n, t in tensor_bytes(reader).items() if n in names}


def _damage(rng: random.Random, folder: Path, plan_path: Path) -> str:
    """One or two kinds of damage; says which."""
    kinds = [_damage_bytes, _damage_header, _damage_index, _damage_config, _damage_files]
    if rng.random() < 0.08:
        kind = rng.choice([_damage_bytes, _damage_json_file])
        kind(rng, [plan_path])
        return f"plan: {kind.__name__}"
    done = []
    for _ in range(1 if rng.random() < 0.85 else 2):
        kind = rng.choice(kinds)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if files:
            kind(rng, files)
            done.append(kind.__name__)
    return ", ".join(done)


def _damage_bytes(rng: random.Random, files: list[Path]) -> None:
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    way = rng.randrange(6)
    if way == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif way == 1:
        data += rng.randbytes(rng.choice([1, 8, 100]))
    elif way == 2:
        data = bytearray(rng.randbytes(rng.choice([0, 1, 7, 8, 9, 64])))
    elif way == 3 and len(data) >= 8:
        lengths = [0, 1, 8, len(data), len(data) - 8, 1 << 27, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
        data[:8] = rng.choice(lengths).to_bytes(8, "little")
    else:
        for _ in range(rng.choice([1, 1, 4, 40])):
            if data:
                data[rng.randrange(min(len(data), rng.choice([8, 400, len(data)])))] = rng.randrange(256)
    path.write_bytes(data)


def _damage_json_file(rng: random.Random, files: list[Path]) -> None:
    path = rng.choice([path for path in files if path.suffix == ".json"] or files)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return _damage_bytes(rng, [path])
    path.write_text(_spoil_text(rng, json.dumps(_spoil(rng, value))), encoding="utf-8", errors="replace")


def _damage_config(rng: random.Random, files: list[Path]) -> None:
    _damage_json_file(rng, [path for path in files if path.name == "config.json"] or files)


def _damage_index(rng: random.Random, files: list[Path]) -> None:
    index = [path for path in files if path.name == INDEX]
    if not index or rng.random() < 0.3:
        return _damage_json_file(rng, index or files)
    try:
        value = json.loads(index[0].read_bytes())
        weight_map = value["weight_map"]
        name = rng.choice(list(weight_map))
        shards = [path.name for path in files if path.suffix == ".safetensors"]
        way = rng.randrange(5)
        if way == 0:
            weight_map[name] = rng.choice(PATHS + shards)
        elif way == 1:
            weight_map[name] = rng.choice(WEIRD)
        elif way == 2:
            del weight_map[name]
        elif way == 3:
            weight_map[rng.choice(["extra.weight", "", "\0", name + "x"])] = rng.choice(PATHS + shards)
        else:
            value["weight_map"] = dict.fromkeys(weight_map, rng.choice(PATHS + shards))
        index[0].write_text(json.dumps(value))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        _damage_bytes(rng, index)


def _damage_header(rng: random.Random, files: list[Path]) -> None:
    shards = [path for path in files if path.suffix == ".safetensors"]
    if not shards:
        return _damage_bytes(rng, files)
    path = rng.choice(shards)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        name, other = rng.choice(names), rng.choice(names)
        entry = header[name]
        way = rng.randrange(9)
        if way == 0:
            entry["dtype"] = rng.choice(["F16", "F32", "I8", "U16", "BOOL", "F4", "", 7, None])
        elif way == 1:
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], *WEIRD])
        elif way == 2:
            entry["data_offsets"] = rng.choice([header[other]["data_offsets"], *WEIRD])
        elif way == 3:
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = [
                begin + rng.choice([-2, 0, 2, 1 << 40]),
                end + rng.choice([-2, 2, 1 << 62]),
            ]
        elif way == 4:
            header[rng.choice([other, name + "_", "", "é" * 50])] = header.pop(name)
        elif way == 5:
            header["__metadata__"] = rng.choice(WEIRD)
        elif way == 6:
            header[name] = rng.choice(WEIRD)
        elif way == 7:
            del header[name]
        else:
            header = _spoil(rng, header)
        text = json.dumps(header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return _damage_bytes(rng, [path])
    if rng.random() < 0.1:  # the same key twice, which a dictionary cannot say
        text = text[:-1] + f', {json.dumps(name)}: {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}}}'
    encoded = _spoil_text(rng, text).encode(errors="replace")
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def _damage_files(rng: random.Random, files: list[Path]) -> None:
    path, other = rng.choice(files), rng.choice(files)
    way = rng.randrange(5)
    if way == 0:
        path.unlink()
    elif way == 1:
        path.unlink()
        path.mkdir()
    elif way == 2:
        path.write_bytes(other.read_bytes())
    elif way == 3:
        path.rename(path.with_name(path.name + ".safetensors"))
    else:
        path.unlink()
        path.symlink_to(rng.choice(["nowhere", path.name, ".", other.name]))


def _spoil(rng: random.Random, value: Any) -> Any:
    """A JSON value with one place of it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        way = rng.random()
        if way < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.2:
            return {**value, rng.choice(["", "x", "\0", "quantization_config"]): rng.choice(WEIRD)}
        return {**value, key: _spoil(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return [_spoil(rng, item) if i == place else item for i, item in enumerate(value)]
    return rng.choice(WEIRD)


def _spoil_text(rng: random.Random, text: str) -> str:
    way = rng.random()
    if way < 0.02:
        return "[" * 200_000 + text
    if way < 0.04:
        return text.replace("6", "6" * 5_000, 1)
    if way < 0.06:
        return text.replace(":", ": NaN, ", 1)
    if way < 0.08:
        return "\ufeff" + text
    return text


def _write_release(folder: Path, shards: int, config: dict[str, Any]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32 if "A_log" in name else np.float16)
        for name, shape in expected_tensors(config).items()
    }
    names = list(tensors)
    weight_map = {}
    for part in range(max(shards, 1)):
        chosen = names[part :: max(shards, 1)]
        file = (
            f"model.safetensors-{part + 1:05d}-of-{shards:05d}.safetensors" if shards else "model.safetensors"
        )
        save_file({n: tensors[n] for n in chosen}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    if shards:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
