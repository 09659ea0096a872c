"""The command line as a user meets it: help, one line for bad input with code 2, failed runs 1, signals."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_inputs import ANSWER, PRETRAINING_RUN, USER, prompt, write_checkpoint, write_rows, write_tokenizer

from rlhf_ray.cli import chat
from rlhf_ray.cli import main as cli
from rlhf_ray.errors import RunFailure, UserError

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(sys.executable).with_name("rlhf-ray")
HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "pyarrow"}
PATIENCE_S = 300.0


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(PRETRAINING_RUN.format(num_steps=100_000, save_every=5))
    return path


def refused(result):
    """The one line of an outcome that is a refusal."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    [line] = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- through the installed program -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "{config}", "--out", "{out}", "--set", "ppo.num_step=3"], "--set: ppo.num_step is not a known key"),
        (["sft", "{config}", "--out", "{out}"], "sft needs demonstrations, tokenizer, base"),
        (["run", "{config}"], "Missing option '--out'; see rlhf-ray run --help"),
        (["chat", "{out}"], "CHECKPOINT='{out}': no such checkpoint directory"),
        (["bench", "sync", "{config}", "--repeats", "0"], "Invalid value for '--repeats': Input should be greater"),
        (["bench", "sync", "{config}", "--set", "model.preset=tinny"], "model.preset='tinny' is not known"),
    ],
)
def test_bad_input_is_one_line_at_once(config, tmp_path, arguments, line):
    places = {"config": config, "out": tmp_path / "new"}
    start = time.monotonic()
    result = subprocess.run(
        [PROGRAM, *(argument.format(**places) for argument in arguments)], capture_output=True, text=True
    )
    assert refused((result.returncode, result.stdout, result.stderr)).startswith(line.format(**places))
    assert time.monotonic() - start < 5
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["sft", "{config}", "--out", "{out}"],
        ["pretrain", "{config}", "--out", "/proc/x"],
        ["submit", "{config}", "--out", "relative"],
        ["status", "--help"],
        ["bench", "round", "{config}", "--response-tokens", "1000"],
    ],
)
def test_help_and_refusals_load_nothing_heavy(config, tmp_path, arguments):
    places = {"config": config, "out": tmp_path / "new"}
    program = (
        "import sys, rlhf_ray.cli.main\n"
        f"sys.argv = ['rlhf-ray', *{[argument.format(**places) for argument in arguments]}]\n"
        "try:\n    rlhf_ray.cli.main()\n"
        f"finally:\n    print('loaded:', sorted({HEAVY} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "loaded: []", result.stderr


# --- in this process -------------------------------------------------------------------------------------------


def test_wrong_command_lines(call, config):
    assert refused(call("runn")).startswith("No such command 'runn'. Did you mean 'run'?; see rlhf-ray --help")
    assert refused(call("run")) == "Missing argument 'CONFIG'; see rlhf-ray run --help"
    assert "see rlhf-ray data show --help" in refused(call("data", "show", config, "--rows", "0"))


def test_without_a_command_there_is_help(call):
    code, out, _ = call()
    assert code == 2 and "Usage: rlhf-ray" in out
    assert call("--help")[0] == 0


def test_configs_that_cannot_be_read(call, tmp_path):
    for path in (tmp_path, tmp_path / "missing.toml"):
        assert refused(call("run", path, "--out", tmp_path / "new")).startswith(f"config {path}: cannot be read")
    assert list(tmp_path.iterdir()) == []


def test_data_commands(call, tmp_path):
    path = tmp_path / "p.parquet"
    write_rows(path, "prompts", [prompt(0)])
    assert call("data", "check", "prompts", path) == (
        0,
        f"{path}: 1 row of prompts, all well; --tokenizer DIR checks their tokens as well\n",
        "",
    )
    code, out, _ = call("data", "show", path)
    assert code == 0 and "user: which is a fish?" in out
    assert refused(call("data", "check", "prompt", path)).endswith("did you mean prompts?")
    assert "cannot be read as Parquet" in refused(call("data", "show", __file__))


def test_failures_of_a_run_are_one_line(call, config, tmp_path, monkeypatch):
    def failing(error):
        def fail(*arguments):
            raise error

        return fail

    command = ("run", config, "--out", tmp_path / "new")
    monkeypatch.setattr(cli, "_run_recipe", failing(RunFailure("ppo step 3: diverged")))
    assert call(*command) == (1, "", "failed: ppo step 3: diverged\n")
    monkeypatch.setattr(cli, "_run_recipe", failing(UserError("row 3: too long")))
    assert refused(call(*command)) == "row 3: too long"
    monkeypatch.setattr(cli, "_run_recipe", failing(KeyError("a bug")))
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", *map(str, command)])
    with pytest.raises(KeyError):  # a traceback, for whoever mends it
        cli.main()


def test_failures_of_workers_are_told_by_their_cause(monkeypatch):
    from cluster.layout import PlacementError
    from cluster.worker_group import WorkerError
    from rlhf_ray.recipe import run

    def fail_with(error):
        def fail(*arguments, **options):
            raise error

        monkeypatch.setattr(run, "run_recipe", fail)

    told = {"role": "policy", "rank": 1, "step": "sft step 3"}
    fail_with(WorkerError("policy rank 1 failed in train at sft step 3: boom", **told))
    with pytest.raises(RunFailure, match=r"^policy rank 1 .* boom; the workers' logs are in [^;]*$"):
        cli._run_recipe(None, Path("x"), None, [])  # it may well fail again
    fail_with(WorkerError("policy rank 1 failed in open_data", **told, cause=UserError("d row 3: too long")))
    with pytest.raises(UserError, match=r"^d row 3: too long$"):
        cli._run_recipe(None, Path("x"), None, [])
    fail_with(PlacementError("policy: 3 ranks need 3 GPU, the cluster has 2"))
    with pytest.raises(RunFailure, match="3 ranks need 3 GPU"):
        cli._run_recipe(None, Path("x"), None, [])


def test_checkpoints_one_cannot_talk_to(call, tmp_path):
    reward = write_checkpoint(tmp_path / "reward", reward_model=True)
    assert "is a reward model" in refused(call("chat", reward))
    model = write_checkpoint(tmp_path / "model")
    assert refused(call("chat", model)).startswith(f"CHECKPOINT='{model}': has no tokenizer.json")
    write_tokenizer(model)
    assert refused(call("chat", model, "--max-new-tokens", "64")) == (
        "--max-new-tokens 64: must be less than 64, the model's context; lower it"
    )


def test_a_dialogue_grows_starts_anew_when_full_and_outlives_bad_messages(monkeypatch, capsys):
    asked = []

    def answer(dialogue):
        asked.append([message["content"] for message in dialogue])
        return "yes"

    def count(dialogue):  # one token a character
        if "<bad>" in dialogue[-1]["content"]:
            raise UserError("holds <bad>")
        return sum(len(message["content"]) for message in dialogue)

    lines = iter(["aaaa", "<bad>", "bbbb", "cccc", "d" * 20, "e"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, ""))
    chat.converse(answer, count, system="S", room=17)
    assert asked == [
        ["S", "aaaa"],
        ["S", "aaaa", "yes", "bbbb"],  # 12 of 17
        ["S", "cccc"],  # 1 + 4 + 3 + 4 + 3 + 4 = 19 did not fit
        ["S", "e"],  # the long message made the dialogue start anew, and was too long even so
    ]
    out, err = capsys.readouterr()
    assert out == "model> yes\n" * 4
    assert err.splitlines() == [
        "error: holds <bad>",
        "the dialogue no longer fits the model's context: it starts anew",
        "the dialogue no longer fits the model's context: it starts anew",
        "error: this message has 21 tokens, at most 17 leave room for an answer of --max-new-tokens; shorten "
        "it or lower that",
    ]


def test_the_end_of_input_ends_a_dialogue(monkeypatch):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    chat.converse(lambda _: "", lambda _: 0, system=None, room=1)


def test_messages_that_are_not_utf_8_are_told_and_the_dialogue_goes_on(monkeypatch, capsys):
    text = b"\xef\xbb\xbfhi\r\ncaf\xe9 hello\nlone \xed\xa0\x80\nnul \0 in\n" + b"x" * 100_000 + b"\nno line end"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
    asked = []
    chat.converse(lambda dialogue: asked.append(dialogue[-1]["content"]) or "", lambda _: 0, system=" ", room=1)
    assert asked == ["hi", "nul \0 in", "x" * 100_000, "no line end"]
    assert capsys.readouterr().err.splitlines() == [
        f"error: character {place} of this message is not UTF-8; write it in UTF-8" for place in (4, 6)
    ]


# --- texts of other places -------------------------------------------------------------------------------------


def test_texts_and_paths_whatever_the_locale(tmp_path):
    home = tmp_path / "Müller"
    home.mkdir()
    (home / "rows.jsonl").write_text(
        '{"prompt": "Käse?", "chosen": "ja \\ud83e\\udd86", "rejected": "nein"}', encoding="utf-8"
    )
    # As Python starts where the locale is C and nothing makes up for it: text is ASCII then.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": str(home)}

    def run(*arguments):
        command = [sys.executable, "-m", "rlhf_ray.cli.main", "data", *arguments]
        done = subprocess.run(command, env={**os.environ, **locale}, cwd=ROOT, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()

    assert f"to {home}/t.parquet" in run("import", "~/rows.jsonl", "--to=~/t.parquet", "--kind", "comparisons")
    shown = run("show", "~/t.parquet")
    assert "user: Käse?" in shown and "ja 🦆" in shown


# --- signals ---------------------------------------------------------------------------------------------------


@pytest.fixture
def program():
    """Starts programs; one that a failed test leaves is asked to end as a user would."""
    started = []

    def start(*command):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_program_that_unwinds_too_slowly_and_its_orphans(program, number):
    # The shell ends a second after the signal, and its child would then be nobody's but init's.
    code = (
        "import subprocess, threading, time\n"
        "from rlhf_ray import stopping\n"
        "stopping.GRACE_S = 4.0\n"
        "with stopping.stopping_on_signals():\n"
        "    shell = subprocess.Popen(['sh', '-c', 'sleep 300 & echo $!; sleep 1'], stdout=subprocess.PIPE)\n"
        "    try:\n"
        "        print(shell.stdout.readline().decode(), end='', flush=True)\n"
        "        time.sleep(300)\n"
        "    finally:\n"
        "        shell.wait()\n"
        "        print('orphaned', flush=True)\n"
        "        threading.Event().wait()\n"
    )
    process = program(sys.executable, "-c", code)
    orphan = psutil.Process(int(process.stdout.readline()))
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (128 + number, "orphaned\n")
    assert err == "stopped\n"
    assert not orphan.is_running()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_one_whatever_becomes_of_its_exception(program, number):
    # As Ray's C code does, whose calls a handler's exception leaves as a SystemError.
    code = (
        "import time\n"
        "from rlhf_ray.stopping import saying, stopping_on_signals\n"
        "with stopping_on_signals(), saying('stopped here'):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(300)\n"
        "    except BaseException as error:\n"
        "        raise SystemError('returned a result with an exception set') from error\n"
    )
    process = program(sys.executable, "-c", code)
    process.stdout.readline()
    process.send_signal(number)
    err = process.communicate(timeout=PATIENCE_S)[1]
    assert (process.returncode, err) == (128 + number, "stopped here\n")


def test_signals_that_are_ignored_stay_so(call, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        call("data", "show", tmp_path)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_exception_comes_into_an_import(program, tmp_path):
    # torch, for one, aborts there.
    (tmp_path / "library.py").write_text(
        "import os, time\n"
        "print('importing', flush=True)\n"
        "try:\n"
        "    time.sleep(300)\n"
        "except BaseException:\n"
        "    os.abort()\n"
    )
    code = (
        "import sys\n"
        "from rlhf_ray.stopping import stopping_on_signals\n"
        "with stopping_on_signals():\n"
        f"    sys.path.append({str(tmp_path)!r})\n"
        "    import library\n"
    )
    process = program(sys.executable, "-c", code)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=PATIENCE_S)[1]
    assert (process.returncode, err) == (130, "stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send", "batch_size"),
    [
        (signal.SIGINT, psutil.Process.send_signal, 2),
        # To all of its processes, as a terminal does, within a call of some seconds.
        (signal.SIGTERM, lambda process, number: os.killpg(process.pid, number), 1024),
    ],
)
def test_a_signal_ends_a_run_which_then_goes_on(config, tmp_path, program, number, send, batch_size):
    def state():
        found = sorted(tmp_path.glob("run/steps/pretrain-*.partial/state/step-*[0-9]"))
        return int(found[-1].name.removeprefix("step-")) if found else 0

    settings = {"batch_size": batch_size, "micro_batch_size": 2, "save_every": 10 // batch_size + 1}
    changes = [part for key, value in settings.items() for part in ("--set", f"pretrain.{key}={value}")]
    command = (PROGRAM, "run", config, "--out", tmp_path / "run", *changes)
    process = program(*command)
    wait_for(lambda: state() > 0 or process.poll() is not None, "checkpoint")
    assert process.poll() is None, process.communicate()[1]
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in family)
    asked = time.monotonic()
    send(psutil.Process(process.pid), number)
    err = process.communicate(timeout=PATIENCE_S)[1]
    assert time.monotonic() - asked < 10
    assert process.returncode == 128 + number
    assert err.endswith("stopped; the same command goes on from the last checkpoint\n") and "Traceback" not in err
    assert not [child for child in family if child.is_running()]
    assert not [path for path in (tmp_path / "run").rglob("*") if "writing" in path.name or ".partial-" in path.name]
    if number == signal.SIGINT:
        reached, again = state(), program(*command)
        wait_for(lambda: state() > reached or again.poll() is not None, "later checkpoint")
        again.send_signal(number)
        assert f"pretrain: going on from step {reached} " in again.communicate(timeout=PATIENCE_S)[1]


@pytest.mark.slow
def test_a_run_whose_directory_goes_away_ends_with_one_line(config, tmp_path, program):
    out = tmp_path / "run"
    process = program(PROGRAM, "run", config, "--out", out)
    wait_for(lambda: list(out.glob("steps/pretrain-*/metrics.jsonl")) or process.poll() is not None, "first step")
    assert process.poll() is None, process.communicate()[1]
    out.rename(tmp_path / "moved")
    err = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert str(out) in line and "No such file or directory" in line
    # Back in its place, it goes on.
    shutil.rmtree(out, ignore_errors=True)
    (tmp_path / "moved").rename(out)
    again = program(PROGRAM, "run", config, "--out", out)
    wait_for(lambda: list(out.glob("steps/pretrain-*.partial/state/step-*[0-9]")), "checkpoint")
    again.send_signal(signal.SIGINT)
    assert "Traceback" not in again.communicate(timeout=PATIENCE_S)[1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"only who may mount can fill a disk of its own: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_spoils_no_checkpoint(config, small_disk, program):
    out, ballast = small_disk / "run", small_disk / "ballast"
    command = (PROGRAM, "run", config, "--out", out, "--set", "pretrain.save_every=40")
    checkpoints = "steps/pretrain-*.partial/state/step-*[0-9]"
    process = program(*command)
    wait_for(lambda: list(out.glob(checkpoints)) or process.poll() is not None, "first checkpoint")
    assert process.poll() is None, process.communicate()[1]
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while shutil.disk_usage(small_disk).free > 2**18:  # less than a checkpoint, more than lines of metrics
            file.write(bytes(2**16))
    err = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert "pretrain checkpoint" in line and "No space left on device" in line
    assert "the same command goes on from the last checkpoint" in line
    [state] = out.glob("steps/pretrain-*.partial/state/*")  # the last good one, and nothing half-written
    ballast.unlink()
    again = program(*command)
    wait_for(lambda: list(out.glob(checkpoints)) != [state] or again.poll() is not None, "later checkpoint")
    again.send_signal(signal.SIGINT)
    err = again.communicate(timeout=PATIENCE_S)[1]
    assert f"pretrain: going on from step {int(state.name.removeprefix('step-'))} " in err


@pytest.mark.slow
def test_bad_data_that_only_a_worker_meets_is_told_as_bad_input(config, tmp_path):
    # The run's own tokenizer has special tokens that nobody knows before it is made.
    corpus = write_rows(tmp_path / "corpus", "corpus", [{"text": f"a cat on mat {n}."} for n in range(200)])
    rows = [
        {"messages": [USER, {**ANSWER, "content": f"{n} </s>" if n > 17 else f"{n}"}], "kind": ""} for n in range(20)
    ]
    path = write_rows(tmp_path / "demonstrations", "demonstrations", rows)
    sets = [f"data.corpus={corpus}", f"data.demonstrations={path}", 'run.stages=["tokenizer","pretrain","sft"]']
    sets += ["pretrain.num_steps=1", "pretrain.held_out=0.1", "sft.seq_len=64", "sft.batch_size=2", "sft.held_out=0.3"]
    result = subprocess.run(
        [PROGRAM, "run", config, "--out", tmp_path / "run", *(word for each in sets for word in ("--set", each))],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 2, result.stderr
    told = "messages[1].content holds the special token '</s>', which would end or fake a turn; remove it from the text"
    assert result.stderr.splitlines()[-1] == f"error: {path} row 18: {told} (and 1 more rows)"
