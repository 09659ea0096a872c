"""What lets the check for GPU machines run on older libraries: calls to newer ones reach their functions."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

DIRECTORY = Path(__file__).parent.parent / "scripts" / "older_stack"


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which finds nothing in this process."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    spec = importlib.util.spec_from_file_location("older_stack", DIRECTORY / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "older_stack", module)
    spec.loader.exec_module(module)
    return module


def test_every_process_has_modules_changed_once_they_are_imported() -> None:
    code = (
        "import sys; assert 'torch' not in sys.modules\n"
        "import torch.nn.attention.varlen as varlen, torch.nn.attention\n"
        "print(varlen.varlen_attn.__qualname__, varlen.AuxRequest.__module__)"
    )
    env = {**os.environ, "PYTHONPATH": str(DIRECTORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["without_enable_gqa.<locals>.<lambda>", "torch.nn.attention.varlen"]


def test_attention_is_not_told_to_group_heads(older: ModuleType) -> None:
    given: list[Any] = []
    varlen = SimpleNamespace(varlen_attn=lambda *args, **options: given.append((args, options)))
    older.without_enable_gqa(varlen)
    varlen.varlen_attn(1, 2, window_size=(-1, 0), enable_gqa=True)
    assert given == [((1, 2), {"window_size": (-1, 0)})]


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_go_to_engines_in_buckets_between_start_and_end(
    older: ModuleType, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The first rank alone speaks with them; all go through the weights."""

    @dataclass
    class UpdateInfo:
        names: list[str]

    class Engine:
        @staticmethod
        def trainer_send_weights(weights: Any, args: dict[str, Any]) -> None:
            assert (args["packed"], args["packed_buffer_size_bytes"]) == (True, 1024)
            sent = [name for name, _ in weights]
            said.append(("gone through", sent))
            if rank == 0:
                args["send_mode"](UpdateInfo(sent))

    said: list[Any] = []
    calls = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
    client = SimpleNamespace(**{call: lambda *args, call=call: said.append((call, *args)) for call in calls})
    name = "vllm.distributed.weight_transfer.ipc_engine"
    stand_in = SimpleNamespace(IPCWeightTransferEngine=Engine)
    monkeypatch.setitem(sys.modules, name, stand_in)
    older.with_init_info(stand_in)
    factory = SimpleNamespace(WeightTransferTrainerFactory=SimpleNamespace())
    older.with_ipc_trainer(factory)
    info = stand_in.IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=1024)
    trainer = factory.WeightTransferTrainerFactory.trainer_init(info, client=client, source=[("a", 1), ("b", 2)])
    trainer.send_weights()
    trainer.shutdown()
    through = ("gone through", ["a", "b"])
    if rank:
        assert said == [through]
    else:
        update = ("update_weights", {"names": ["a", "b"]})
        assert said == [(calls[0], {}), (calls[1],), through, update, (calls[3],)]
