"""The config: defaults, overrides, and one line for everything that can be wrong with a value."""

import tomllib
from pathlib import Path

import pytest

from rlhf_ray.config import Config, load_config, parse_config
from rlhf_ray.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("")
    return path


def test_defaults_are_the_papers():
    config = Config()
    # §3.2.3: beta 0.01 for 7B, batch 512, minibatch 64, clip 0.2, threshold 0.15, constant 1e-6.
    ppo = config.ppo
    assert (ppo.kl_coef, ppo.batch_size, ppo.minibatch_size, ppo.clip_ratio) == (0.01, 512, 64, 0.2)
    assert (ppo.safety_threshold, ppo.optim.lr, ppo.optim.schedule) == (0.15, 1e-6, "constant")
    # §3.1: cosine from 2e-5, weight decay 0.1, 64 rows of 4096, 2 epochs.
    sft = config.sft
    assert (sft.optim.lr, sft.optim.weight_decay, sft.batch_size, sft.seq_len, sft.epochs) == (
        2e-5,
        0.1,
        64,
        4096,
        2,
    )
    # §3.2.2: 1e-5 for models below 70B, 512 pairs, one epoch, warm-up of 3% and 5 steps at least.
    reward = config.reward
    assert (reward.optim.lr, reward.batch_size, reward.epochs) == (1e-5, 512, 1)
    assert (reward.optim.warmup_ratio, reward.optim.warmup_steps) == (0.03, 5)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_parse(path):
    assert parse_config(tomllib.loads(path.read_text())) == load_config(path)


def test_overrides_lie_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[ppo]\nnum_steps = 3\nbatch_size = 8\n")
    sets = ["ppo.num_steps=5", "data.corpus=/a b/c.parquet", 'run.stages=["sft"]', "ppo.clip_value = 0.5"]
    config = load_config(path, sets)
    assert (config.ppo.num_steps, config.ppo.batch_size, config.ppo.clip_value) == (5, 8, 0.5)
    assert (config.data.corpus, config.run.stages) == ("/a b/c.parquet", ("sft",))


def test_none_is_written_as_a_word(tmp_path, empty):
    path = tmp_path / "none.toml"
    path.write_text('[ppo]\nclip_value = "none"\n[cluster]\ncores = "none"\n[data]\ncorpus = "none"\n')
    config = load_config(path, ["ppo.importance_cap=none"])
    assert (config.ppo.clip_value, config.ppo.importance_cap) == (None, None)
    assert (config.cluster.cores, config.data.corpus) == (None, None)
    assert load_config(empty, ["ppo.clip_value=none"]).ppo.clip_value is None
    with pytest.raises(UserError, match=r"--set: ppo\.clip_ratio='none' must be a number; correct it"):
        load_config(empty, ["ppo.clip_ratio=none"])
    with pytest.raises(UserError, match=r"--set: ppo\.clip_value='off' must be a number, or \"none\"; correct it"):
        load_config(empty, ["ppo.clip_value=off"])


