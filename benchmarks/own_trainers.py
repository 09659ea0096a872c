"""Random rows as the project's workers take them; ranks import this file to build their data."""

from collections.abc import Sequence

import torch

from rlhf_ray.data.lm_rows import LMData, LMRows
from rlhf_ray.data.packing import pack
from rlhf_ray.data.reward_pairs import PairBatch


class PreferenceRows:
    """What `train_reward` reads: answers of one length, the first half of the rows chosen, the others rejected."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.train = self
        self.order = [*range(len(rows) // 2)] * 1000
        self._rows = torch.tensor(rows)

    def sizes(self) -> dict[str, int]:
        """Pairs."""
        return {"train": len(self.order)}

    def length(self, _: int) -> int:
        """Tokens of a side."""
        return self._rows.shape[1]

    def is_labelled(self, _: int) -> bool:
        """None has a safety label."""
        return False

    def select(self, rows: Sequence[int], device: str) -> PairBatch:
        """The pairs as tensors."""
        count, index = len(rows), torch.tensor(rows)
        tokens = self._rows[torch.cat([index, index + len(self._rows) // 2])].to(device)
        lengths = torch.full((2 * count,), self._rows.shape[1], device=device)
        no, yes = (torch.full((count,), value, device=device) for value in (False, True))
        return PairBatch(tokens, lengths, torch.zeros(count, device=device), no, no, no, yes)


def sft_rows(rows: Sequence[Sequence[int]]) -> LMData:
    """What `train_lm` reads; every token but the first is learnt."""
    packed = LMRows(pack([(list(row), [False] + [True] * (len(row) - 1)) for row in rows], seq_len=len(rows[0])))
    return LMData(packed, packed)
