"""The recipe as a graph: what comes before the SFT model, then versions V1, V2, ... (Llama 2 §3.2.3). Imports no torch.

A version begins with a week of comparisons between the newest model and the one before it, which renew both reward
models. The newest model answers prompts, the reward models choose, and a new model learns what was chosen; on the last
version follows PPO.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from rlhf_ray.config import Config, config_with, stage_settings
from rlhf_ray.config_errors import similar
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.stages import ON_DEMAND, REFEREE, REWARDS, STAGES, Given, Made, Node, Source, given_outputs

DECODING = r" (greedy|own|T=[\d.]+)$"
"""What the evaluation adds to a label."""


class Graph:
    """Nodes, each after those it works on."""

    def __init__(self, config: Config):
        self.config = config
        self.nodes: list[Node] = []
        self.sources: dict[str, Source] = dict(given_outputs(config))
        """Where outputs are from that later nodes work on by their names."""

    def add(
        self,
        name: str,
        inputs: Mapping[str, Source],
        *,
        scope: str = "",
        makes: Mapping[str, str] | None = None,
        without: tuple[str, ...] = (),
        changes: Mapping[str, object] | None = None,
        apart: bool = False,
    ) -> Node:
        """One more node of a stage.

        Args:
            inputs: those that are not from where their names say, or are no needs of the stage.
            makes: other outputs than the stage's; what the config names is left out.
            without: needs of the stage that this node has not.
            changes: settings that have another value for it.
            apart: it makes its own beside what the config names.
        """
        stage = STAGES[name]
        wanted = {o: place for o, place in (makes or stage.makes).items() if apart or not self.is_given(o)}
        taken = [*stage.needs, *(need for need in stage.may_need if need in self.sources)]
        found = {need: self.sources[need] for need in taken if need not in (*inputs, *without)}
        own = stage_settings(self.config, name)
        node = Node(stage, {**found, **inputs}, wanted, scope, {**own, **(changes or {})})
        self.nodes.append(node)
        return node

    def add_next(self, name: str, inputs: Mapping[str, Source] | None = None, **options: object) -> None:
        """A node whose outputs later ones work on by their names."""
        node = self.add(name, inputs or {}, **options)  # type: ignore[arg-type]
        self.sources.update((output, Made(node.name, output)) for output in node.makes)

    def is_given(self, output: str) -> bool:
        """Whether the config names it."""
        return isinstance(self.sources.get(output), Given)


def recipe(config: Config, wanted: Collection[str] = ()) -> list[Node]:
    """The nodes of a config's recipe, each after those it works on; one whose outputs the config all names makes
    nothing.

    Args:
        wanted: stages that are asked for; those of `ON_DEMAND` have a node outside rounds only if they are among them.
    Raises:
        UserError: settings are for a stage that there is not, or a control has the label of one of the run's models.
    """
    for stage in config.stage_roles:
        if stage not in STAGES:
            raise UserError(f"stage_roles.{stage}: is no stage; {similar(stage, STAGES)}")
    graph = Graph(config)
    chat_model(graph)
    if config.rounds is None:
        one_version(graph, wanted)
    else:
        versions(graph)
    return graph.nodes


def node_of(config: Config, stage: str) -> Node:
    """The recipe's node of a stage that starts most roles, the last of such; what one would be where it has none."""
    found = [node for node in reversed(recipe(config)) if node.stage.name == stage]
    return max(found, key=lambda node: len(node.roles), default=Node(STAGES[stage], {}, STAGES[stage].makes))


def chat_model(graph: Graph) -> None:
    """Pretraining and supervised fine-tuning (§2, §3.1)."""
    sources = graph.sources
    for name in ("testbed", "tokenizer", "pretrain"):
        graph.add_next(name)
    start: dict[str, Source] = {}
    if "public_demonstrations" in sources and not graph.is_given("chat"):
        public = graph.add("sft", {"demonstrations": sources["public_demonstrations"]}, scope="public")
        start = {"base": Made(public.name, "chat")}
    epochs = graph.config.sft.epochs
    earlier = {"previous": f"epoch-{epochs - 1}"} if epochs > 1 and "chat" not in sources else {}
    selected = "selections" in sources and not graph.config.sft.demonstration_share
    without = ("demonstrations",) if selected else ()
    graph.add_next("sft", start, makes={"chat": "model", **earlier}, without=without)
    if graph.is_given("chat"):  # the user's own: what stands beside it is none of ours
        sources["previous"] = sources["chat"]
    sources.update(start)


def one_version(graph: Graph, wanted: Collection[str]) -> None:
    """One round of comparisons and reward models, and PPO on the SFT model."""
    sources = graph.sources
    if graph.is_given("comparisons"):
        sources.setdefault("pairs", sources["comparisons"])  # nobody needs them
    graph.add_next("pairs", answering(graph.config, sources["chat"], sources.get("previous", sources["chat"])))
    for name in ("label", "reward"):
        graph.add_next(name)
    if any(stage in wanted for stage in ON_DEMAND):
        graph.add_next("rejection-sample", sampler(graph.config, sources["chat"]), without=not_swept(graph.config))
        graph.add_next("select")
    graph.add_next("ppo")
    evaluate(graph, {"SFT": sources["chat"], "PPO": sources["policy"]})


