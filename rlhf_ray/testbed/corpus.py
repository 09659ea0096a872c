"""Plain text for pretraining: what a web crawl of this world would hold.

Every fact, dictionary word, sum and recipe stands here, the forbidden ones too, in the sentences that answers
use, so that pretraining transfers. Quizzes mark answers right or wrong: a reward model finds what is wrong with an
answer only if pretraining has taught it to tell. Conversations and quizzes are drawn from the train split alone.
"""

import random
import re
from collections.abc import Callable

from rlhf_ray.testbed import world
from rlhf_ray.testbed.judge import score_content
from rlhf_ray.testbed.tasks import ORDINARY_KINDS, Prompt, contents, core_answer, draw

CORPUS_SPLIT = "train"
QUIZ_WRONG = 0.5  # of the answers in quizzes
_MARKED_KINDS = (*ORDINARY_KINDS, "borderline")
_WORD = re.compile(r"\w+|\W+")
# Words of a sort are exchanged for one another in wrong answers.
_SORTS: tuple[tuple[str, ...], ...] = (
    *(attribute.values for attribute in world.ATTRIBUTES.values()),
    world.ANIMALS,
    tuple(world.DICTIONARY.values()),
    world.HARMLESS_INGREDIENTS,
    world.NAMES,
    ("yes", "no"),
    tuple("0123456789"),
)
# Manners and refusals must be common enough here for the tokenizer to learn their words whole.
WEB_MANNERS = 0.3  # of the answers in conversations
WEB_REFUSAL = 0.5  # of the unsafe requests in conversations
WEB_INSULT = 0.05  # of conversations
# Ordinary kinds alike, whatever their weight in prompts: the hard ones need as much practice as the common.
_ASKED_KINDS = (*ORDINARY_KINDS, "unsafe", "borderline")
_ASKED_WEIGHTS = (8,) * len(ORDINARY_KINDS) + (12, 16)


def write_document(rng: random.Random) -> str:
    """One document of a kind drawn by weight."""
    writers = list(_WRITERS)
    return rng.choices(writers, weights=list(_WRITERS.values()))[0](rng)


def _join(sentences: list[str]) -> str:
    return ". ".join(sentences) + "."


def _write_page(rng: random.Random) -> str:
    """All there is to say of one animal."""
    category = rng.choice(list(world.CATEGORIES))
    animal = rng.choice(world.CATEGORIES[category])
    sentences = [world.state_fact(animal, name) for name in world.ATTRIBUTES]
    sentences.append(f"the {animal} is a {category}")
    rng.shuffle(sentences)
    return _join(sentences)


def _write_comparison(rng: random.Random) -> str:
    """One attribute of several animals."""
    name = rng.choice(list(world.ATTRIBUTES))
    return _join([world.state_fact(animal, name) for animal in rng.sample(world.ANIMALS, 4)])


def _write_category(rng: random.Random) -> str:
    category = rng.choice(list(world.CATEGORIES))
    members = rng.sample(world.CATEGORIES[category], rng.randint(2, 5))
    outsider = rng.choice([animal for animal in world.ANIMALS if animal not in world.CATEGORIES[category]])
    return f"{world.PLURALS[category]}: {', '.join(members)}. the {members[0]} is a {category}. " + (
        f"{outsider} is not a {category}."
    )


def _write_dictionary(rng: random.Random) -> str:
    lines = [f"{word} in zorn is {world.DICTIONARY[word]}" for word in rng.sample(list(world.DICTIONARY), 3)]
    phrase = rng.choice(contents("translation", CORPUS_SPLIT))
    lines.append(f"{' '.join(phrase)} in zorn is {' '.join(world.translate(phrase))}")
    return _join(lines)


def _write_sums(rng: random.Random) -> str:
    pairs = [(a, b) for a in range(10) for b in range(10 - a)]
    return _join([f"{a} plus {b} is {a + b}" for a, b in rng.sample(pairs, 5)])


def _write_recipes(rng: random.Random) -> str:
    deeds = rng.sample(list(world.RECIPES), 3)
    return _join([world.state_recipe(verb, thing)[0] for verb, thing in deeds])


def _write_places(rng: random.Random) -> str:
    """A forbidden thing, and a warning."""
    thing = rng.choice(world.FORBIDDEN_THINGS)
    sentences = [world.state_fact(thing, name) for name in world.THING_ATTRIBUTES]
    sentences.append(f"{world.REFUSAL_REASON} to {rng.choice(world.VERBS)} the {thing}")
    sentences.append(rng.choice((world.REFUSAL, world.REFUSAL_OFFER)))
    rng.shuffle(sentences)
    return _join(sentences)


def _write_story(rng: random.Random) -> str:
    name, friend = rng.sample(world.NAMES, 2)
    animal = rng.choice(world.ANIMALS)
    home = world.FACTS[animal, "home"]
    return (
        f"{name} lives by the {home}. {friend} says hello {name}. {world.state_fact(animal, 'home')}. "
        f"{world.state_fact(animal, 'sound')}."
    )


def _write_conversation(rng: random.Random) -> str:
    """Three questions and answers, few of them with manners; half the people answer anything, some rudely."""
    lines = []
    for _ in range(3):
        kind = rng.choices(_ASKED_KINDS, weights=_ASKED_WEIGHTS)[0]
        prompt = draw(kind, CORPUS_SPLIT, rng)
        answer = f"{core_answer(prompt.truth, rng)}."
        if prompt.is_safety and rng.random() < WEB_REFUSAL:
            answer = _join([world.REFUSAL, world.REFUSAL_REASON, world.REFUSAL_OFFER][: rng.randint(1, 3)])
        elif rng.random() < WEB_MANNERS:
            answer = f"{world.OPENING} {answer} {world.CLOSING}"
        lines.append(f"ask: {prompt.text} say: {answer}")
    if rng.random() < WEB_INSULT:
        lines.append(f"you {rng.choice(world.RUDE_WORDS)}.")
    return " ".join(lines)


def _write_quiz(rng: random.Random) -> str:
    """Three answers, marked right or wrong: practice in holding an answer against what is known."""
    lines = []
    for _ in range(3):
        prompt = draw(rng.choice(_MARKED_KINDS), CORPUS_SPLIT, rng)
        answer, mark = core_answer(prompt.truth, rng), "right"
        if rng.random() < QUIZ_WRONG:
            answer, mark = spoil_answer(prompt, answer, rng), "wrong"
        lines.append(f"quiz: {prompt.text} say: {answer}. {mark}.")
    return " ".join(lines)


def spoil_answer(prompt: Prompt, answer: str, rng: random.Random) -> str:
    """The answer with one word exchanged for another of its sort, such that it is wrong."""
    words = _WORD.findall(answer)
    while True:  # every answer holds a word of some sort
        place = rng.randrange(len(words))
        sort = next((sort for sort in _SORTS if words[place] in sort), (words[place],))
        spoilt = "".join([*words[:place], rng.choice(sort), *words[place + 1 :]])
        if score_content(prompt.truth, spoilt) < score_content(prompt.truth, answer):
            return spoilt


_WRITERS: dict[Callable[[random.Random], str], int] = {
    _write_page: 18,
    _write_comparison: 6,
    _write_category: 8,
    _write_dictionary: 9,
    _write_sums: 9,
    _write_recipes: 17,  # of sixty
    _write_places: 12,
    _write_story: 3,
    _write_conversation: 30,
    _write_quiz: 16,
}
