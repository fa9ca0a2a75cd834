"""What a calibration pass works on, and the pass that holds the whole model."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow.checkpoint import CheckpointReader
from regrow.data.batches import pad_batch
from regrow.data.templates import Encoded
from regrow.modeling.hidden import final_hidden
from regrow.modeling.load import load_model
from regrow.progress import Progress
from regrow.pruning.accumulate import Batch, SiteSums, hooked
from regrow.pruning.mtp import MtpLayer, next_tokens
from regrow.pruning.skeleton import Skeleton
from regrow.types import MlpSite

Write = Callable[[str, NDArray[Any]], None]


@dataclass(frozen=True)
class Job:
    """One calibration pass.

    Attributes:
        folder, reader: the parent checkpoint.
        sites: its MLPs.
        rows: sequences; `held_out` holds the indices of those that only the held-out gram sees.
        batches: indices into `rows` that this process runs, batch by batch.
        correlations, fisher: what is counted beside the sums.
        dtype, device: how and where the model runs.
    """

    folder: Path
    reader: CheckpointReader
    sites: Sequence[MlpSite]
    rows: Sequence[Encoded]
    held_out: frozenset[int]
    batches: Sequence[Sequence[int]]
    correlations: bool
    fisher: bool
    seed: int
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool = False

    @property
    def num_tokens(self) -> int:
        """Real tokens of all batches."""
        return sum(len(self.rows[row].input_ids) for batch in self.batches for row in batch)

    def tensors(self, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask [B, S] of a batch, padded on the right, on the device."""
        padded = pad_batch([self.rows[row] for row in batch])
        return padded["input_ids"].to(self.device), padded["attention_mask"].to(self.device)

    def sums(self, sites: Sequence[MlpSite]) -> list[SiteSums]:
        """Empty statistics of these sites."""
        return [
            SiteSums(site, self.device, correlations=self.correlations, fisher=self.fisher) for site in sites
        ]

    def loaded(self) -> Iterator[tuple[list[int], Tensor, Tensor, Batch]]:
        """Row indices, ids, attention mask and the hooks' view of every batch, in order."""
        for rows in self.batches:
            input_ids_BS, mask_BS = self.tensors(rows)
            yield list(rows), input_ids_BS, mask_BS, Batch.of(list(rows), mask_BS.bool(), self.held_out)


def run_in_memory(job: Job, write: Write) -> dict[str, float]:
    """Run the whole model over the batches and write every site's statistics; returns seconds by part."""
    start = time.monotonic()
    dtype = str(job.dtype).removeprefix("torch.")
    model: Any = load_model(
        job.folder, dtype=dtype, device=job.device, trust_remote_code=job.trust_remote_code
    )
    trunk = job.sums([site for site in job.sites if site.module is not None])
    extra = job.sums([site for site in job.sites if site.module is None])
    mtp_layers = load_mtp_layers(job, extra)
    loaded = time.monotonic()
    with hooked(model, trunk) as hooks, Progress("calibrate", job.num_tokens, "tokens") as progress:
        for layer, entry in mtp_layers:
            hooks.add(layer.mlp(entry.site), entry)
        for _, input_ids_BS, mask_BS, batch in job.loaded():
            hooks.batch = batch
            if job.fisher:
                from regrow.pruning.gradients import add_fisher

                hidden_BSD = add_fisher(model, trunk, input_ids_BS, mask_BS, batch, job.seed)
            else:
                with torch.no_grad():
                    hidden_BSD = final_hidden(model, input_ids_BS, mask_BS)
            embed = model.get_input_embeddings()
            run_mtp_layers(job, mtp_layers, hooks, embed, hidden_BSD, input_ids_BS, mask_BS, batch)
            progress.advance(int(mask_BS.sum()))
    counted = time.monotonic()
    for entry in (*trunk, *extra):
        for field, value in entry.tensors().items():
            write(f"{entry.site.name}.{field}", value)
    return {
        "load": round(loaded - start, 3),
        "run": round(counted - loaded, 3),
        "write": round(time.monotonic() - counted, 3),
    }


def load_mtp_layers(job: Job, sums: Sequence[SiteSums]) -> list[tuple[MtpLayer, SiteSums]]:
    """The multi-token-prediction layers with the statistics that they feed."""
    if not sums:
        return []
    skeleton = Skeleton(
        job.folder,
        job.reader,
        dtype=job.dtype,
        device=job.device,
        trust_remote_code=job.trust_remote_code,
    )
    return [(MtpLayer(skeleton, job.reader, entry.site), entry) for entry in sums]


def run_mtp_layers(
    job: Job,
    layers: Sequence[tuple[MtpLayer, SiteSums]],
    hooks: Any,
    embed: Callable[[Tensor], Tensor],
    hidden_BSD: Tensor,
    input_ids_BS: Tensor,
    mask_BS: Tensor,
    batch: Batch,
) -> None:
    """Run the multi-token-prediction layers behind a batch of the trunk's final hidden states."""
    if not layers:
        return
    next_ids_BS, next_mask_BS = next_tokens(input_ids_BS, mask_BS)
    hooks.batch = Batch.of(batch.sequences, next_mask_BS.bool(), job.held_out)
    with torch.no_grad():
        embedding_BSD = embed(next_ids_BS)
        for layer, _ in layers:
            layer.run(hidden_BSD, embedding_BSD, next_mask_BS)
