"""A dialogue with a checkpoint at the terminal, through the same engine that makes rollouts."""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from model.checkpoint_files import read_config
from rlhf_ray.config import RunSection
from rlhf_ray.data.chat import encode_prompt, load_tokenizer
from rlhf_ray.errors import UserError
from rlhf_ray.workers.rollout import RolloutWorker

Dialogue = list[dict[str, str]]


def talk(checkpoint: Path, run: RunSection, *, system: str | None, temperature: float, max_new_tokens: int) -> None:
    """Reads messages from stdin and answers each on stdout; an empty line or end of input ends it.

    Args:
        run: of a settled config: the engine's precision and device.
    """
    model = read_config(checkpoint)
    worker = RolloutWorker("rollout", 0, 1)  # a plain class: no cluster is needed for one engine
    _say(f"starting the engine on {checkpoint}, in {run.precision} on {run.device}; an empty line ends the dialogue")
    with _quiet():
        worker.start(
            str(checkpoint),
            tokenizer=str(checkpoint),
            precision=run.precision,
            max_num_seqs=1,  # hence a cache of one whole dialogue
            on_gpu=run.device == "cuda",
        )
        worker.set_threads(len(os.sched_getaffinity(0)))
    tokenizer = load_tokenizer(checkpoint)

    def answer(dialogue: Dialogue) -> str:
        return worker.chat(dialogue, seed=len(dialogue), temperature=temperature, max_new_tokens=max_new_tokens)

    converse(
        answer,
        lambda dialogue: len(encode_prompt(tokenizer, dialogue)),
        system=system,
        room=model.max_seq_len - max_new_tokens,
    )


def converse(
    answer: Callable[[Dialogue], str], count: Callable[[Dialogue], int], *, system: str | None, room: int
) -> None:
    """The loop of a dialogue.

    Args:
        answer: the model's answer to a dialogue that ends in a user message.
        count: tokens of such a dialogue; raises UserError for one that cannot be encoded.
        room: most tokens that leave the model room for an answer.
    """
    opening: Dialogue = [{"role": "system", "content": system}] if system and system.strip() else []
    dialogue = list(opening)
    for text in _lines():
        message = {"role": "user", "content": text}
        try:
            if dialogue != opening and count([*dialogue, message]) > room:
                _say("the dialogue no longer fits the model's context: it starts anew")
                dialogue = list(opening)
            if (tokens := count([*dialogue, message])) > room:
                raise UserError(
                    f"this message has {tokens} tokens, at most {room} leave room for an answer of "
                    "--max-new-tokens; shorten it or lower that"
                )
        except UserError as error:
            _say(f"error: {error}")
            continue
        reply = answer([*dialogue, message])
        print(f"model> {reply}", flush=True)
        # A model may stop at once; templates take an empty answer as any other.
        dialogue += [message, {"role": "assistant", "content": reply}]


def _lines() -> Iterator[str]:
    """Lines of stdin up to an empty one or the end, asked for where someone sits at a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - gives input() editing and history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # bad bytes are told, and end nothing
    while True:
        try:
            text = input("you> " if is_terminal else "").strip("\ufeff \t\r\n\0")
        except EOFError:
            if is_terminal:
                print()
            return
        if not text:
            return
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _say(f"error: character {error.start + 1} of this message is not UTF-8; write it in UTF-8")
            continue
        yield text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what libraries print out of the dialogue, C++ included; shows it after all where they fail."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        before = [(number, os.dup(number)) for number in (1, 2)]
        failed = False
        try:
            for number, _ in before:
                os.dup2(said.fileno(), number)
            yield
        except Exception:  # not where a signal ends it
            failed = True
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in before:
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                said.seek(0)
                sys.stderr.write(said.read().decode(errors="replace"))


def _say(line: str) -> None:
    """A line that is neither question nor answer."""
    print(line, file=sys.stderr, flush=True)
