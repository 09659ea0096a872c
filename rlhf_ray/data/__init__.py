"""Data on its way into the models.

schemas   the Parquet tables of prompts, demonstrations, corpus and comparisons, and their rules
chat      dialogues to tokens, through a Hugging Face chat template
packing   examples into full rows, documents into a stream of rows
importers other people's files into these tables
batching  which rows make up a step, a micro-batch, a data mix: pure functions of seed and step
"""
