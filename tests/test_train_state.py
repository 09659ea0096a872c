"""A trainer's state on disk: pieces of several ranks, read back in others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf_ray.backends.train_state import PARTS, StateReader, write_state

SIZES = {"model.norm.weight": 5, "model.embed_tokens.weight": 12}


def whole(name: str, part: str) -> torch.Tensor:
    return torch.arange(SIZES[name], dtype=torch.float32) + 100 * PARTS.index(part) + len(name)


def write(directory: Path, bounds: list[int]) -> None:
    """The flattened parameters one after another, cut at the bounds, a rank each."""
    flat = [(name, element) for name, size in SIZES.items() for element in range(size)]
    for rank, (begin, end) in enumerate(zip([0, *bounds], [*bounds, len(flat)], strict=True)):
        own = flat[begin:end]
        runs = []
        for name in SIZES:
            elements = [element for owner, element in own if owner == name]
            if elements:
                start = elements[0]
                parts = {part: whole(name, part)[start : start + len(elements)] for part in PARTS}
                runs.append((name, start, parts))
        write_state(directory, runs, steps=7, rank=rank, max_bytes=64)


@pytest.mark.parametrize("bounds", [[], [8], [3, 4, 9], [1, 2, 3, 4, 5, 6]])
def test_any_piece_is_read_whoever_wrote_it(tmp_path: Path, bounds: list[int]) -> None:
    write(tmp_path, bounds)
    with StateReader(tmp_path) as reader:
        assert set(reader.names) == set(SIZES) and reader.steps == 7
        for name, size in SIZES.items():
            for part in PARTS:
                assert torch.equal(reader.read(name, part), whole(name, part))
                for start in range(size):
                    for numel in range(size - start + 1):
                        found = reader.read(name, part, start=start, numel=numel)
                        assert torch.equal(found, whole(name, part)[start : start + numel])


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    write(tmp_path, [8])
    (tmp_path / "state-00001-00000.safetensors").unlink()
    with StateReader(tmp_path) as reader:
        assert len(reader.read("model.norm.weight", "weight")) == 5
        with pytest.raises(ValueError, match=r"holds no exp_avg of model\.embed_tokens\.weight from element 3 on"):
            reader.read("model.embed_tokens.weight", "exp_avg", numel=12)
        with pytest.raises(ValueError, match=r"holds no weight of lm_head\.weight from element 0 on"):
            reader.read("lm_head.weight", "weight", numel=1)


def test_a_state_of_an_older_version_holds_parameters_whole_and_in_shape(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    parts = {f"layers.0.w/{part}": weight + index for index, part in enumerate(PARTS)}
    save_file(parts, tmp_path / "state-00000.safetensors")
    (tmp_path / "steps.json").write_text('{"steps": 3}')
    with StateReader(tmp_path) as reader:
        assert reader.names == ["layers.0.w"] and reader.steps == 3
        assert reader.read("layers.0.w", "exp_avg", start=4, numel=3).tolist() == [5.0, 6.0, 7.0]
        assert torch.equal(reader.read("layers.0.w", "weight"), weight.flatten())
