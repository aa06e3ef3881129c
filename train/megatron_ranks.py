"""Which part of the work is this rank's, in Megatron's process groups, and how tensors get from the last stage to the
first rank.

Rank 0 of the run, which the loop runs on, is in the first pipeline stage; the draft and the losses are in the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from miles_spec.train.draft_trainer import DraftRanks


def _shared(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """None for a group of one."""
    return group if dist.get_world_size(group) > 1 else None


class MegatronRanks:
    """Made once `parallel_state` is."""

    def __init__(self) -> None:
        self.tensor = _shared(parallel_state.get_tensor_model_parallel_group())
        self.context = _shared(parallel_state.get_context_parallel_group())
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.first_stage = parallel_state.is_pipeline_first_stage()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        self.pack = _shared(parallel_state.get_tensor_and_context_parallel_group())
        """The ranks that have a pack between them, those with the same rows of it side by side."""
        self.of_draft = DraftRanks(
            rows=_shared(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)),
            packs=_shared(parallel_state.get_data_parallel_group()),
        )
        self.embedding = parallel_state.get_embedding_group(check_initialized=False)
        """The first and the last stage; None on others."""
        # pipeline stages are the outermost dimension of Megatron's order of ranks
        self.speaker = dist.get_world_size() // self.stages * (self.stages - 1)
        """The rank of the last stage that tells the others what all of that stage know."""
        self.speaks = dist.get_rank() == self.speaker

    def tell(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The speaker's `numbers`, on all ranks; as many everywhere."""
        values = torch.tensor(numbers if self.speaks else [0.0] * len(numbers), dtype=torch.float64, device=device)
        dist.broadcast(values, self.speaker)
        return [float(value) for value in values.tolist()]

    def from_speaker(self, tensors: Sequence[tuple[str, Tensor]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The speaker's named tensors, one at a time, on all ranks, which must all go on to the end."""
        if self.stages == 1:  # they all have them
            yield from tensors
            return
        table = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors]
        text = torch.frombuffer(bytearray(json.dumps(table).encode()), dtype=torch.uint8).to(device)
        (size,) = self.tell([len(text)], device)
        if not self.speaks:
            text = torch.empty(int(size), dtype=torch.uint8, device=device)
        dist.broadcast(text, self.speaker)
        for i, (name, dtype, shape) in enumerate(json.loads(bytes(text.tolist()))):
            if self.speaks:
                tensor = tensors[i][1].contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            dist.broadcast(tensor, self.speaker)
            yield name, tensor
