"""Preflight: what can be wrong before a run is one line that names field, value, rule and remedy."""

import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_steps import begin, entry_of, finish, finish_all
from tiny_inputs import ANSWER, USER, comparison, prompt, write_checkpoint, write_rows, write_tokenizer

from cluster import hardware
from rlhf_ray import machine
from rlhf_ray.config import parse_config
from rlhf_ray.data.chat import load_tokenizer
from rlhf_ray.data.schemas import GUIDELINES
from rlhf_ray.data.shares import hash_share
from rlhf_ray.errors import UserError
from rlhf_ray.preflight import run as preflight
from rlhf_ray.preflight.run import SMALLEST_VOCABULARY, check_run, check_submission
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.ledger import Ledger
from rlhf_ray.recipe.rounds import recipe
from rlhf_ray.recipe.tokenizer import train_tokenizer
from rlhf_ray.run_state import RunDir

TINY = {
    "run": {"device": "cpu"},
    "model": {"preset": "tiny"},
    "pretrain": {"seq_len": 64, "batch_size": 4, "held_out": 0.3},
    "sft": {"seq_len": 48, "batch_size": 4, "held_out": 0.3},
    "pairs": {"max_new_tokens": 16},
    "reward": {"max_length": 48, "held_out": 0.3},
    "rejection_sampling": {"max_new_tokens": 16},
    "ppo": {"max_new_tokens": 16, "batch_size": 8, "minibatch_size": 4},
    "evaluate": {"max_new_tokens": 16},
}


HELD = next(m for m in (comparison(n)["messages"] for n in range(99)) if hash_share(str(m)) < 0.3)
USERS = [{**USER, "content": f"which is fish {n}?"} for n in range(20)]


def comparisons(num=20):
    """As many of each guideline, so that some of each are held out and some not."""
    return [comparison(n, guideline=GUIDELINES[n % 2]) for n in range(2 * num)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Inputs that are all right: checkpoints with their tokenizer, tables."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("base", "chat", "helpfulness", "safety"):
        directory = write_checkpoint(root / name, reward_model=name in ("helpfulness", "safety"))
        write_tokenizer(directory)
    write_rows(root / "comparisons", "comparisons", comparisons())
    write_rows(root / "demonstrations", "demonstrations", [{"messages": [u, ANSWER], "kind": "k"} for u in USERS])
    write_rows(root / "corpus", "corpus", [{"text": f"the cat {n}."} for n in range(20)])
    for name in ("train", "early_stop", "annotation", "test"):
        write_rows(root / f"prompts_{name}", "prompts", [prompt(n, truth="{}") for n in range(4)])
    return root


def inputs(files, *names):
    return {name: str(files / name) for name in names}


def config(*parts, **sections):
    """The tiny config with tables laid over its own."""
    raw = {section: dict(values) for section, values in TINY.items()}
    for part in (*parts, sections):
        for section, values in part.items():
            raw.setdefault(section, {}).update(values)
    return parse_config(raw)


def complaint(given, out, *stages):
    with pytest.raises(UserError) as caught:
        check_run(given, out, stages or None)
    line = str(caught.value)
    assert "\n" not in line
    assert not out.exists(), "preflight must leave nothing behind"
    return line


def test_a_sound_run_passes_and_leaves_nothing(tmp_path, files):
    check_run(config(), tmp_path / "new")
    check_run(
        config(
            inputs=inputs(files, "chat", "helpfulness", "safety"),
            data=inputs(files, "prompts_train", "prompts_early_stop"),
        ),
        tmp_path / "new",
        ("ppo",),
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"run": {"stages": ["stf"]}}, "run.stages='stf' is no stage; did you mean sft?"),
        ({"model": {"preset": "tinny"}}, "model.preset='tinny' is not known; did you mean tiny?"),
        (
            {"ppo": {"batch_size": 500, "minibatch_size": 64}},
            "ppo.batch_size=500 must be divisible by ppo.minibatch_size=64; change one of them, for example "
            "ppo.batch_size=448",
        ),
        (
            {"ppo": {"num_steps": 3, "value_warmup_steps": 3}},
            "ppo.value_warmup_steps=3 must be less than ppo.num_steps=3: the policy learns only after them",
        ),
        ({"ppo": {"num_chunks": 3}}, "ppo.batch_size=8 must be divisible by ppo.num_chunks=3;"),
        (
            {"cluster": {"cores": 4}, "roles": {"policy": {"num_ranks": 3}}},
            "pretrain.batch_size=4 must be divisible by roles.policy.num_ranks=3;",
        ),
        (
            {"cluster": {"cores": 4}, "roles": {"value": {"num_ranks": 2}}},
            "ppo.num_chunks=1 must be divisible by roles.value.num_ranks=2;",
        ),
        (
            {"cluster": {"cores": 2}, "roles": {"reference": {"num_ranks": 3}}},
            "roles.reference.num_ranks=3 must be at most 2, the cores of this machine",
        ),
        (
            {"cluster": {"cores": 2}, "roles": {"rollout": {"num_engines": 3}}},
            "roles.rollout.num_engines=3 must be at most 2,",
        ),
        (
            {"cluster": {"cores": 3}, "roles": {"rollout": {"tensor_parallel_size": 2, "num_engines": 2}}},
            "roles.rollout.num_engines x tensor_parallel_size=4 must be at most 3, the cores of this machine",
        ),
        (
            {"cluster": {"cores": 3}, "roles": {"rollout": {"tensor_parallel_size": 3}}},
            "roles.rollout.tensor_parallel_size=3 does not divide the 4 attention heads of model.preset='tiny'; set it",
        ),
        (
            {"roles": {"rollout": {"kv_cache_gib": 1e-5}}},
            "roles.rollout.kv_cache_gib=1e-05 must be at least 0.00019: one whole context of model.preset='tiny', 256",
        ),
        ({"tokenizer": {"vocab_size": 285}}, "tokenizer.vocab_size=285 must be at least 286"),
        ({"pretrain": {"seq_len": 300}}, "pretrain.seq_len=300 must be at most 256: the model's context"),
        ({"ppo": {"max_new_tokens": 256}}, "ppo.max_new_tokens=256 must be at most 255: the model's context"),
        ({"cluster": {"address": "head"}}, "cluster.address='head': must read HOST:PORT, or auto for the cluster of"),
        ({"cluster": {"address": "127.0.0.1:1"}}, "cluster.address='127.0.0.1:1': no cluster answers there"),
        ({"cluster": {"address": "ray://127.0.0.1:1"}}, "cluster.address='ray://127.0.0.1:1': is one of Ray Client"),
    ],
)
def test_settings(tmp_path, sections, line):
    assert complaint(config(sections), tmp_path / "new").startswith(line)


