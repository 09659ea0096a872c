"""A dialogue with a checkpoint at the terminal, through the same engine that makes rollouts."""

import os
from pathlib import Path

from rlhf_ray.metrics import console
from rlhf_ray.workers.rollout import RolloutWorker


def talk(checkpoint: Path, *, system: str | None, temperature: float, max_new_tokens: int) -> None:
    """Reads messages from stdin and answers each; an empty line or end of input ends it."""
    worker = RolloutWorker("rollout", 0, 1)  # a plain class: no cluster is needed for one engine
    with console.status("starting the engine"):
        worker.start(str(checkpoint), precision="bf16", max_num_seqs=8, kv_cache_gib=1, on_gpu=_has_cuda())
    worker.set_threads(len(os.sched_getaffinity(0)))
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        answer = worker.chat(
            messages, seed=len(messages), temperature=temperature, max_new_tokens=max_new_tokens
        )
        print(f"model> {answer}")
        messages.append({"role": "assistant", "content": answer})


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