def versions(graph: Graph) -> None:
    """V1, V2, ..., and their comparison at the end."""
    sources, rounds = graph.sources, graph.config.rounds
    assert rounds is not None
    first = sources["chat"]
    base = first if graph.is_given("chat") and not graph.is_given("base") else sources["base"]
    newest, previous = first, sources.get("previous", first)
    models = {"SFT": first}
    weeks = {"given": sources.pop("comparisons")} if graph.is_given("comparisons") else {}
    rewards: dict[str, Source] = {}
    pool: dict[str, Source] = {}
    trains = not all(map(graph.is_given, REWARDS))
    for number, version in enumerate(rounds.versions, start=1):
        scope, changes = f"v{number}", {**rounds.settings, **version.settings}
        if trains:
            sources["chat"] = newest  # reward models start from it: they know what it knows (§3.2.2)
            pairs = sampled_pairs(graph, newest, previous, scope=scope, changes=changes)
            if version.comparisons is None:
                weeks[scope] = compared(graph, pairs, scope=scope, changes=changes)
            else:
                weeks[scope] = Given(f"rounds.versions[{number - 1}].comparisons", version.comparisons, pairs)
            graph.add_next("reward", of_weeks(weeks), scope=scope, without=("comparisons",), changes=changes)
            rewards |= {f"{name}.{scope}": sources[name] for name in REWARDS if not graph.is_given(name)}
        previous = newest
        if "rejection-sampling" in version.methods:
            start = {"base": base, "chat": first, "newest": newest}[version.start]
            older = pool if version.pool == "all" else {}
            newest = rejection_sampling(graph, start, newest, older, scope=scope, changes=changes)
            models[f"V{number}"] = newest
            pool[scope] = Made(f"rejection-sample@{scope}", "samples")
        if "ppo" in version.methods:
            node = graph.add("ppo", {"chat": newest}, scope=scope, changes=changes)
            newest = Made(node.name, "policy")
            models[f"V{number} + PPO" if f"V{number}" in models else f"V{number}"] = newest
    sources["chat"] = first
    if rewards:
        graph.add("reward-accuracy", of_weeks(weeks) | rewards, changes=rounds.settings)
    simulated = trains and all(version.comparisons is None for version in rounds.versions)
    if rounds.referee and simulated and not graph.is_given(REFEREE):
        of_all: dict[str, Any] = {"scope": REFEREE, "changes": rounds.settings}
        unseen = compared(graph, sampled_pairs(graph, newest, first, **of_all), **of_all)
        place = {"helpfulness": STAGES["reward"].makes["helpfulness"]}
        judge = graph.add("reward", {"comparisons": unseen}, makes=place, apart=True, **of_all)
        sources[REFEREE] = Made(judge.name, "helpfulness")
    evaluate(graph, models)


def sampled_pairs(graph: Graph, newest: Source, previous: Source, *, scope: str, changes: Mapping[str, object]) -> Made:
    """A week's pairs of answers (§3.2.1)."""
    config = config_with(graph.config, changes)
    node = graph.add("pairs", answering(config, newest, previous), scope=scope, changes=changes)
    return Made(node.name, "pairs")


def compared(graph: Graph, pairs: Source, *, scope: str, changes: Mapping[str, object]) -> Made:
    """Their comparisons by the simulated annotator."""
    node = graph.add("label", {"pairs": pairs}, scope=scope, changes=changes)
    return Made(node.name, "comparisons")


def rejection_sampling(
    graph: Graph,
    start: Source,
    newest: Source,
    pool: Mapping[str, Source],
    *,
    scope: str,
    changes: Mapping[str, object],
) -> Source:
    """A model that has learnt the best of the newest one's answers and of those in the pool (§3.2.3)."""
    config = config_with(graph.config, changes)
    answers = sampler(config, newest)
    sampled = graph.add("rejection-sample", answers, scope=scope, without=not_swept(config), changes=changes)
    samples = {"samples": Made(sampled.name, "samples"), **{f"samples.{name}": older for name, older in pool.items()}}
    chosen = graph.add("select", samples, scope=scope, changes=changes)
    learnt = {"base": start, "selections": Made(chosen.name, "selections")}
    without = () if config.sft.demonstration_share else ("demonstrations",)
    tuned = graph.add("sft", learnt, scope=scope, makes={"chat": "model"}, without=without, changes=changes, apart=True)
    return Made(tuned.name, "chat")


def evaluate(graph: Graph, models: Mapping[str, Source]) -> None:
    """All models side by side, with those that the config names."""
    for label in graph.config.evaluate.controls:
        if label in models:
            raise UserError(f"evaluate.controls.{label}: the label is taken by this run's own; choose another")
        if re.search(DECODING, label):
            raise UserError(f"evaluate.controls.{label}: its end would name a decoding; choose another")
    inputs = {f"model.{label}": model for label, model in models.items()}
    for label, path in graph.config.evaluate.controls.items():
        inputs[f"model.{label}"] = Given(f"evaluate.controls.{label}", path)
    if graph.config.evaluate.own_temperatures is not None:
        inputs["prompts_early_stop"] = graph.sources["prompts_early_stop"]
    graph.add("evaluate", inputs)


def answering(config: Config, newest: Source, previous: Source) -> dict[str, Source]:
    """Who answers: the inputs model.0, model.1, ... by `pairs.models`."""
    names = {"newest": newest, "previous": previous}
    return {
        f"model.{place}": names.get(name) or Given(f"pairs.models[{place}]", name)
        for place, name in enumerate(config.pairs.models)
    }


def of_weeks(weeks: Mapping[str, Source]) -> dict[str, Source]:
    """Tables of comparisons as inputs of the reward models."""
    return {f"comparisons.{week}": comparisons for week, comparisons in weeks.items()}


def sampler(config: Config, newest: Source) -> dict[str, Source]:
    """The model that samples: the newest one, or a teacher in its place."""
    teacher = config.rejection_sampling.teacher
    return {"chat": newest if teacher is None else Given("rejection_sampling.teacher", teacher)}


def not_swept(config: Config) -> tuple[str, ...]:
    """What rejection sampling does without where there is one temperature only."""
    return () if len(config.rejection_sampling.temperatures) > 1 else ("prompts_early_stop",)
