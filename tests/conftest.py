"""One compute thread per process, no calls home, and `gpu` tests skipped where there is no CUDA device."""

import os
import signal
import sys

# Before torch is imported: its thread pools read these once. Ray's and vLLM's processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, nohup has them ignore a hang-up, and what they
# start would inherit that: the tests of signals would wait for ever. A handler, unlike SIG_IGN, does not pass to a new
# program.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device; imports torch only if there are such tests."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def call(monkeypatch, capsys):
    """The entry point in this process: (code, stdout, stderr)."""
    from rlhf_ray.cli import main as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlhf-ray", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run