def test_rules_of_stages_that_do_not_run_are_not_held_against_a_run(tmp_path):
    check_run(config(ppo={"batch_size": 7}, run={"stages": ["testbed", "tokenizer", "pretrain"]}), tmp_path)


@pytest.fixture
def gpus(monkeypatch):
    """Gives this machine a number of GPUs and a torch that can use them."""
    monkeypatch.setattr(machine, "is_cpu_build", lambda: False)
    return lambda number: monkeypatch.setattr(hardware, "count_gpus", lambda: number)


def test_gpus_are_counted(tmp_path, gpus):
    gpus(0)
    line = complaint(config(run={"device": "cuda"}), tmp_path / "new")
    assert line == "run.device='cuda': this machine has no NVIDIA GPU; set run.device=cpu or cluster.address"
    gpus(2)
    roles = {"policy": {"num_ranks": 2}, "helpfulness": {"num_ranks": 3}}
    on_gpu = config(run={"device": "auto"}, roles=roles)
    stages = ("testbed", "tokenizer", "pretrain", "sft", "pairs", "label", "reward")
    line = complaint(on_gpu, tmp_path / "new", *stages)
    assert line == (
        "helpfulness: rank 2 of 3 has no place: each rank of a role needs a GPU without another of its ranks, on "
        "1 node of 2 GPUs; lower num_ranks, or give cluster.address of a larger cluster"
    )
    check_run(on_gpu, tmp_path / "new", stages[:3])  # roles that a stage does not use have no seats in it
    fewer = config(run={"device": "auto"}, roles=roles, stage_roles={"reward": {"helpfulness": {"num_ranks": 1}}})
    check_run(fewer, tmp_path / "new", stages)


def test_only_models_that_a_stage_starts_take_gpus(gpus):
    gpus(1)

    def check(stages, **inputs):
        given = {"run": {"device": "auto"}, "inputs": inputs, "roles": {"safety": {"num_ranks": 2}}}
        preflight.check_ranks(machine.settled(config(**given)), stages)

    with pytest.raises(UserError, match="safety: rank 1 of 2 has no place"):
        check(["reward"])
    check(["reward"], safety="m:f")
    with pytest.raises(UserError, match="safety: rank 1 of 2 has no place"):
        check(["ppo"], helpfulness="models/help", safety="models/safe")
    check(["ppo"], helpfulness="m:f", safety="m:g")  # the four others share it


@pytest.mark.parametrize("number", range(1, 9))
def test_roles_of_one_rank_share_what_gpus_there_are(tmp_path, gpus, number):
    gpus(number)
    check_run(config(run={"device": "auto"}), tmp_path / "new")


def test_gpus_that_cannot_be(tmp_path, gpus, monkeypatch):
    gpus(8)
    for given, line in (
        ({"policy": {"num_ranks": 2, "gpus": [3]}}, "policy: gpus=[3] must be 2 numbers: 2 ranks of 1; "),
        ({"policy": {"num_ranks": 2, "gpus": [3, 3]}}, "policy: two of its ranks would meet on a GPU of gpus=[3, 3]; "),
        ({"value": {"gpus": [8]}}, "value: there is no GPU 8: they number from 0 to 7; "),
    ):
        said = complaint(config(run={"device": "cuda"}, ppo={"num_chunks": 2}, roles=given), tmp_path / "new")
        assert said.startswith(line) and said.endswith("; lower num_ranks, or give cluster.address of a larger cluster")
    apart = {"policy": {"num_ranks": 2, "gpus": [3, 5]}}
    check_run(config(run={"device": "cuda"}, ppo={"num_chunks": 2}, roles=apart), tmp_path / "new")
    monkeypatch.setattr(machine, "is_cpu_build", lambda: True)
    line = complaint(config(run={"device": "cuda"}), tmp_path / "new")
    assert line.startswith("run.device='cuda': the torch installed here is built for CPUs; ")


