"""Preflight: what can be wrong before a run is one line that names field, value, rule and remedy."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from tiny_inputs import ANSWER, USER, comparison, prompt, write_checkpoint, write_rows, write_tokenizer

from rlhf_ray import preflight
from rlhf_ray.config import STAGES, parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.preflight import NEEDS, SMALLEST_VOCABULARY, check_run, check_submission, makes
from rlhf_ray.recipe.context import WHO_MAKES, Context
from rlhf_ray.recipe.tokenizer import train_tokenizer
from rlhf_ray.run_state import RunDir, write_json

TINY = {
    "run": {"device": "cpu"},
    "model": {"preset": "tiny"},
    "pretrain": {"seq_len": 64, "batch_size": 4},
    "sft": {"seq_len": 48, "batch_size": 4},
    "collect": {"max_new_tokens": 16},
    "reward": {"max_length": 48},
    "ppo": {"max_new_tokens": 16, "batch_size": 8, "minibatch_size": 4},
    "evaluate": {"max_new_tokens": 16},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Inputs that are all right: checkpoints with their tokenizer, tables."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("base", "chat", "helpfulness", "safety"):
        directory = write_checkpoint(root / name, reward_model=name in ("helpfulness", "safety"))
        write_tokenizer(directory)
    write_rows(root / "comparisons", "comparisons", [comparison(n) for n in range(4)])
    write_rows(root / "demonstrations", "demonstrations", [{"messages": [USER, ANSWER], "kind": "k"}] * 4)
    write_rows(root / "corpus", "corpus", [{"text": "the cat."}])
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
        ({"cluster": {"address": "127.0.0.1:1"}}, "cluster.address='127.0.0.1:1': no cluster answers there"),
        ({"cluster": {"address": "ray://127.0.0.1:1"}}, "cluster.address='ray://127.0.0.1:1': is one of Ray Client"),
    ],
)
def test_settings(tmp_path, sections, line):
    assert complaint(config(sections), tmp_path / "new").startswith(line)


def test_rules_of_stages_that_do_not_run_are_not_held_against_a_run(tmp_path):
    check_run(config(ppo={"batch_size": 7}, run={"stages": ["testbed", "tokenizer", "pretrain"]}), tmp_path)


def test_gpus_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)
    line = complaint(config(run={"device": "cuda"}), tmp_path / "new")
    assert line == "run.device='cuda': this machine has no NVIDIA GPU; set run.device=cpu or cluster.address"
    monkeypatch.setattr(preflight, "count_gpus", lambda: 2)
    on_gpu = config(run={"device": "auto"}, roles={"helpfulness": {"gpus_per_rank": 1.5}})
    # The two reward models alone: 1.5 + 1.
    line = complaint(on_gpu, tmp_path / "new", "testbed", "tokenizer", "pretrain", "sft", "collect", "reward")
    assert line.startswith("roles ask for 4.5 GPUs (helpfulness 1.5, policy 1, rollout 1, safety 1), this machine")
    check_run(on_gpu, tmp_path / "new", ("testbed", "tokenizer", "pretrain"))


def test_visible_devices_bound_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert preflight.count_gpus() == 0


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


def test_a_version_to_collect_from_is_checked_too(tmp_path, files):
    given = config(inputs=inputs(files, "chat"), collect={"versions": ["newest", str(files / "safety")]})
    assert complaint(given, tmp_path / "new").startswith(f"collect.versions[1]='{files}/safety' is a reward model")


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
        f"inputs.helpfulness='{other}' has another tokenizer than inputs.chat='{files}/chat'; "
        "give models that share one tokenizer"
    )


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
            r"data\.comparisons: \S+ comparisons row 1: chosen='' must not be empty; give the chosen answer .*; "
            r"see `rlhf-ray data check comparisons ",
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


def test_an_answer_that_was_cut_off_has_no_end_to_count(tmp_path, files):
    row = comparison(0, rejected="hen " * 18)
    size = int(re.search(r"has (\d+) tokens", tables_complaint(tmp_path / "a", files, [row], 48))[1])
    whole = comparison(1, rejected="hen " * 18, rejected_finished=True)
    cut = comparison(1, rejected="hen " * 18, rejected_finished=False)
    assert f"has {size} tokens, at most {size - 1} fit" in tables_complaint(tmp_path / "b", files, [whole], size - 1)
    path = write_rows(tmp_path / "c", "comparisons", [cut])
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
        "data.prompts_early_stop, data.prompts_annotation, data.prompts_test: must be given beside data.corpus"
    )


def test_what_the_run_directory_holds_counts_while_its_settings_are_the_same(tmp_path):
    run = Path(tmp_path / "run")
    for stage in ("testbed", "tokenizer"):
        recorded = config().model_dump(mode="json")[stage]
        recorded = recorded if stage == "testbed" else {stage: recorded}
        step = Path(run / "steps" / f"{stage}-abc")
        step.mkdir(parents=True)
        write_json(step / "step.json", {"inputs": {"config": recorded, "seed": 0, "precision": "bf16"}})
    check_run(config(), run, ("pretrain",))
    with pytest.raises(UserError, match=r"pretrain needs tokenizer, .* \(what tokenizer left in .* other settings\)"):
        check_run(config(tokenizer={"vocab_size": 400}), run, ("pretrain",))
    with pytest.raises(UserError, match="pretrain needs tokenizer, "):
        check_run(config(run={"seed": 1}), run, ("pretrain",))
    with pytest.raises(UserError, match="pretrain needs corpus, "):
        check_run(config(testbed={"seed": 1}), run, ("pretrain",))


def test_every_stage_has_its_needs_and_they_come_before_it():
    assert tuple(NEEDS) == STAGES
    for place, stage in enumerate(STAGES):
        earlier = {name for before in STAGES[:place] for name in makes(before)}
        assert earlier.issuperset(NEEDS[stage]), stage
        assert set(NEEDS[stage]) <= set(WHO_MAKES)


def test_the_needs_are_the_parents_that_the_stages_name():
    from rlhf_ray.recipe.run import RUNNERS

    class Asked(Exception):
        pass

    given = config()
    for stage, runner in RUNNERS.items():
        if not NEEDS[stage]:
            continue
        parents: list[str] = []

        class Recorder:
            """As much of a run's context as a stage uses before its step."""

            config = given
            run = SimpleNamespace(path=Path("elsewhere"))
            outputs = dict.fromkeys(set(WHO_MAKES) - set(makes(stage)), Path("somewhere/model"))
            sampling_settings = Context.sampling_settings

            def step(self, name, *, parents, found=parents, **more):
                found.extend(parents)
                raise Asked

        with pytest.raises(Asked):
            runner(Recorder())
        assert set(parents) == set(NEEDS[stage]), stage


