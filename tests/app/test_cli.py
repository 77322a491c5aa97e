"""The `fluxchat` command: exit codes, answers on stdout, one line on stderr; once as a process."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app import cli
from app.chat import VideoChat
from app.cli import SAMPLING, STAGES, build_parser, main
from encoder.errors import ModelError
from llm_bridge.sampling import SamplingParams
from tests import ROOT
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process, which has imported everything."""

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = list(map(str, args))
        try:
            status = main(command)
        except SystemExit as left:
            status = int(left.code or 0)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(command, status, printed.out, printed.err)

    return run


def empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def text(folder: Path) -> Path:
    (folder / "text.mp4").write_text("not a video")
    return folder / "text.mp4"


def cut(folder: Path) -> Path:
    return vf.truncated(vf.write(folder / "whole.mp4", vf.steady(60)), folder / "cut.mp4", 0.5)


def lying(folder: Path) -> Path:
    return vf.lying_matroska(vf.write(folder / "short.mkv", vf.steady(60)), folder / "lie.mkv", 36_000)


BAD: dict[str, Callable[[Path], Path]] = {
    "missing": lambda folder: folder / "missing.mp4",
    "directory": lambda folder: folder,
    "empty": empty,
    "text": text,
    "cut": cut,
    "audio only": lambda folder: vf.audio_only(folder / "sound.mp4"),
    "20000 pixels": lambda folder: vf.huge(folder / "huge.avi"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line(tmp_path: Path, kind: str, call: Call) -> None:
    done = call("ask", BAD[kind](tmp_path), "What happens?")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("fluxchat: ")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--budget", "many"], "budget"),
        (["--budget", "0"], "at least 1"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--model", "nowhere"], "not a FluxChat model"),
        (["--device", "abacus"], "device"),
        (["--llm", "./nowhere"], "no model at"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, options: list[str], word: str, call: Call) -> None:
    video = vf.write(tmp_path / "v.mp4", vf.steady(10))
    done = call("ask", video, "What?", *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert word in done.stderr


def test_an_empty_question_is_refused(tmp_path: Path, call: Call) -> None:
    done = call("ask", vf.write(tmp_path / "v.mp4", vf.steady(10)), "  ")
    assert (done.returncode, done.stderr) == (2, "fluxchat: The question is empty: ask something in words.\n")


REFUSED: dict[str, tuple[list[str], str]] = {
    "half a question": (["ask", "EXAMPLE", "Why \udcff?"], "question is not valid Unicode.*0xff"),
    "half a system prompt": (["ask", "EXAMPLE", "Why?", "--system", "\udcff"], "system prompt is not valid"),
    "half a budget": (["ask", "EXAMPLE", "Why?", "--budget", "\udcff"], "A budget is a number"),
    "no budget": (["estimate", "EXAMPLE", "--budget", ""], "A budget is a number"),
    "seed of words": (["ask", "EXAMPLE", "Why?", "--seed", "x"], "argument --seed.*'x'.*--help"),
    "no question": (["ask", "EXAMPLE"], "required: question.*--help"),
    "unknown command": (["dance"], "'dance'.*fluxchat --help"),
    "long nonsense": (["ask", "EXAMPLE", "Why?", "--top-k", "9" * 5000], "argument --top-k"),
    "swapped": (["ask", "Why?", "EXAMPLE"], "The video comes first"),
    "address": (["estimate", "https://example.com/a.mp4"], "download the video first"),
    "empty name": (["ask", "", "Why?"], "name of the video is empty"),
    "odd missing name": (["ask", "caf\udce9.mp4", "Why?"], "no such file"),
    "questions and video on one pipe": (["chat", "-"], "brings the questions"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_one_line(kind: str, shipped_example: Path, call: Call) -> None:
    arguments, words = REFUSED[kind]
    done = call(*(shipped_example if text == "EXAMPLE" else text for text in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"fluxchat: .*{words}.*\n", done.stderr)
    assert len(done.stderr) < 500


@pytest.mark.slow
def test_a_video_from_standard_input(shipped_example: Path) -> None:
    command = [sys.executable, "-m", "app", "ask", "-", "What is it?", "--budget", "64", "--top-k", "0"]
    content = shipped_example.read_bytes()
    piped = subprocess.run(command, input=content, capture_output=True, timeout=PATIENCE_S, check=False)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.strip()


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="this system has no /dev/stdin")
def test_an_empty_standard_input_is_one_line(call: Call) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        done = call("ask", "-", "What is it?")
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"fluxchat: Cannot read 'standard input': it gives 0 bytes; .*\n", done.stderr)


def test_what_needs_a_temperature_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def given(*words: str) -> str:
        found = cli._generation(build_parser().parse_args(["ask", "v", "q", *words]))
        assert set(found) > {"budget", "system"}
        return capsys.readouterr().err

    told = given("--top-p", "0.9", "--seed", "1")
    assert told == "--top-p, --seed: without effect at temperature 0; give --temperature 0.7, say.\n"
    assert not given("--top-p", "0.9", "--temperature", "0.5")
    assert not given("--max-new-tokens", "9")


@pytest.mark.parametrize("fails", [True, False])
def test_a_ctrl_c_that_a_library_loses_ends_the_command(
    shipped_example: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tiny_model: object, fails: bool
) -> None:
    opened = VideoChat.__init__

    def load(chat: VideoChat, *_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if fails:
            raise ModelError("Could not import module 'LlamaConfig'.")
        opened(chat, tiny_model)

    monkeypatch.setattr(VideoChat, "__init__", load)
    monkeypatch.setattr(VideoChat, "ask", lambda *_, **__: pytest.fail("it went on"))
    # It may be ignored: so a shell starts what runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for command in (["ask", shipped_example, "What is it?"], ["info"]):
            done = call(*command, "--model", "a")
            assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_options_of_the_answer_are_fields_of_sampling() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {name for name, *_ in SAMPLING} <= fields
    words = ["ask", "v", "q", "--temperature", "0.5", "--top-k", "3", "--min-p", "0.1", "--min-tokens", "2"]
    args = build_parser().parse_args([*words, "--repetition-penalty", "1.1", "--seed", "5"])
    assert (args.temperature, args.top_k, args.min_p, args.min_tokens) == (0.5, 3, 0.1, 2)
    assert (args.repetition_penalty, args.seed) == (1.1, 5)
    assert "max_new_tokens" not in args  # what is not given has the default of SamplingParams


def test_help_has_examples(call: Call) -> None:
    text = call("--help").stdout
    for word in ("examples:", "--budget auto:1.5", "estimate", "--quantize"):
        assert word in text
    assert call("ask", "--help").returncode == 0


def test_help_and_faults_in_arguments_need_no_model_library() -> None:
    code = "import sys, app.cli; print({'torch', 'transformers', 'numpy', 'av', 'gradio'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("told", [None, "active"])
def test_threads_sleep_unless_the_environment_says_otherwise(
    call: Call, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", told or "")
    if told is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(cli, "run_models", lambda _: print(os.environ["OMP_WAIT_POLICY"]) or 0)
    assert call("models").stdout == f"{told or 'passive'}\n"


@pytest.fixture(scope="module")
def shipped_example() -> Path:
    found = sorted((ROOT / "app" / "pretrained" / "examples").glob("*.mp4"))
    return found[0]


@pytest.mark.parametrize("shipped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ask_json(
    chat: VideoChat, shipped_example: Path, call: Call, monkeypatch: pytest.MonkeyPatch, shipped: bool
) -> None:
    if not shipped:
        monkeypatch.setattr("app.cli.open_chat", lambda args: chat)
    done = call("ask", shipped_example, "What is in the video?", "--json", "--budget", "64")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"]
    assert answer["usage"]["kept_tokens"] == 64
    assert len(answer["kept"][0]["indices"]) == 64
    assert 0 < answer["timings"]["first_token_s"] <= answer["timings"]["total_s"]


def test_chat_reads_questions_and_commands(
    chat: VideoChat, shipped_example: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cli.open_chat", lambda args: chat)
    lines = "What is in the video?\n/budget 32\nWhich way?\n/budget none\n/video nowhere.mp4\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    done = call("chat", shipped_example, "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "32 of" in done.stdout
    assert "! A budget is" in done.stdout
    assert "there is no such file" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_estimate_and_info(shipped_example: Path, call: Call) -> None:
    price = json.loads(call("estimate", shipped_example, "--budget", "64", "--json").stdout)
    assert price["kept_tokens"] == 64
    assert price["first_token_s"] > 0
    info = json.loads(call("info", "--json").stdout)
    assert "SmolLM2-135M-Instruct" in info["llm"]
    for key in ("fluxchat", "torch", "transformers", "sandbox", "device", "revision"):
        assert info[key], key


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    import fluxchat

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fluxchat {fluxchat.__version__}\n"


def test_a_command_may_close_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an MCP server does when its client has left."""
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))  # noqa: SIM115 - closed by the command
    monkeypatch.setattr("app.cli.run_models", lambda args: sys.stdout.close() or 0)
    assert main(["models"]) == 0


def test_train_is_the_stage_s_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        began.append(command)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(SystemExit):
        main(["train", "umt", "--config", "x.yaml", "optim.lr=1", "--help"])
    assert began == [[sys.executable, "-m", "training.umt", "--config", "x.yaml", "optim.lr=1", "--help"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "a.mp4", "b.mp4", "--budget", "64", "Which?"], "not before Which?; see fluxchat --help"),
        (["ask", "-a.mp4", "What?"], "-a.mp4 is taken for an option: write ./-a.mp4 for the file"),
        (["ask", "a.mp4", "What?", "--bugdet=5"], "unrecognized arguments: --bugdet=5;"),
        (["ask", "a.mp4", "What?", "--\u202e.mp4"], "unrecognized arguments: --\\u202e.mp4;"),
    ],
)
def test_a_misplaced_argument_is_told_its_place(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a.mp4").touch()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_an_old_name_of_a_stage_is_told_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "warm_start"])
    assert "warm_start is now called projector_warmup" in capsys.readouterr().err


def test_every_stage_of_train_is_a_module() -> None:
    root = ROOT / "training"
    assert all((root / f"{stage}.py").is_file() for stage in STAGES)


def test_stages_are_those_of_recipes() -> None:
    """The app imports nothing of training: it starts it."""
    from app.cli import RENAMED_STAGES
    from training.trainer import recipe

    assert set(recipe.STAGES) <= set(STAGES)
    assert recipe.RENAMED_STAGES == RENAMED_STAGES