def test_the_cluster_of_ray_address_is_checked_as_one_that_the_config_names(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    line = complaint(config(), tmp_path / "new")
    assert line.startswith("RAY_ADDRESS='127.0.0.1:1': no cluster answers there (")
    assert line.endswith("start one with `ray start --head`, or set cluster.address=local for an embedded one")
    check_run(config(cluster={"address": "local"}), tmp_path / "new")
    line = complaint(config(cluster={"address": "127.0.0.1:2"}), tmp_path / "new")
    assert line.startswith("cluster.address='127.0.0.1:2': ")


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "run"
    with pytest.raises(UserError, match=r"--out .*/file/run: .*/file is a file; choose a directory"):
        check_run(config(), below_a_file)
    if os.path.isdir("/proc/sys"):  # a superuser may write where permission bits say so, but not there
        with pytest.raises(UserError, match=r"--out /proc/sys/run: /proc/sys cannot be written"):
            check_run(config(), Path("/proc/sys/run"))


def test_a_missing_or_truncated_checkpoint(tmp_path, files):
    missing = config(inputs={"base": str(tmp_path / "nowhere")})
    assert complaint(missing, tmp_path / "new") == (
        f"inputs.base='{tmp_path}/nowhere': no such checkpoint directory; give a Llama checkpoint"
    )
    cut = write_checkpoint(tmp_path / "cut")
    write_tokenizer(cut)
    weights = cut / "model.safetensors"
    whole = weights.stat().st_size
    os.truncate(weights, whole - 1)
    assert complaint(config(inputs={"chat": str(cut)}), tmp_path / "new") == (
        f"inputs.chat='{cut}': model.safetensors: truncated: {whole - 1} bytes, should be {whole}; copy or "
        "download it again; give a Llama checkpoint"
    )


def test_the_wrong_kind_of_model(tmp_path, files):
    swapped = config(inputs={"chat": str(files / "safety")})
    assert "is a reward model (LlamaForSequenceClassification) where a language model is needed" in complaint(
        swapped, tmp_path / "new"
    )
    swapped = config(inputs={**inputs(files, "chat", "safety"), "helpfulness": str(files / "chat")})
    line = complaint(swapped, tmp_path / "new")
    assert line.startswith(f"inputs.helpfulness='{files}/chat' is a language model (LlamaForCausalLM) where a")
    swapped = config(inputs={**inputs(files, "chat"), "referee": str(files / "chat")})
    assert complaint(swapped, tmp_path / "new").startswith(f"inputs.referee='{files}/chat' is a language model")
    unknown = config(inputs={**inputs(files, "chat"), "referee": "no.module:f"})
    assert complaint(unknown, tmp_path / "new").startswith("inputs.referee: ")


def test_a_model_that_answers_is_checked_too(tmp_path, files):
    given = config(inputs=inputs(files, "chat"), pairs={"models": ["newest", str(files / "safety")]})
    assert complaint(given, tmp_path / "new").startswith(f"pairs.models[1]='{files}/safety' is a reward model")


def test_a_control_to_evaluate_is_checked_too(tmp_path, files):
    given = config(inputs=inputs(files, "chat"), evaluate={"controls": {"SFT long": str(tmp_path / "nowhere")}})
    line = complaint(given, tmp_path / "new")
    assert line.startswith(f"evaluate.controls.SFT long='{tmp_path}/nowhere': no such checkpoint directory")


def test_a_control_has_a_label_of_its_own(tmp_path, files):
    given = config(inputs=inputs(files, "chat"), evaluate={"controls": {"PPO": str(files / "chat")}})
    assert complaint(given, tmp_path / "new").startswith("evaluate.controls.PPO: the label is taken")


def test_tokenizers_that_do_not_fit(tmp_path, files):
    small = write_checkpoint(tmp_path / "small", vocab_size=290)
    line = complaint(config(inputs={"tokenizer": str(files / "base"), "base": str(small)}), tmp_path / "new")
    assert line.startswith("inputs.base: the model's vocab_size=290 does not fit the tokenizer of inputs.tokenizer")
    bare = config(inputs={"base": str(small)})
    assert complaint(bare, tmp_path / "new").endswith("has no tokenizer.json; set inputs.tokenizer to its tokenizer")
    empty = tmp_path / "empty"
    empty.mkdir()
    line = complaint(config(inputs={"tokenizer": str(empty)}), tmp_path / "new")
    assert line == (
        f"inputs.tokenizer='{empty}': has no tokenizer.json; give the directory of a Hugging Face fast tokenizer"
    )
    (empty / "tokenizer.json").write_text("{")
    assert "tokenizer.json cannot be read" in complaint(config(inputs={"tokenizer": str(empty)}), tmp_path / "new")


def test_models_of_different_tokenizers(tmp_path, files):
    other = write_checkpoint(tmp_path / "other", reward_model=True)
    write_tokenizer(other, texts=["quite other words here, and there too."] * 9)
    given = config(inputs={**inputs(files, "chat"), "helpfulness": str(other)})
    assert complaint(given, tmp_path / "new") == (
        f"inputs.helpfulness='{other}' has another tokenizer than inputs.chat='{files}/chat' ('0' is 265 there and 264 "
        "here); give models that share one tokenizer"
    )


def test_a_reward_model_may_know_tokens_that_the_policy_never_emits(tmp_path, files):
    reward = write_checkpoint(tmp_path / "reward", reward_model=True, vocab_size=301)
    tokenizer = load_tokenizer(write_tokenizer(reward))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(reward)
    check_run(config(inputs={**inputs(files, "chat"), "helpfulness": str(reward)}), tmp_path / "new", ["testbed"])
    # The other way round the policy could emit what the reward model has never heard of.
    chat = write_checkpoint(tmp_path / "chat", vocab_size=301)
    tokenizer.save_pretrained(chat)
    given = config(inputs={"chat": str(chat), **inputs(files, "safety")})
    assert "inputs.safety: the model's vocab_size=300 does not fit" in complaint(given, tmp_path / "new")
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "pad_token")
    tokenizer.save_pretrained(reward)
    given = config(inputs={**inputs(files, "chat"), "helpfulness": str(reward)})
    assert "(its answers end in '[PAD]', not in '</s>')" in complaint(given, tmp_path / "new")


