"""Sampling by vLLM alone, without Ray, seeds of requests and log-probs: what `rlhf-ray bench rollout` is held against.

    python benchmarks/rollout_speed.py 1b --batch 64 --prompt-tokens 256 --response-tokens 256

Options: [--repeats 3] [--warmup 1] [--vocab-size N] [--precision bf16] [--work DIR] [--result FILE]. The shape is a
preset's name; weights are random, prompts too, and other ones each time, as in the benchmark. All answers have the same
number of tokens. Runs on CUDA where there is some, else on CPU. Writes benchmarks/results/rollout_speed_SHAPE.json.
"""

import gc
import json
import os
import time
from pathlib import Path

import torch
from measuring import RESULTS, parser_of, spread, work_directory, write_result

from cluster.hardware import gpu_names
from model.config import PRESETS, to_hf_config
from rlhf_ray.backends.engine_limits import kv_cache_bytes
from rlhf_ray.backends.rollout import _allow_amx
from rlhf_ray.data.prompts import random_prompts


def main() -> None:
    """Measures and writes the figures."""
    parser = parser_of(__doc__)
    parser.add_argument("shape", choices=list(PRESETS))
    for name, default in (
        ("batch", 64),
        ("prompt-tokens", 256),
        ("response-tokens", 256),
        ("repeats", 3),
        ("warmup", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab-size", type=int, help="by default the preset's")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as the project's engines
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    on_gpu = torch.cuda.is_available()
    preset = PRESETS[options.shape]
    config = preset.model_copy(update={"vocab_size": options.vocab_size or preset.vocab_size})
    cache = kv_cache_bytes(config, sequences=options.batch, precision=options.precision, tensor_parallel_size=1)
    with work_directory(options.work, prefix="rollout-speed-") as directory:
        (directory / "config.json").write_text(json.dumps(to_hf_config(config)), encoding="utf-8")
        engine = LLM(
            model=str(directory),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16" if options.precision == "bf16" else "float32",
            max_model_len=config.max_seq_len,
            max_num_seqs=options.batch,
            kv_cache_memory_bytes=None if on_gpu else cache,
            enforce_eager=not on_gpu,
            disable_log_stats=True,
        )
        if not on_gpu:
            engine.collective_rpc(_allow_amx)
        sampling = SamplingParams(
            temperature=1.0, max_tokens=options.response_tokens, ignore_eos=True, detokenize=False
        )
        seconds = []
        for index in range(options.warmup + options.repeats):
            drawn = random_prompts(
                options.batch, length=options.prompt_tokens, vocab_size=config.vocab_size, seed=index
            )
            prompts = [{"prompt_token_ids": tokens} for tokens in drawn.tokens]
            start = time.perf_counter()
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
            assert all(len(output.outputs[0].token_ids) == options.response_tokens for output in outputs)
        del engine
        gc.collect()
    times = spread(seconds[options.warmup :])
    found = {
        "seconds": times,
        "response_tokens_per_s": options.batch * options.response_tokens / times["median"],
        "gpus": gpu_names() if on_gpu else (),
    }
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    write_result(options.result or RESULTS / f"rollout_speed_{options.shape}.json", found, config=given)


if __name__ == "__main__":
    main()
