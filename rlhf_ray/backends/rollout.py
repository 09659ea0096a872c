"""Generation by vLLM: an in-process engine whose samples depend on the request seeds alone.

The only file that imports vLLM, but for its transfer of weights (`weights.py`). Where several tensor-parallel ranks
make up an engine they are processes of their own, and what they are given is pickled.
"""

import os
import resource
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from model.checkpoint_files import expected_shapes
from model.checkpoint_redundant import LM_HEAD
from model.config import ModelConfig
from rlhf_ray.backends.engine_limits import GIB, kv_cache_bytes
from rlhf_ray.backends.weights import Way, for_engine, scramble
from rlhf_ray.records import Completion, WeightBucket

_MANY_SEQUENCES = 4096
"""From here on vLLM's default of tokens a step may be less than one for each sequence, which it refuses."""
_TOKENS_A_STEP = 16_384


class RolloutEngine:
    """One vLLM engine for the model of a Hugging Face checkpoint; `load_weights` gives it weights."""

    def __init__(
        self,
        checkpoint: str,
        config: ModelConfig,
        *,
        num_ids: int,
        precision: str,
        max_num_seqs: int,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.5,
        kv_cache_gib: float | None = None,
        on_gpu: bool = False,
        shares_device: bool = False,
        way: Way = "store",
        seed: int = 0,
    ):
        """Starts the engine, with weights that mean nothing yet.

        Args:
            num_ids: rows of the vocabulary, the first, that there are to the engine: it samples none of the others,
                and its log-probs are over these.
            kv_cache_gib: on CPU, over all ranks; None for as much as the longest batch can fill.
            shares_device: other roles need it in turn, so that the engine must be able to sleep.
            way: by which a trainer's weights come (`backends/weights.py`).
        """
        _clean_environment()
        self._sockets = None
        if tensor_parallel_size > 1:  # of its ranks, which leave them behind
            self._sockets = tempfile.TemporaryDirectory(prefix="vllm-")
            os.environ["VLLM_RPC_BASE_PATH"] = self._sockets.name
        from vllm import LLM  # a heavy import, and the variables must come before it
        from vllm.config import WeightTransferConfig

        self._config = config
        self._num_ids = num_ids
        cache = (
            int(kv_cache_gib * GIB)
            if kv_cache_gib
            else kv_cache_bytes(
                config, sequences=max_num_seqs, precision=precision, tensor_parallel_size=tensor_parallel_size
            )
        )
        self._llm: Any = LLM(
            model=checkpoint,
            skip_tokenizer_init=True,  # token ids in, token ids out
            load_format="dummy",  # one reader of checkpoints, ours
            # Logits in fp32 are the trainer's; on CPU they would nearly halve the speed of a large vocabulary.
            hf_overrides={"vocab_size": num_ids, **({"head_dtype": "float32"} if on_gpu else {})},
            generation_config="vllm",  # what ends an answer is told with each request
            config_format="hf",  # files of other formats may lie beside ours
            dtype="bfloat16" if precision == "bf16" else "float32",
            max_model_len=config.max_seq_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_seqs, _TOKENS_A_STEP) if max_num_seqs > _MANY_SEQUENCES else None,
            # Where a prompt is divided between steps vLLM takes back a draw of its seed, which torch does on GPUs only.
            enable_chunked_prefill=on_gpu,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="uni" if tensor_parallel_size == 1 else "mp",
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=None if on_gpu else cache // tensor_parallel_size,
            enable_sleep_mode=on_gpu and shares_device,
            enforce_eager=not on_gpu,  # on CPU, compiling takes a minute and decodes no faster
            logprobs_mode="processed_logprobs",  # after the temperature, as the trainer's are
            weight_transfer_config=None if way == "store" else WeightTransferConfig(backend=way),
            seed=seed,
            disable_log_stats=True,
        )
        if not on_gpu:
            self._llm.collective_rpc(_allow_amx)
        self._sleeps = on_gpu and shares_device
        self._has_cache = self._has_weights = True

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

        self._wake_cache()
        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=seed,
                logprobs=0,  # the sampled token's own
                stop_token_ids=[end for end in end_ids if end < self._num_ids],  # vLLM refuses others
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
        self._wake_cache()
        # Blocks from the prefix cache have no log-probs, and may be another version's.
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate([{"prompt_token_ids": s} for s in sequences], params, use_tqdm=False)
        return [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], sequence[1:], strict=True)]
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def load_weights(self, buckets: Iterable[WeightBucket], *, scrambled: bool = False) -> None:
        """Replaces the weights in memory and forgets what was cached under the old ones.

        Args:
            buckets: all tensors of a checkpoint of the engine's model.
            scrambled: take every tensor in a form that computes something else (`scramble`).
        Raises:
            ValueError: a tensor is missing; the engine then computes nothing that makes sense.
        """
        expected = {*expected_shapes(self._config, reward_model=False), LM_HEAD}
        options = {"num_ids": self._num_ids, "tied": self._config.tie_embeddings, "scrambled": scrambled}
        self._llm.collective_rpc(_begin_weights)
        for bucket in buckets:
            self._llm.collective_rpc(_take_weights, args=(bucket,), kwargs=options)
        lacking = set().union(*self._llm.collective_rpc(_end_weights, args=(expected,)))
        self._llm.reset_prefix_cache()
        self._has_weights = not lacking
        if lacking:
            raise ValueError(f"the engine got no {min(lacking)} (one of {len(lacking)} tensors that are missing)")

    def transfer(self, method: str, **arguments: Any) -> None:
        """A step of vLLM's weight transfer on all of the engine's ranks, as its trainer's end asks for it."""
        self._llm.collective_rpc(method, kwargs=arguments)
        if method == "finish_weight_update":
            self._llm.reset_prefix_cache()
            self._has_weights = True

    def sleep(self, *, keep_weights: bool) -> None:
        """Leaves the GPU to others: forgets its cache, and its weights unless they are to be kept in host memory."""
        if self._sleeps:
            self._llm.sleep(level=1 if keep_weights else 2)
            self._has_weights, self._has_cache = keep_weights, False

    def wake(self) -> None:
        """Has its weights again, or room for what `load_weights` must bring; its cache once it is wanted."""
        if self._sleeps:
            self._llm.wake_up(tags=["weights"])

    @property
    def has_weights(self) -> bool:
        """Whether it has any that mean something: none where it has slept without keeping them."""
        return self._has_weights

    def _wake_cache(self) -> None:
        """Others have left the GPU by now."""
        assert self._has_weights, "an engine that slept needs weights before it generates"
        if not self._has_cache:
            self._llm.wake_up(tags=["kv_cache"])
            self._has_cache = True

    def close(self) -> None:
        """Frees the engine, and what its ranks speak with each other by: shared memory and sockets."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        if self._sockets is not None:
            self._sockets.cleanup()

    def peak_memory_gib(self) -> float:
        """Highest memory so far of the engine's largest process, GiB: allocated on the GPU, or resident."""
        return max(self._llm.collective_rpc(_peak_memory_gib))