def test_weights_that_nobody_reads_are_told(tmp_path, files, capsys):
    model = write_checkpoint(tmp_path / "m")
    write_tokenizer(model)
    (model / "adapter_model.safetensors").write_bytes(b"x")
    check_run(config(inputs={"base": str(model)}), tmp_path / "new", ["testbed"])
    told = " ".join(capsys.readouterr().err.split())
    assert "adapter_model.safetensors: not read, only model.safetensors; an adapter must be merged" in told


def test_vocabularies_may_be_padded_to_any_size(tmp_path, files, capsys):
    wide = write_checkpoint(tmp_path / "wide", vocab_size=5000)
    write_tokenizer(wide)
    check_run(config(inputs={"base": str(wide)}), tmp_path / "new", ["testbed"])
    assert "padded" not in capsys.readouterr().err
    (wide / "tokenizer.json").unlink()  # then nothing but the size tells
    given = config(inputs={"base": str(wide), "tokenizer": str(files / "base")})
    check_run(given, tmp_path / "new", ["testbed"])
    told = " ".join(capsys.readouterr().err.split())
    assert "vocab_size=5000 is far more than the 300 ids of the tokenizer of inputs.tokenizer: right for a pad" in told


def test_a_tokenizer_with_a_template_of_its_own_may_be_given_to_a_language_model(tmp_path, files):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t"))
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "pad_token")
    tokenizer.save_pretrained(tmp_path / "t")
    check_run(config(inputs={"tokenizer": str(tmp_path / "t"), **inputs(files, "base")}), tmp_path / "new", ["testbed"])


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("message['content'] + eos_token", "message['content'] + 'the end.'", "closes an answer with no special token"),
        ("message['content'] + '[/INST]'", "message['content'][:5] + '[/INST]'", "messages[0].content (role user)"),
        ("bos_token + '[INST]'", "(messages | length | string) + '[INST]'", "rewrites earlier turns"),
        ("bos_token + '[INST]'", "bos_token + nothing + '[INST]'", "cannot be rendered ('nothing' is undefined)"),
    ],
)
def test_a_template_that_training_could_not_use_is_told_before(tmp_path, files, old, new, line):
    directory = write_tokenizer(tmp_path / "tokenizer")
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text().replace(old, new))
    told = complaint(config(inputs={"tokenizer": str(directory), **inputs(files, "base")}), tmp_path / "new")
    assert told.startswith(f"inputs.tokenizer='{directory}': ") and line in told


def test_a_template_that_takes_one_exchange_alone_is_told_where_there_are_more(tmp_path, files):
    directory = write_tokenizer(tmp_path / "tokenizer")
    template = directory / "chat_template.jinja"
    template.write_text("{%- if messages | length > 2 -%}{{- 'x' -}}{%- endif -%}" + template.read_text())
    one, two = [USER, ANSWER], [USER, ANSWER] * 2
    table = write_rows(tmp_path / "d", "demonstrations", [{"messages": rows, "kind": "k"} for rows in (one, one, two)])
    given = config(inputs={"tokenizer": str(directory), **inputs(files, "base")}, data={"demonstrations": table})
    line = complaint(given, tmp_path / "new", "sft")
    assert line.startswith(f"data.demonstrations: {table} row 2: ") and "rewrites earlier turns" in line


def test_a_template_that_drops_system_messages_is_told_where_there_are_some(tmp_path, files):
    directory = write_tokenizer(tmp_path / "tokenizer")
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text().replace("messages[0]['content']", "''"))
    questions = [{**USER, "content": f"which is a fish {number}?"} for number in range(20)]  # some are held out
    rows = [{"messages": [question, ANSWER], "kind": "k"} for question in questions]
    # Shorter than the marks around it, and a part of the question.
    rows.append({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "kind": "k"})
    for count in (20, 21):
        table = write_rows(tmp_path / f"{count}.parquet", "demonstrations", rows[:count])
        given = config(inputs={"tokenizer": str(directory), **inputs(files, "base")}, data={"demonstrations": table})
        if count == 20:
            check_run(given, tmp_path / "new", ["sft"])
        else:
            line = f"data.demonstrations: {table} row 20: messages[0].content (role system)"
            assert complaint(given, tmp_path / "new", "sft").startswith(line)


def test_a_tokenizer_without_a_template(tmp_path, files):
    directory = write_tokenizer(tmp_path / "tokenizer")
    (directory / "chat_template.jinja").unlink()
    assert complaint(config(inputs={"tokenizer": str(directory)}), tmp_path / "new").endswith(
        "the tokenizer has no chat_template; set one in its tokenizer_config.json"
    )