def test_a_home_directory_in_every_path(empty, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    sections = Config()
    keys = [f"{name}.{key}" for name in ("data", "inputs") for key in getattr(sections, name).model_dump()]
    config = load_config(empty, [f"{key}=~/x" for key in keys])
    assert {*config.data.model_dump().values(), *config.inputs.model_dump().values()} == {"/home/ann/x"}
    config = load_config(empty, ['pairs.models=["newest", "~/v"]', 'evaluate.controls={long = "~/m"}'])
    assert (config.pairs.models, config.evaluate.controls) == (("newest", "/home/ann/v"), {"long": "/home/ann/m"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_config_as_windows_writes_it(tmp_path, encoding):
    path = tmp_path / "run.toml"
    path.write_bytes('# für alle\r\n[data]\r\ncorpus = "Käse"\r\n'.encode(encoding))
    assert load_config(path).data.corpus == "Käse"


def test_a_config_in_latin_1_is_told(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes('[data]\ncorpus = "Käse"\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"run\.toml: not valid TOML, which is UTF-8 .*0xe4.*; save it as UTF-8"):
        load_config(path)


def test_a_table_given_in_part_keeps_its_sections_default(empty):
    # The class's own defaults are pretraining's: 2000 steps of warm-up, then a cosine.
    optim = load_config(empty, ["ppo.optim.lr=1e-5"]).ppo.optim
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (1e-5, "constant", 0)
    assert load_config(empty, ["roles.policy.num_ranks=2"]).roles.value == Config().roles.value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("ppo.num_step=3", "--set: ppo.num_step is not a known key; did you mean ppo.num_steps?"),
        (
            "roles.policy.activation_checkpointing=true",
            "--set: roles.policy.activation_checkpointing is not a known key; known here: num_ranks, zero_stage, gpus, "
            "recompute",
        ),
        (
            "roles.reference.ranks_per_replica=2",
            "--set: roles.reference.ranks_per_replica=2 needs zero_stage=3 in place of 0, at which each rank has all "
            'of it, or "none"; correct it, or leave it out for the default, none',
        ),
        (
            "roles.safety={ num_ranks = 4, zero_stage = 3, ranks_per_replica = 3 }",
            '--set: roles.safety.ranks_per_replica=3 must divide num_ranks=4, or "none"; correct it, or leave it out '
            "for the default, none",
        ),
        ("ppo.lr=3", "--set: ppo.lr is not a known key; did you mean ppo.optim.lr or ppo.value_optim.lr?"),
        ("pppo.lr=3", "--set: pppo is not a known key; did you mean ppo?"),
        (
            "ppo.num_steps=many",
            "--set: ppo.num_steps='many' must be an integer; correct it, or leave it out for the default, 400",
        ),
        (
            "ppo.safety_threshold=1.5",
            "--set: ppo.safety_threshold=1.5 must be less than 1; correct it, or leave it out for the default, 0.15",
        ),
        (
            "ppo.kl_coef=nan",
            "--set: ppo.kl_coef=nan must be a finite number; correct it, or leave it out for the default, 0.01",
        ),
        (
            "run.seed=-1",
            "--set: run.seed=-1 must be greater than or equal to 0; correct it, or leave it out for the default, 0",
        ),
        (
            "cluster.cpus_per_rank=0",
            "--set: cluster.cpus_per_rank=0 must be greater than or equal to 0.001; correct it, or leave it out for "
            "the default, 0.1",
        ),
        (
            "roles.rollout.max_num_seqs=-1",
            "--set: roles.rollout.max_num_seqs=-1 must be greater than 0; correct it, or leave it out for the default, "
            "256",
        ),
        ("run.precision=bf61", "--set: run.precision='bf61' must be 'auto', 'bf16' or 'fp32'; did you mean bf16?"),
        ("run.stages=sft", "--set: run.stages='sft' must be a list, for example [\"sft\"]"),
        ("ppo=3", "--set: ppo=3 must be a section of keys; write [ppo] and its keys below"),
        (
            "sft.held_out=0",
            "--set: sft.held_out=0 must be greater than 0; correct it, or leave it out for the default, 0.02",
        ),
        (
            "reward.held_out=1",
            "--set: reward.held_out=1 must be less than 1; correct it, or leave it out for the default, 0.15",
        ),
        (
            "ppo.optim.betas=[0.9]",
            "--set: ppo.optim.betas=[0.9] must hold two values; correct it, or leave it out for the default, "
            "[0.9, 0.95]",
        ),
        (
            "ppo.num_steps",
            "--set ppo.num_steps: must read section.key=value, for example --set ppo.num_steps=30",
        ),
        (".x=1", "--set .x=1: must read section.key=value, for example --set ppo.num_steps=30"),
    ],
)
def test_a_wrong_override_is_one_line(empty, override, line):
    with pytest.raises(UserError) as caught:
        load_config(empty, [override])
    assert str(caught.value) == line


def test_an_override_below_a_value_is_refused(empty):
    with pytest.raises(UserError, match=r"--set run.seed.x=1: seed is a value, not a section"):
        load_config(empty, ["run.seed=1", "run.seed.x=1"])


def test_a_wrong_value_in_the_file_names_the_file_and_counts_the_others(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[ppo]\nnum_steps = 0\nbatch_size = 0\n")
    with pytest.raises(UserError, match=r"run\.toml: ppo\.num_steps=0 .* \(and 1 more problems\)"):
        load_config(path)


def test_files_that_are_no_config(tmp_path):
    (tmp_path / "broken.toml").write_text("[ppo\n")
    (tmp_path / "binary.toml").write_bytes(b"\x80\x81")
    for name, reason in (
        ("missing.toml", "No such file"),
        (".", "Is a directory"),
        ("broken.toml", "not valid TOML .*line 1"),
        ("binary.toml", "not valid TOML"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            load_config(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 1


def test_lists_are_checked(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[reward]\nepochs = 2")
    for stages in ('[["a"]]', "[1]"):
        with pytest.raises(UserError, match=r"run.stages=.* must be"):
            load_config(file, [f"run.stages={stages}"])
    with pytest.raises(UserError, match=r"evaluate.temperatures=.* must be different values"):
        load_config(file, ["evaluate.temperatures=[1.0, 0.0, 1.0]"])
    with pytest.raises(UserError, match=r"collect is not a known key"):
        load_config(file, ["collect.other=1"])


def test_a_setting_that_a_version_has_of_its_own_is_told(tmp_path, capsys):
    file = tmp_path / "c.toml"
    versions = "[{}, { settings = { ppo.kl_coef = 0.6 } }]"
    file.write_text(f"[rounds]\nsettings = {{ sft.epochs = 3 }}\nversions = {versions}")
    load_config(file, ["ppo.kl_coef=0.2", "ppo.num_steps=9", "sft.epochs=2"])
    assert capsys.readouterr().err.splitlines() == [
        "--set sft.epochs: rounds.settings has a value of its own, and keeps it",
        "--set ppo.kl_coef: rounds.versions[1].settings has a value of its own, and keeps it",
    ]
