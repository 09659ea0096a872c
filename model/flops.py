"""What a model costs: parameters, floating-point operations, bytes.

Pure arithmetic on a ModelConfig, without torch, for the planner and for model FLOPs utilisation.
Letters: H hidden size, N query heads, K key/value heads, D head size, F feed-forward size, V vocabulary.
"""

from model.config import ModelConfig, Recompute

PEAK_FLOPS: dict[str, float] = {
    # Dense bfloat16 tensor-core peaks of the makers' data sheets, in FLOP/s. Names are matched as parts of
    # the device name, the first match winning.
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s, or None for one that is not in the table.

    Args:
        device_name: As torch.cuda.get_device_name returns it, e.g. "NVIDIA H100 80GB HBM3".
    """
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def num_parameters(config: ModelConfig, *, scalar_head: bool = False) -> int:
    """Parameters of the model; with scalar_head, of a reward or value model, which has no output projection.

    L (H N D + 2 H K D + N D H + 3 H F + 2 H) + V H (twice unless tied) + H
    """
    tables = config.vocab_size * config.hidden_size
    if scalar_head:
        tables += config.hidden_size
    elif not config.tie_embeddings:
        tables *= 2
    return num_non_embedding_parameters(config) + tables


def num_non_embedding_parameters(config: ModelConfig) -> int:
    """Parameters without the input embedding and without any head."""
    norms = 2 * config.hidden_size
    return config.num_layers * (_block_matrix_parameters(config) + norms) + config.hidden_size


def forward_flops_per_token(config: ModelConfig, context_length: int, *, with_head: bool = True) -> float:
    """FLOPs to run one token forward, averaged over a sequence of context_length tokens.

    Two per multiply-add: 2 * (matrix parameters) + L * 4 N D * (mean number of keys). The mean counts only
    keys that causality lets a token see, (context_length + 1) / 2: utilisation figures built on it are lower
    than those that count the whole square. Norms, RoPE, softmax and the embedding look-up are left out.

    Args:
        context_length: Tokens in the sequence.
        with_head: Include the output projection to the vocabulary (no for scalar heads, nor for positions
            whose log-probability is not asked for).
    """
    mean_keys = (context_length + 1) / 2
    attention = 4 * config.num_heads * config.head_dim * mean_keys
    head = 2 * config.vocab_size * config.hidden_size if with_head else 0
    return config.num_layers * (2 * _block_matrix_parameters(config) + attention) + head


def weight_bytes(config: ModelConfig, *, scalar_head: bool = False, bytes_per_parameter: int = 2) -> int:
    """Bytes of one whole copy of the weights (bfloat16 by default)."""
    return num_parameters(config, scalar_head=scalar_head) * bytes_per_parameter


def activation_bytes(
    config: ModelConfig,
    tokens: int,
    *,
    recompute: Recompute = "none",
    bytes_per_element: int = 2,
    packed_row_length: int | None = None,
    cpu_kernels: bool = False,
) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, head excluded.

    Besides the blocks: the final norm, token ids and packed rows' rotary tables.

    Args:
        tokens: Tokens of the micro-batch, padding included.
        packed_row_length: Tokens of a row that holds several examples; None where each row is one and
            attention needs no mask.
        cpu_kernels: Count what the kernels of torch's CPU build keep; they are less fused (see
            `_block_activation_bytes`).
    """
    size = bytes_per_element
    block = _block_activation_bytes(config, recompute, size, packed_row_length, cpu_kernels)
    norm = 8 * config.hidden_size + 4 if cpu_kernels else 2 * config.hidden_size * size
    # Rows that each hold one example share their rotary tables, which are small beside the rest.
    outside = norm + 8 + (2 * config.head_dim * size if packed_row_length else 0)
    return tokens * (config.num_layers * block + outside)


def recomputed_bytes(
    config: ModelConfig,
    tokens: int,
    *,
    recompute: Recompute,
    bytes_per_element: int = 2,
    packed_row_length: int | None = None,
    cpu_kernels: bool = False,
) -> int:
    """Bytes that come back while one block goes backward; arguments as of `activation_bytes`."""
    if recompute == "none":
        return 0
    more = (bytes_per_element, packed_row_length, cpu_kernels)
    kept = _block_activation_bytes(config, "selective", *more) if recompute == "selective" else 0
    return tokens * (_block_activation_bytes(config, "none", *more) - kept)


def backward_working_bytes(config: ModelConfig, tokens: int, *, bytes_per_element: int = 2) -> int:
    """Bytes of gradients in flight while the backward pass goes through a block, parameters' left out.

    At the widest place, SwiGLU's product, those of the gate and of the other branch (2 F), of the residual
    stream and of the block's output (2 H).
    """
    return tokens * bytes_per_element * 2 * (config.hidden_size + config.ffn_size)


def forward_working_bytes(config: ModelConfig, tokens: int, *, bytes_per_element: int = 2) -> int:
    """Bytes of activations alive at once where no backward pass follows.

    At the widest place, SwiGLU's product, both its inputs and itself (3 F), the residual stream and its
    norm (2 H).
    """
    return tokens * bytes_per_element * (2 * config.hidden_size + 3 * config.ffn_size)


def kv_cache_bytes_per_token(config: ModelConfig, *, bytes_per_element: int = 2) -> int:
    """Bytes that generation keeps for each token of context: keys and values of all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_element


def _block_matrix_parameters(config: ModelConfig) -> int:
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (attention + 3 * config.ffn_size)


def _block_activation_bytes(
    config: ModelConfig, recompute: Recompute, size: int, packed_row_length: int | None, cpu_kernels: bool
) -> int:
    """Bytes per token that a block keeps, by tensor.

    Full recomputation keeps the block's input (H); selective beside it what matrix products and attention make, but for
    the last product: queries and attention output (2 N D), keys and values (2 K D), the output of the attention layer
    (H), gate and up (2 F), and the softmax normaliser.

    Without recomputation, fused GPU kernels keep the inputs and outputs of two norms (4 H), queries and attention
    output (2 N D), keys and values (2 K D), gate, up, silu and their product (4 F), and in fp32 the softmax normaliser
    of each head and two norm scales. A packing mask is kept as a row of numbers per token, and keys and values
    are repeated for each query head.

    CPU kernels keep of each norm its input and its scaled input in fp32 (8 H) beside the output; attention
    there works in fp32 and, in half precision, keeps its output twice.
    """
    hidden, queries, keys = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    softmax = 4 * config.num_heads
    if recompute == "full":
        return size * hidden
    if recompute == "selective":
        attended = (4 if cpu_kernels else size) * queries  # attention on CPU works in fp32
        return size * (2 * hidden + queries + 2 * keys + 2 * config.ffn_size) + attended + softmax
    if cpu_kernels:
        norms = 2 * (8 * hidden + 4 + size * hidden)
        attention = 4 * (2 * queries + 2 * keys) + (size * queries if size < 4 else 0)
        mask = 4 * packed_row_length if packed_row_length else 0
    else:
        norms = 2 * (2 * size * hidden + 4)
        attention = size * 2 * (queries + (queries if packed_row_length else keys))
        mask = size * packed_row_length if packed_row_length else 0
    return norms + attention + softmax + mask + 4 * config.ffn_size * size