@pytest.mark.parametrize(
    ("name", "kind", "rows", "line"),
    [
        ("corpus", "corpus", [], r"data\.corpus: \S+: has 0 rows and must have at least one"),
        (
            "comparisons",
            "comparisons",
            [comparison(0), comparison(1, chosen="")],
            r"data\.comparisons: \S+ comparisons row 1: chosen='' must not be empty; give the chosen answer or drop",
        ),
        (
            "comparisons",
            "comparisons",
            [comparison(0), comparison(1, strength=None)],
            r"data\.comparisons: \S+ row 1 has no strength and reward\.margin=small needs it; .*margin=none",
        ),
        (
            "prompts_train",
            "prompts",
            [prompt(0), prompt(0)],
            r"data\.prompts_train: \S+ prompts row 1: prompt_id='p0' is that of row 0 too",
        ),
        (
            "prompts_annotation",
            "prompts",
            [prompt(0, truth="{}"), prompt(1)],
            r"data\.prompts_annotation: \S+ row 1 has truth='' and the simulated annotator .* comparisons",
        ),
        # The context is 64 and an answer 16: 48 are left.
        (
            "prompts_train",
            "prompts",
            [prompt(0), prompt(1, "carp " * 60)],
            r"data\.prompts_train: \S+ row 1: has \d+ tokens, at most 48 fit: the context of 64 less "
            r"ppo\.max_new_tokens=16; shorten the prompt or lower that",
        ),
        (
            "demonstrations",
            "demonstrations",
            [{"messages": [USER, {**ANSWER, "content": "carp " * 60}], "kind": "k"}],
            r"data\.demonstrations: \S+ row 0: has \d+ tokens, at most 48 fit: sft\.seq_len=48; raise",
        ),
        (
            "comparisons",
            "comparisons",
            [comparison(0, rejected="hen " * 60)],
            r"data\.comparisons: \S+ row 0: has \d+ tokens, at most 48 fit: reward\.max_length=48; raise",
        ),
        (
            "prompts_test",
            "prompts",
            [prompt(0, "ignore [/INST] that")],
            r"data\.prompts_test: \S+ row 0 holds the special token '\[/INST\]', which would end",
        ),
    ],
)
def test_tables(tmp_path, files, name, kind, rows, line):
    path = write_rows(tmp_path / "table", kind, rows)
    # A base model, so that every later stage runs.
    given = config(inputs=inputs(files, "base"), data={name: path})
    assert re.match(line, complaint(given, tmp_path / "new"))


def test_broken_rows_are_listed_ten_and_a_count(tmp_path, files, capsys):
    rows = [prompt(n, "say </s>" if n % 2 else "fish?" + " carp" * 60 * (n == 4)) for n in range(30)]
    given = config(inputs=inputs(files, "base"), data={"prompts_test": write_rows(tmp_path / "p", "prompts", rows)})
    line = complaint(given, tmp_path / "new")
    assert line.startswith(f"data.prompts_test: {tmp_path}/p row 1 holds the special token '</s>'")
    assert line.endswith("(the first of 16 problems in 30 rows, 6 of them not shown)")
    shown = capsys.readouterr().err.splitlines()
    assert [text.split()[1].rstrip(":") for text in shown] == ["1", "3", "4", "5", "7", "9", "11", "13", "15", "17"]


def test_every_row_that_is_too_long_is_found(tmp_path, files, monkeypatch):
    # More of them than the rows that are counted where all fit.
    monkeypatch.setattr("rlhf_ray.preflight.inputs.LONGEST_ROWS", 2)
    rows = [prompt(n, "carp " * (60 if n < 5 else 1)) for n in range(20)]
    given = config(inputs=inputs(files, "base"), data={"prompts_test": write_rows(tmp_path / "p", "prompts", rows)})
    assert complaint(given, tmp_path / "new").endswith("(the first of 5 problems in 20 rows)")


HELP, SAFE = (comparisons()[place::2] for place in (0, 1))


@pytest.mark.parametrize(
    ("rows", "sections", "line"),
    [
        (
            HELP,
            {},
            r"has 0 safety comparisons to train on, and the safety model is made of them; import some with "
            r"--guideline safety, name a model or a function in inputs\.safety, or set reward\.safety_share=0 to train "
            r"it on the \d+ others",
        ),
        (SAFE, {}, r"has 0 helpfulness comparisons to train on, .* or set reward\.helpfulness_share=0 to"),
        (
            [*HELP, comparison(101, guideline="safety", messages=HELD)],
            {},
            r"all its safety comparisons are held out, .*",
        ),
        (HELP[:2] + SAFE[:2], {"reward": {"held_out": 1e-9}}, r"none of its 4 comparisons is held out; give more, .*"),
    ],
)
def test_comparisons_that_a_reward_model_cannot_be_made_of(tmp_path, files, rows, sections, line):
    path = write_rows(tmp_path / "c", "comparisons", rows)
    given = config(sections, inputs=inputs(files, "chat"), data={"comparisons": path})
    assert re.match(rf"data\.comparisons: \S+/c: {line}", complaint(given, tmp_path / "new", "reward"))


def test_prompts_whose_comparisons_a_reward_model_could_not_be_made_of(tmp_path, files):
    for tagged in (True, False):
        rows = [prompt(n, f"which {n}?", truth="{}", is_safety=tagged and n % 2 == 0) for n in range(40)]
        data = {"prompts_annotation": write_rows(tmp_path / "p", "prompts", rows)}
        given = config(inputs=inputs(files, "chat"), data=data)
        if tagged:
            check_run(given, tmp_path / "new", ("pairs", "label", "reward"))
    line = complaint(given, tmp_path / "new", "pairs", "label", "reward")
    assert line.startswith(f"data.prompts_annotation: {tmp_path}/p: has 0 safety comparisons to train on")


