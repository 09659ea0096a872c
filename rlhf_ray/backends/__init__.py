"""The engines under the workers: DeepSpeed, vLLM and the weight channel between them."""
