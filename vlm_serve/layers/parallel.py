"""The place of a process among those that share one model: its tensor-parallel rank and their count.

Every linear and embedding layer takes one from the start; a server of one process has `SINGLE`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank `rank` of `size` processes (Megatron-LM, arXiv 1909.08053, section 3)."""

    rank: int = 0
    size: int = 1

    def share(self, features: int) -> int:
        """How many of `features` this rank holds; they must divide evenly."""
        assert features % self.size == 0, f"{features} features do not divide among {self.size} ranks"
        return features // self.size

    def slice(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of a whole tensor, cut along `dim`."""
        share = self.share(tensor.shape[dim])
        return tensor.narrow(dim, self.rank * share, share)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's partial result, in place."""
        if self.size > 1:
            dist.all_reduce(partial)
        return partial


SINGLE = TensorParallel()
