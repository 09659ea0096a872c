"""A small language world in which a program knows whether an answer is helpful and safe.

Reward curves prove little by themselves, because reward models can be gamed. Here the truth is known:
`judge` scores any answer exactly, so that the claims of the recipe can be measured instead of believed.

    world.py         what is true in the world: facts, dictionary, deeds, words that must not be said
    tasks.py         eleven kinds of request, and which of their contents belong to which split
    judge.py         helpfulness and safety of an answer; averages over a set of prompts
    annotator.py     a simulated annotator who compares two answers through the judge, with noise
    demonstrator.py  an imperfect human who writes the demonstrations
    corpus.py        plain text for pretraining
    generate.py      writes all of it as Parquet
    version.py       TESTBED_VERSION, which stands beside every result
"""