# --- what runs in the engine's own processes: their `worker` is vLLM's ----------------------------------------------


def _allow_amx(worker: Any) -> None:
    """Asks the kernel for the CPU's tile registers, before the first pass through a model.

    vLLM's bf16 attention takes AMX tiles wherever the CPU has them, and the kernel ends a process by SIGILL that has
    not asked for them. torch and oneDNN ask before their products; vLLM's kernel for small weights does not.
    """
    getattr(torch.cpu, "_init_amx", bool)()


def _begin_weights(worker: Any) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    if worker._weight_update_active or getattr(worker, "given", None):
        _finish_layers(worker)  # what was broken off: layers that have half of their tensors would count them on
    worker._weight_update_active = False  # of a trainer that has not come to its end
    initialize_layerwise_reload(worker.model_runner.get_model())
    worker.given, worker.filled = set(), set()


def _take_weights(worker: Any, bucket: WeightBucket, *, num_ids: int, tied: bool, scrambled: bool) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        weights = list(for_engine(bucket.tensors(), num_ids=num_ids, tied=tied))
        worker.given.update(name for name, _ in weights)
        changed = ((name, scramble(tensor) if scrambled else tensor) for name, tensor in weights)
        worker.filled |= worker.model_runner.get_model().load_weights(changed)


def _end_weights(worker: Any, expected: set[str]) -> set[str]:
    """Puts what was taken in place; returns the tensors that are missing, and parameters that nothing was taken for.

    Both, since one parameter holds several tensors: of a missing one it keeps whatever is in the memory.
    """
    _finish_layers(worker)
    parameters = {name for name, _ in worker.model_runner.get_model().named_parameters()}
    lacking = (expected - worker.given) | (parameters - worker.filled)
    worker.given, worker.filled = set(), set()
    return lacking


def _finish_layers(worker: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)


def _peak_memory_gib(worker: Any) -> float:
    if worker.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clean_environment() -> None:
    """Leaves vLLM no variables but ours: it takes ranks, addresses and cache sizes from there over what it is told.

    A trained role, torchrun or a batch system may have set them.
    """
    for name in list(os.environ):
        if name in _RENDEZVOUS or name.startswith(("TORCHELASTIC_", "VLLM_DP_", "VLLM_CPU_KVCACHE_SPACE")):
            del os.environ[name]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process, errors reach us whole
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


_RENDEZVOUS = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
}


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    return Completion(
        tokens=tokens,
        logprobs=[entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)],
        finished=output.finish_reason == "stop",
    )
