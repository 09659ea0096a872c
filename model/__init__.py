"""The Llama transformer: configuration, sizes and costs, forward pass, checkpoints.

Importing `model`, `model.config`, `model.flops` or `model.checkpoint_files` does not import torch.
"""
