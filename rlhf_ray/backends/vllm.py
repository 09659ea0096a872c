"""Generation by vLLM: an in-process engine whose samples depend on the request seeds alone.

The only file that imports vLLM.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    tokens: list[int]
    """Sampled token ids, the one that ended the answer included."""
    logprobs: list[float]
    """Log-prob of each token at the sampling temperature."""
    finished: bool
    """False where the length limit cut the answer off."""


class Engine:
    """One vLLM engine with the weights of a Hugging Face checkpoint."""

    def __init__(
        self,
        checkpoint: str,
        *,
        max_seq_len: int,
        precision: str,
        max_num_seqs: int,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.5,
        kv_cache_gib: float = 1.0,
        on_gpu: bool = False,
        seed: int = 0,
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process, errors reach us whole
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM  # a heavy import, and the variables above must come before it

        # vLLM's bf16 attention takes AMX tiles wherever the CPU has them, and the kernel ends a process by SIGILL that
        # has not asked for them. torch and oneDNN ask before their products; vLLM's kernel for small weights does not.
        getattr(torch.cpu, "_init_amx", bool)()

        self._llm: Any = LLM(
            model=checkpoint,
            skip_tokenizer_init=True,  # token ids in, token ids out
            generation_config="vllm",  # what ends an answer is told with each request
            config_format="hf",  # files of other formats may lie beside ours
            load_format="safetensors",
            dtype="bfloat16" if precision == "bf16" else "float32",
            max_model_len=max_seq_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="uni" if tensor_parallel_size == 1 else "mp",
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=None if on_gpu else int(kv_cache_gib * 2**30),
            enforce_eager=not on_gpu,  # on CPU, compiling takes a minute and decodes no faster
            logprobs_mode="processed_logprobs",  # after the temperature, as the trainer's are
            seed=seed,
            disable_log_stats=True,
        )

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        temperature: float,
        max_new_tokens: int,
        end_ids: Sequence[int],
    ) -> list[Completion]:
        """Samples one answer per prompt; temperature 0 is greedy, top-p and top-k are off.

        Args:
            end_ids: tokens that end an answer; without any none ends before `max_new_tokens`.
        """
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=seed,
                logprobs=0,  # the sampled token's own
                stop_token_ids=list(end_ids),
                ignore_eos=True,  # the engine's own, from the checkpoint's config.json
                detokenize=False,
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [_completion(output.outputs[0]) for output in outputs]

    def prompt_logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Log-probs at temperature 1 of tokens 1.. of each sequence, to hold against the trainer's."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        # Blocks from the prefix cache have no log-probs, and may be another version's.
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate([{"prompt_token_ids": s} for s in sequences], params, use_tqdm=False)
        return [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], sequence[1:], strict=True)]
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights in memory and forgets what was cached under the old ones."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _with_output_head(weights)})
        self._llm.reset_prefix_cache()


def _with_output_head(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Tied checkpoints carry no lm_head.weight, and without it the engine's packed output projection would silently
    keep the old weights.
    """
    embedding: Tensor | None = None
    has_head = False
    for name, tensor in weights:
        if name == "model.embed_tokens.weight":
            embedding = tensor
        has_head = has_head or name == "lm_head.weight"
        yield name, tensor
    if not has_head:
        assert embedding is not None, "weights must contain model.embed_tokens.weight"
        yield "lm_head.weight", embedding


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    return Completion(
        tokens=tokens,
        logprobs=[entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)],
        finished=output.finish_reason == "stop",
    )