def test_what_the_remedies_for_one_guideline_say_helps(tmp_path, files):
    for rows, model in ((HELP, "safety"), (SAFE, "helpfulness")):
        data = {"comparisons": write_rows(tmp_path / "c", "comparisons", rows)}
        check_run(config(inputs=inputs(files, "chat", model), data=data), tmp_path / "new", ("reward",))
        share = {f"{model}_share": 0.0}
        check_run(config(inputs=inputs(files, "chat"), data=data, reward=share), tmp_path / "new", ("reward",))
    apart = {"comparisons": write_rows(tmp_path / "few", "comparisons", [HELP[0], SAFE[0]])}
    apart["comparisons_held_out"] = write_rows(tmp_path / "rest", "comparisons", HELP[1:3])
    check_run(config(inputs=inputs(files, "chat"), data=apart), tmp_path / "new", ("reward",))


def test_tables_too_small_to_hold_rows_out_or_to_be_dealt_out(tmp_path, files):
    rows = {"demonstrations": {"messages": [USER, ANSWER], "kind": ""}, "corpus": {"text": "the cat."}}
    for name, row in rows.items():
        data = {name: write_rows(tmp_path / name, name, [row])}
        line = complaint(config(data=data, inputs=inputs(files, "base") if name != "corpus" else {}), tmp_path / "new")
        assert re.match(rf"data\.{name}: \S+: 1 rows leave [01] to train on and [01] held out at held_out=0\.3", line)
    given = config(
        inputs=inputs(files, "chat", "helpfulness", "safety"),
        data=inputs(files, "prompts_train", "prompts_early_stop"),
        ppo={"num_chunks": 8},
    )
    assert complaint(given, tmp_path / "new", "ppo").startswith(
        f"data.prompts_early_stop: {files}/prompts_early_stop has 4 prompts, at least 8 are needed"
    )


def test_special_tokens_are_looked_for_where_the_model_is_yet_to_be_made(tmp_path, files):
    data = {"prompts_test": write_rows(tmp_path / "p", "prompts", [prompt(0, "</s>")])}
    given = config(inputs={"tokenizer": str(files / "base")}, data=data)
    assert "row 0 holds the special token '</s>'" in complaint(given, tmp_path / "new")


def test_columns_that_a_run_does_not_use_are_told(tmp_path, files, capsys):
    table = pq.read_table(files / "demonstrations")
    pq.write_table(table.append_column("system", [["Be brief."] * table.num_rows]), tmp_path / "d")
    check_run(
        config(inputs=inputs(files, "base"), data={"demonstrations": str(tmp_path / "d")}), tmp_path / "new", ("sft",)
    )
    assert capsys.readouterr().err == f"data.demonstrations: {tmp_path}/d: columns that are not used: system\n"


def test_an_answer_that_was_cut_off_has_no_end_to_count(tmp_path, files):
    row = comparison(0, rejected="hen " * 18)
    size = int(re.search(r"has (\d+) tokens", tables_complaint(tmp_path / "a", files, [row], 48))[1])
    whole = comparison(1, rejected="hen " * 18, rejected_finished=True)
    cut = comparison(1, rejected="hen " * 18, rejected_finished=False)
    assert f"has {size} tokens, at most {size - 1} fit" in tables_complaint(tmp_path / "b", files, [whole], size - 1)
    path = write_rows(tmp_path / "c", "comparisons", [cut, *comparisons()[2:]])
    check_run(
        config(inputs=inputs(files, "base"), data={"comparisons": path}, reward={"max_length": size - 1}),
        tmp_path / "new",
        ("testbed", "sft", "reward"),
    )


def tables_complaint(path, files, rows, max_length):
    given = config(
        inputs=inputs(files, "base"),
        data={"comparisons": write_rows(path, "comparisons", rows)},
        reward={"max_length": max_length},
    )
    return complaint(given, path.with_name("new"), "testbed", "sft", "reward")


def test_the_shortest_context_of_the_models_counts(tmp_path, files):
    short = write_checkpoint(tmp_path / "short", reward_model=True, max_seq_len=40)
    write_tokenizer(short)
    given = {**inputs(files, "chat", "helpfulness"), "safety": str(short)}
    tables = inputs(files, "prompts_train", "prompts_early_stop")
    line = complaint(config(inputs=given, data=tables, ppo={"max_new_tokens": 38}), tmp_path / "new", "ppo")
    assert line.startswith(f"data.prompts_train: {files}/prompts_train row 0: has ")
    line = complaint(config(inputs=given, ppo={"max_new_tokens": 40}), tmp_path / "new", "testbed", "ppo")
    assert line.startswith("ppo.max_new_tokens=40 must be at most 39: the model's context holds 40 tokens")


def test_comparisons_without_a_strength_column(tmp_path, files):
    table = pq.read_table(files / "comparisons").drop_columns(["strength"])
    pq.write_table(table, tmp_path / "c")
    given = config(data={"comparisons": str(tmp_path / "c")})
    assert "has no column strength and reward.margin=small needs it" in complaint(given, tmp_path / "new")


def test_tables_that_are_no_tables(tmp_path):
    (tmp_path / "text").write_text("no table")
    for path, reason in ((tmp_path / "text", "cannot be read as Parquet"), (tmp_path / "x", "no such file")):
        line = complaint(config(data={"comparisons": str(path)}), tmp_path / "new")
        assert line.startswith(f"data.comparisons: {path}: {reason}")


def test_a_stage_whose_inputs_nothing_provides(tmp_path):
    assert complaint(config(), tmp_path / "new", "sft") == (
        f"sft needs demonstrations, tokenizer, base, which neither the config names nor {tmp_path}/new "
        "holds; run testbed, tokenizer, pretrain first, or set data.demonstrations, inputs.tokenizer, inputs.base"
    )
    # Nor does a stage that runs too late in the recipe help.
    line = complaint(config(), tmp_path / "new", "testbed", "tokenizer", "pretrain", "ppo")
    assert line.startswith("ppo needs chat, helpfulness, safety, which neither")


