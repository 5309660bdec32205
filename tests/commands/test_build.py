"""`edgellm build`: flags, files, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from ggufs import TEMPLATE, Llama, tokens
from model_directories import stored_name, write_directory
from tiny_llama import TINY

from edgellm.cli import main
from edgellm.enginedir import open_engine, verify_engine
from edgellm.errors import BuildError, CheckpointError, UsageError
from edgellm.model.rotary import YarnScaling


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    Llama().write(path)
    return path


@pytest.mark.parametrize("kind", [Type.F16, Type.F32, Type.Q4_0, Type.Q4_1, Type.Q8_0])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_every_layout_becomes_an_engine(tmp_path: Path, kind: Type, compute: str) -> None:
    Llama(linear=kind).write(tmp_path / "tiny.gguf")
    engine = tmp_path / "engine"
    assert main(["build", str(tmp_path / "tiny.gguf"), "-o", str(engine), "--compute", compute]) == 0
    directory = open_engine(engine)
    verify_engine(directory)
    assert directory.compute == compute
    assert {"model.onnx", "tokenizer.json", "chat_template.jinja"} < set(directory.config.edgellm.files)


def test_what_the_engine_holds(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "engine"
    flags = [
        "--max-batch-size",
        "3",
        "--max-seq-len",
        "100",
        "--max-num-tokens",
        "32",
        "--model-name",
        "Tiny",
    ]
    assert main(["build", str(tiny), "-o", str(engine), *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{engine}: Tiny, ")
    assert "3 slots of 100 tokens, steps of 32" in printed.out
    assert printed.err == ""

    directory = open_engine(engine)
    build = directory.build
    assert (build.max_batch_size, build.max_seq_len, build.max_num_tokens, build.max_input_len) == (
        3,
        100,
        32,
        99,
    )
    assert directory.spec.vocab_size == len(tokens())
    assert (engine / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((engine / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [0, 2],
    }
    template = directory.chat_template()
    assert template is not None
    assert template.render([{"role": "user", "content": "hello"}]) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer = directory.tokenizer()
    assert tokenizer.encode("hello").tolist() == [tokens().index("hello")]


def test_defaults_fit_a_short_model(tiny: Path, tmp_path: Path) -> None:
    assert main(["build", str(tiny), "-o", str(tmp_path / "engine")]) == 0
    build = open_engine(tmp_path / "engine").build
    assert (build.max_batch_size, build.max_seq_len, build.max_num_tokens) == (4, 128, 256)


def test_an_engine_keeps_how_its_model_was_stretched(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    Llama(keys=keys).write(tmp_path / "tiny.gguf")
    assert main(["build", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "engine")]) == 0
    scaling = YarnScaling(factor=2.0, original_max_position_embeddings=128)
    assert open_engine(tmp_path / "engine").spec.rotary_scaling == scaling


def test_a_sliding_window_bounds_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Llama(keys={"llama.attention.sliding_window": 64}).write(tmp_path / "tiny.gguf")
    build = ["build", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "engine")]
    assert main([*build, "--max-seq-len", "65"]) == UsageError.exit_code
    assert (
        "--max-seq-len 65: from 2 to the 64 tokens of the model's sliding window" in capsys.readouterr().err
    )
    assert main(build) == 0
    assert open_engine(tmp_path / "engine").build.max_seq_len == 64


def test_a_model_without_a_template(tmp_path: Path) -> None:
    Llama(keys={"tokenizer.chat_template": None}).write(tmp_path / "tiny.gguf")
    assert main(["build", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "engine")]) == 0
    assert open_engine(tmp_path / "engine").chat_template() is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--max-batch-size", "0"], "--max-batch-size 0"),
        (["--max-seq-len", "129"], "--max-seq-len 129: from 2 to the 128 tokens"),
        (["--max-seq-len", "1"], "--max-seq-len 1"),
        (["--max-num-tokens", "3"], "--max-num-tokens 3: from 4"),
        (["--max-batch-size", "1", "--max-seq-len", "16", "--max-num-tokens", "17"], "to 16"),
    ],
)
def test_sizes_that_make_no_sense(
    tiny: Path, tmp_path: Path, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), "-o", str(tmp_path / "engine"), *flags]) == UsageError.exit_code
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_models_name_instead_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "smollm2-135m", "-o", str(tmp_path / "engine")]) == UsageError.exit_code
    assert "edgellm fetch smollm2-135m" in capsys.readouterr().err


def test_names_that_are_not_utf8(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = tmp_path / os.fsdecode(b"tiny\xff.gguf")
    named.symlink_to(tiny)
    assert main(["build", str(named), "-o", str(tmp_path / "engine")]) == 0
    assert open_engine(tmp_path / "engine").model_name == "tiny\ufffd"
    assert main(["build", str(tiny), "-o", str(named.with_suffix(".engine"))]) == BuildError.exit_code
    assert "is not UTF-8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["build", str(tiny), "-o", str(tmp_path / "other"), "--model-name", named.stem])
    assert "'tiny\\udcff' is not UTF-8" in capsys.readouterr().err


def test_an_engine_is_no_checkpoint(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = str(tmp_path / "engine")
    assert main(["build", str(tiny), "-o", engine]) == 0
    assert main(["build", engine, "-o", str(tmp_path / "other")]) == UsageError.exit_code
    assert f"{engine} is an engine already: `edgellm serve {engine}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer.chat_template": "{% for %}"},
        {"tokenizer.ggml.merges": ["x"]},
        {"tokenizer.ggml.pre": "unheard-of"},
        {"llama.rope.scaling.type": "yarn"},
    ],
)
def test_a_bad_checkpoint_leaves_nothing(
    tmp_path: Path, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Llama(keys=keys).write(tmp_path / "tiny.gguf")
    code = main(["build", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "engine")])
    assert code == CheckpointError.exit_code
    assert "tiny.gguf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.gguf"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_ends_a_build_in_its_midst(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "layers.1.mlp.down_proj"
    bad = TINY["9/3 heads of 16, untied"].weights()[name]
    bad[7, 9] = value
    path = write_directory(
        tmp_path / "tiny", TINY["9/3 heads of 16, untied"], tensors={f"{stored_name(name)}.weight": bad}
    )
    assert main(["build", str(path), "-o", str(tmp_path / "engine")]) == CheckpointError.exit_code
    assert f"tensor model.{name}.weight has a value that is not finite, at [7, 9]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


# A small limit on file sizes fails like a full disk does, in the middle of a write; SIGXFSZ must be ignored
# for write(2) to return an error, which Python does.
FULL_DISK = """
import resource, sys
from edgellm.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(["build", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("limit", [1000, 20_000, 60_000])
def test_a_write_that_fails_is_one_line_and_leaves_nothing(tiny: Path, tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(limit), str(tiny), "-o", str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == BuildError.exit_code, done.stderr
    assert done.stderr.count("\n") == 1
    assert os.strerror(errno.EFBIG) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "edgellm.model.onnx.emit", lambda *_args, **_more: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        main(["build", str(tiny), "-o", str(tmp_path / "engine")])
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == []


KILLED = """
import pathlib, sys
from edgellm.engine_place import new_engine
with new_engine(pathlib.Path(sys.argv[1])) as draft:
    (draft / "model.onnx.data").write_bytes(bytes(1000))
    print(draft, flush=True)
    sys.stdin.read()
"""


def test_a_killed_builds_draft_is_removed_by_the_next_and_a_living_ones_is_not(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    command = [sys.executable, "-c", KILLED]
    with (
        subprocess.Popen([*command, engine], stdin=-1, stdout=-1, text=True) as killed,
        subprocess.Popen([*command, engine], stdin=-1, stdout=-1, text=True) as other,
        subprocess.Popen([*command, tmp_path / "another"], stdin=-1, stdout=-1, text=True) as elsewhere,
    ):
        drafts = [
            Path(build.stdout.readline().strip()) for build in (killed, other, elsewhere) if build.stdout
        ]
        killed.kill()
        elsewhere.kill()
        killed.wait()
        elsewhere.wait()
        try:
            assert main(["build", str(tiny), "-o", str(engine)]) == 0
            printed = capsys.readouterr()
            assert printed.err == f"removed {drafts[0]}, left by a build that was killed\n"
            assert [draft.exists() for draft in drafts] == [False, True, True]
        finally:
            other.kill()
    verify_engine(open_engine(engine))


def test_a_checkpoint_that_cannot_be_looked_at_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As root nothing is forbidden; a name that is too long fails in the same place.
    assert main(["build", "x" * 300, "-o", str(tmp_path / "engine")]) == CheckpointError.exit_code
    assert "cannot be read: File name too long" in capsys.readouterr().err


# VmHWM and not ru_maxrss, which a child inherits from whoever started it.
PEAK = """
import pathlib, re, sys
from edgellm.cli import main
assert main(["build", *sys.argv[1:]]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.model
def test_smollm2_builds_in_300_mb(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Peak resident memory of the whole process, Python and onnx included."""
    command = [sys.executable, "-c", PEAK, str(smollm2_gguf), "-o", str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout.split()[-1]) * 1024 <= 300e6
