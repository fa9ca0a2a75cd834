"""Make a checkpoint of Qwen3.5-4B's real shape with random weights: 738 tensors, 9.3 GB, streamed.

Names, shapes, dtypes (48 tensors in F32), the two oddly named shards and the files beside them are those
of the release. Run: `python benchmarks/make_qwen3_5_4b.py FOLDER`.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from regrow.checkpoint.dtypes import ITEM_BYTES
from regrow.families import expected_tensors

CONFIG = Path(__file__).with_name("qwen3_5_4b_config.json")
FIRST_SHARD_BYTES = 5_329_398_688  # size of the release's first file; the rest goes into the second
PIECE_ELEMENTS = 1 << 22


def dtype_of(name: str) -> str:
    return "F32" if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight")) else "BF16"


def make_checkpoint(folder: Path, config: dict, seed: int = 0) -> int:
    """Write the checkpoint; returns the bytes of tensor data."""
    folder.mkdir(parents=True)
    shapes = dict(sorted(expected_tensors(config).items()))
    sizes = {name: math.prod(shape) * ITEM_BYTES[dtype_of(name)] for name, shape in shapes.items()}
    parts: list[list[str]] = [[], []]
    room = FIRST_SHARD_BYTES if sum(sizes.values()) > FIRST_SHARD_BYTES else sum(sizes.values()) // 2
    for name in shapes:
        room -= sizes[name]
        parts[0 if room >= 0 else 1].append(name)
    rng = np.random.default_rng(seed)
    # One block of normal values, taken up at random places: random enough, and as fast as the disk.
    block = (rng.standard_normal(2 * PIECE_ELEMENTS, dtype=np.float32) * 0.02).astype(np.float32)
    as_bf16 = (block.view(np.uint32) >> 16).astype(np.uint16)
    weight_map = {}
    for number, names in enumerate(parts, start=1):
        file = f"model.safetensors-{number:05d}-of-00002.safetensors"
        write_shard(folder / file, names, shapes, sizes, {"F32": block, "BF16": as_bf16}, rng)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text('{"image_processor_type": "Qwen2VLImageProcessorFast"}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache-2.0\n")
    return total


def write_shard(path, names, shapes, sizes, blocks, rng) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    ordered = sorted(names, key=lambda name: -ITEM_BYTES[dtype_of(name)])
    for name in ordered:
        offsets = [position, position + sizes[name]]
        header[name] = {"dtype": dtype_of(name), "shape": list(shapes[name]), "data_offsets": offsets}
        position += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            block, left = blocks[dtype_of(name)], math.prod(shapes[name])
            while left:
                begin = int(rng.integers(0, PIECE_ELEMENTS))
                piece = block[begin : begin + min(left, PIECE_ELEMENTS)]
                file.write(piece.data.cast("B"))
                left -= len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="only the first so many of the 32 layers")
    arguments = parser.parse_args()
    config = json.loads(CONFIG.read_text())
    if arguments.layers:
        text = config["text_config"]
        text["num_hidden_layers"] = arguments.layers
        text["layer_types"] = text["layer_types"][: arguments.layers]
    total = make_checkpoint(arguments.folder, config, arguments.seed)
    print(json.dumps({"folder": arguments.folder.name, "tensor_bytes": total}))


if __name__ == "__main__":
    main()