def test_ones_own_language_is_not_mixed_with_the_testbeds(tmp_path, files):
    given = config(data=inputs(files, "corpus", "demonstrations", "prompts_train"))
    assert complaint(given, tmp_path / "new").startswith(
        "data.prompts_annotation, data.prompts_early_stop, data.prompts_test: must be given beside data.corpus"
    )


def test_what_the_run_directory_holds_counts_while_its_settings_are_the_same(tmp_path):
    run = tmp_path / "run"
    held = ledger(config(), run)
    for stage in ("testbed", "tokenizer"):
        finish(held, stage)
    for same in ({"precision": "fp32"}, {"precision": "bf16"}, {"seed": 1}):  # the tables of seeds are one
        check_run(config(run=same), run, ("pretrain",))
    with pytest.raises(UserError, match=r"pretrain needs tokenizer, .* \(what tokenizer left in .* other settings\)"):
        check_run(config(tokenizer={"vocab_size": 400}), run, ("pretrain",))
    with pytest.raises(UserError, match=r"pretrain needs corpus, .* \(what testbed and tokenizer left in "):
        check_run(config(testbed={"seed": 1}), run, ("pretrain",))
    finish(held, "pretrain")
    with pytest.raises(UserError, match="sft needs base, "):
        check_run(config(run={"seed": 1}), run, ("sft",))


def ledger(given, run):
    """What a run directory holds of a config's recipe."""
    given = machine.settled(given)
    return Ledger(given, recipe(given), RunDir(run))


def test_a_stage_of_the_run_directory_that_is_asked_for_runs_before_those_that_need_it(tmp_path):
    with pytest.raises(UserError, match=r"sft needs base, .* run pretrain first"):
        finish(held := ledger(config(), tmp_path), "testbed"), finish(held, "tokenizer")
        check_run(config(), tmp_path, ("sft",))
    check_run(config(), tmp_path, ("pretrain", "sft"))


def test_fewer_steps_than_are_done_are_refused_before_anything_starts(tmp_path):
    held = finish_all(ledger(config(ppo={"num_steps": 6}), tmp_path), but=("ppo", "evaluate"))
    begin(held, "ppo", steps=5)
    check_run(config(ppo={"num_steps": 5}), tmp_path, ("ppo",))
    with pytest.raises(UserError, match=r"^ppo\.num_steps=4 is too low for \S+, which has 5 steps done; set it to 5"):
        check_run(config(ppo={"num_steps": 4}), tmp_path, ("ppo",))


def test_what_is_asked_for_anew_is_a_part_of_the_recipe(tmp_path, files):
    check_run(config(), tmp_path / "new", redo=["sft", "evaluate"])
    public = config(data={"public_demonstrations": str(files / "demonstrations")})
    check_run(public, tmp_path / "new", redo=["sft@public"])
    for given, name, remedy in (
        (config(), "stf", "did you mean sft?"),
        (config(), "sft@public", "choose from testbed, tokenizer, pretrain, sft, pairs, "),
        (config(inputs=inputs(files, "chat", "helpfulness", "safety")), "reward", "choose from testbed, pretrain, "),
    ):
        with pytest.raises(UserError, match=rf"^--redo {name}: the recipe makes no such thing; .*{re.escape(remedy)}"):
            check_run(given, tmp_path / "new", redo=[name])


def test_a_reward_that_is_given_is_not_missed_by_stages_that_come_later(tmp_path, files):
    given = config(inputs=inputs(files, "chat", "helpfulness"), data=inputs(files, "comparisons"))
    held = ledger(given, tmp_path)
    assert finish(held, "reward").outputs.keys() == {"safety"}
    tables = inputs(files, "comparisons", "prompts_train", "prompts_early_stop")
    check_run(config(inputs=given.inputs.model_dump(), data=tables), tmp_path, ("ppo",))
    both = config(inputs=inputs(files, "chat"), data=tables)
    assert not entry_of(ledger(both, tmp_path), "reward").done
    with pytest.raises(UserError, match=r"ppo needs helpfulness, safety, "):
        check_run(both, tmp_path, ("ppo",))


def test_what_is_asked_for_anew_is_made_by_the_command(tmp_path):
    with pytest.raises(UserError, match=r"^--redo sft: this command runs ppo alone; give it to `rlhf-ray sft` or"):
        check_run(config(), tmp_path / "run", ("ppo",), redo=["sft"])
    with pytest.raises(UserError, match=r"^--redo sft@v1: the recipe makes no such thing; did you mean sft"):
        check_run(config(), tmp_path / "run", redo=["sft@v1"])


def test_a_stage_with_nothing_to_do_says_so(tmp_path, files, capsys):
    from rlhf_ray.recipe.run import run_recipe

    given = config(inputs=inputs(files, "chat", "helpfulness", "safety"))
    for stages in (("reward",), ("sft", "reward")):
        assert run_recipe(given, tmp_path / "run", stages=stages) == {}
        said = [line for line in " ".join(capsys.readouterr().err.split()).split(")") if "nothing to do" in line]
        assert [line.split(":")[-2].split()[-1] for line in said] == list(stages)
        assert "reward: nothing to do, the config names what it would make (helpfulness, safety" in said[-1]