def test_a_reward_that_is_given_is_not_trained(tmp_path):
    from rlhf_ray.recipe.run import RUNNERS

    names = []

    def step(name, **inputs):
        names.append(name)
        return SimpleNamespace(path=tmp_path)

    context = SimpleNamespace(config=config(), outputs={"helpfulness"}, step=step, skip=lambda step: True)
    assert RUNNERS["reward"](context) == {"safety": tmp_path / "model"}
    assert names == ["reward-safety"]
    # Nor is it missed by stages that come later.
    given = config(inputs={"chat": "models/chat", "helpfulness": "my_rewards:short"})
    step = tmp_path / "steps" / "reward-safety-abc"
    step.mkdir(parents=True)
    recorded = {"config": {"reward": given.model_dump(mode="json")["reward"]}, "seed": 0, "precision": "bf16"}
    write_json(step / "step.json", {"inputs": recorded})
    assert preflight.is_done(given, tmp_path, "reward")
    assert not preflight.is_done(config(), tmp_path, "reward")


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
        (config(collect={"versions": ["newest", "v1"]}), "/r", r"collect.versions\[1\]='v1' must be"),
        (config(evaluate={"controls": {"long": "m"}}), "/r", "evaluate.controls.long='m' must be"),
    ):
        with pytest.raises(UserError, match=complaint):
            check_submission(wrong, Path(out))