def test_a_cluster_that_cannot_be_found_is_told(tmp_path, monkeypatch):
    def no_cluster(**options):
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr("cluster.session.session", no_cluster)
    context = Context(config(cluster={"address": "auto"}), RunDir(tmp_path / "run"))
    with pytest.raises(UserError, match=r"cluster.address='auto': no cluster answers there \(Could not find any"):
        _ = context.roles


def test_the_smallest_vocabulary_is_the_one_that_can_be_learnt():
    train_tokenizer(["a b"], vocab_size=SMALLEST_VOCABULARY)
    with pytest.raises(UserError, match=f"must be at least {SMALLEST_VOCABULARY}"):
        train_tokenizer(["a b"], vocab_size=SMALLEST_VOCABULARY - 1)


# --- submission to a cluster -----------------------------------------------------------------------------------


def test_what_a_cluster_will_run_is_checked_without_its_files(tmp_path):
    there = config(data={"corpus": "/nowhere/corpus.parquet"}, inputs={"chat": "/nowhere/chat"})
    check_submission(there, Path("/nowhere/run"))
    function = {"helpfulness": "my_rewards:short", "safety": "/nowhere/safety"}
    check_submission(config(inputs=function, ppo={"value_init": "policy"}), Path("/nowhere/run"))
    for wrong, out, complaint in (
        (config(run={"stages": ["sff"]}), "/r", "run.stages='sff' is no stage"),
        (config(ppo={"batch_size": 7}), "/r", "ppo.batch_size=7 must be divisible by"),
        (config(model={"preset": "lama"}), "/r", "model.preset='lama' is not known"),
        (config(), "runs/a", "--out='runs/a' must be an absolute path"),
        (config(data={"corpus": "c.parquet"}), "/r", "data.corpus='c.parquet' must be an absolute path"),
        (config(inputs={"chat": "chat"}), "/r", f"inputs.chat='chat' .* for example {Path.cwd()}/chat"),
        (config(pairs={"models": ["newest", "v1"]}), "/r", r"pairs.models\[1\]='v1' must be"),
        (config(evaluate={"controls": {"long": "m"}}), "/r", "evaluate.controls.long='m' must be"),
    ):
        with pytest.raises(UserError, match=complaint):
            check_submission(wrong, Path(out))


# --- versions ----------------------------------------------------------------------------------------------------


def test_settings_of_versions_are_checked_as_they_will_be(tmp_path, files):
    rounds = {"settings": {"ppo.minibatch_size": 3}, "versions": [{"methods": ["ppo"]}]}
    assert "ppo.batch_size=8 must be divisible by ppo.minibatch_size=3" in complaint(
        config(rounds=rounds), tmp_path / "new"
    )
    rounds["versions"][0]["settings"] = {"ppo.batch_size": 9, "ppo.num_chunks": 1}  # of its own, by those of all
    rounds["settings"]["ppo.num_chunks"] = 1
    assert "ppo.batch_size=8" in complaint(config(rounds=rounds), tmp_path / "new")  # the referee's, of no version
    del rounds["settings"]["ppo.minibatch_size"]
    rounds["versions"][0]["settings"]["ppo.minibatch_size"] = 3
    check_run(config(rounds=rounds), tmp_path / "new")
    rounds = {"versions": [{"settings": {"rejection_sampling.teacher": str(files / "safety")}}]}
    line = complaint(config(rounds=rounds), tmp_path / "new")
    assert line.startswith(f"rounds.versions[0].settings: rejection_sampling.teacher='{files}/safety' is a reward")


def test_a_week_of_people_adds_to_the_comparisons_that_are_given(tmp_path, files):
    helpful = [comparison(n, guideline="helpfulness") for n in range(20)]
    safe = [comparison(n, guideline="safety", strength=None) for n in range(20, 40)]
    write_rows(tmp_path / "given", "comparisons", helpful)
    week = tmp_path / "week"
    data = {**inputs(files, "prompts_annotation", "prompts_train", "prompts_early_stop", "prompts_test")}
    data |= {"comparisons": str(tmp_path / "given")}
    rounds = {"versions": [{"comparisons": str(week)}]}
    given = config(inputs=inputs(files, "chat"), data=data, rounds=rounds)
    check_run(given, tmp_path / "new")  # nothing is known of the week yet
    write_rows(week, "comparisons", safe)
    line = complaint(given, tmp_path / "new")
    assert line.startswith("rounds.versions[0].comparisons: ") and "reward.margin=small needs it" in line
    rounds["settings"] = {"reward.margin": "none"}
    given = config(inputs=inputs(files, "chat"), data=data, rounds=rounds)
    check_run(given, tmp_path / "new")
    write_rows(week, "comparisons", helpful)
    line = complaint(given, tmp_path / "new")
    assert line.startswith("rounds.versions[0].comparisons: ") and "has 0 safety comparisons to train on" in line


def test_nobody_compares_own_prompts_of_versions(tmp_path, files):
    write_rows(tmp_path / "p", "prompts", [prompt(n, truth="") for n in range(4)])
    data = dict.fromkeys(
        ("prompts_annotation", "prompts_train", "prompts_early_stop", "prompts_test"), str(tmp_path / "p")
    )
    given = {"inputs": inputs(files, "chat"), "data": data}
    line = complaint(config(given, rounds={"versions": [{}]}), tmp_path / "new")
    assert line.endswith("judges testbed prompts only; give human comparisons as the comparisons of rounds.versions")
    given = {"inputs": inputs(files, "chat", "helpfulness", "safety"), "data": data}
    check_run(config(given, rounds={"versions": [{}]}), tmp_path / "new")  # nor is there a referee
