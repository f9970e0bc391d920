"""The command line, called in process where that is enough."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from kda_cute import cache, cli, cubin, doctor, environment, jit
from kda_cute.kernels.config import KdaFwdConfig, all_configs
from tests import tiny_kernel
from tests.tiny_kernel import TinyConfig

H200 = ("NVIDIA H200", (9, 0))
B200 = ("NVIDIA B200", (10, 0))


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KDA_CUTE_CACHE", raising=False)
    monkeypatch.setattr(jit, "_loaded", {})
    monkeypatch.setattr(jit, "stats", jit.Stats())
    monkeypatch.setattr(environment, "_warned", set())


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "kda_cute", "--version"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0 and done.stdout.strip().count(".") == 2


@pytest.mark.parametrize("command", ["warmup", "inspect"])
def test_unknown_architecture(command, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([command, "--arch", "nonsense"])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert "--arch" in err and "'nonsense'" in err and "sm_90a" in err
    with pytest.raises(ValueError, match="arch is 'nonsense': must be sm_90a"):
        jit.warmup([], arch="nonsense")


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["warmup", "no_such_config"], ["inspect", "no_such_config"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    if argv[1:]:
        assert "no_such_config" in capsys.readouterr().err


# ---- doctor


def rows(capsys) -> dict[str, str]:
    """First word of each line of the table -> last word, the verdict."""
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    return {line.split("  ")[0].strip(): line.split()[-1] for line in lines}


def test_doctor_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: [])
    assert cli.main(["doctor"]) == 0
    verdicts = rows(capsys)
    assert verdicts["torch"] == "ok" and verdicts["GPU"] == "optional" and verdicts["cache"] == "ok"


def test_doctor_without_a_home(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: [])
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", "~nosuchuser/x")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not used: KDA_CUTE_CACHE_DIR is ~nosuchuser/x: there is no such home directory" in out
    assert out.split("\n\n")[0].splitlines()[-1].endswith("optional")


@pytest.mark.parametrize("gpus, hopper", [([H200], True), ([B200], False), ([B200, H200], True)])
def test_doctor_wants_a_hopper_and_a_torch_that_can_use_it(gpus, hopper, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
    monkeypatch.setattr(jit, "driver_version", lambda: 12090)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert cli.main(["doctor"]) == (0 if hopper else 1)
    verdicts = rows(capsys)
    assert (verdicts["GPU 0"] == "MISSING") == (not hopper)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor"]) == 1
    assert rows(capsys)["torch's CUDA"] == "MISSING"


@pytest.mark.parametrize("version, verdict", [(11080, "MISSING"), (12040, "untested"), (12090, "ok"), (13000, "ok")])
def test_doctor_driver(version, verdict, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: [H200])
    monkeypatch.setattr(jit, "driver_version", lambda: version)
    cli.main(["doctor"])
    assert rows(capsys)["driver"] == verdict


@pytest.mark.parametrize(
    "found, verdict", [("4.8.0", "MISSING"), ("4.8.1", "ok"), ("4.8.2.dev0", "ok"), ("4.9.0", "MISSING")]
)
def test_doctor_package_versions(found, verdict, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    assert doctor._package("nvidia-cutlass-dsl", "4.8.1", "4.9").verdict == verdict


def test_doctor_missing_package_fails(capsys, monkeypatch):
    from importlib.metadata import PackageNotFoundError, version

    def without(name):
        if name == "nvidia-cutlass-dsl":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without)
    assert cli.main(["doctor"]) == 1
    assert rows(capsys)["nvidia-cutlass-dsl"] == "MISSING"


# ---- demo


@pytest.fixture
def brief(monkeypatch):
    from kda_cute import demo

    monkeypatch.setattr(demo, "CPU", demo.Sizes(2, (30, 5), {1024: 8, 4096: 2}, (64, 128)))
    return demo


def test_demo_on_the_cpu(capsys, brief):
    assert cli.main(["demo", "--cpu"]) == 0
    out = capsys.readouterr().out
    for what in ("error", "time", "memory floor", "bandwidth", "tokens/s"):
        assert f"\n  {what} " in out
    rows = [line.split() for line in out.splitlines() if " kB " in line]
    assert [(int(row[0]), int(row[1])) for row in rows] == [(1000, 8), (4072, 2)]
    assert all(float(row[2].rstrip("%")) >= 95 for row in rows)  # of 64 and 16 answers
    assert [line.split()[:2] for line in out.splitlines() if line.endswith("#")] == [
        ["64", "KDA"], ["64", "SDPA"], ["128", "KDA"], ["128", "SDPA"],
    ]  # fmt: skip


def test_demo_counts_answers(brief):
    """A model that says the same to everything has few right ones."""
    model = brief.KimiLinear.load(brief.CHECKPOINT)
    torch.nn.init.zeros_(model.lm_head.weight)
    stream = brief.sample(8, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert brief.answer(model, stream)[0] < 0.2


def test_demo_fails_on_a_wrong_result(capsys, monkeypatch, brief):
    right, load = brief.chunk_kda, brief.KimiLinear.load

    def wrong(**call):
        o, state = right(**call)
        return o * 1.02, state

    def silent(path, device):
        model = load(path, device)
        torch.nn.init.zeros_(model.lm_head.weight)
        return model

    monkeypatch.setattr(brief, "chunk_kda", wrong)
    monkeypatch.setattr(brief.KimiLinear, "load", silent)
    assert cli.main(["demo", "--cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: the error is above" in out and "FAILED: recall up to 16384 tokens is" in out


# ---- warmup and inspect, with a kernel that compiles in a second


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(jit, "compile_kernel", tiny_kernel.compile)
    monkeypatch.setattr(cli, "all_configs", lambda dtype="bf16": [TinyConfig(0), TinyConfig(1)])


def test_warmup_fills_the_cache(tiny, capsys, monkeypatch):
    assert cli.main(["warmup", "tiny1"]) == 0
    assert "1 kernels: 1 compiled, 0 already there" in capsys.readouterr().out
    monkeypatch.setattr(jit, "_loaded", {})
    monkeypatch.setattr(jit, "stats", jit.Stats())
    assert cli.main(["warmup"]) == 0
    assert "2 kernels: 1 compiled, 1 already there" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "false"])
def test_warmup_without_a_cache_fails(value, tiny, monkeypatch, capsys):
    monkeypatch.setenv("KDA_CUTE_CACHE", value)
    assert cli.main(["warmup"]) == 1
    assert jit.stats.compiled == 0


@pytest.mark.parametrize("place", ["file", "~nosuchuser/x"])
def test_warmup_into_a_bad_directory_fails(place, tiny, monkeypatch, capsys, tmp_path):
    """Before it compiles anything."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", place)
    assert cli.main(["warmup", "tiny0"]) == 1
    assert "there is no cache to fill" in capsys.readouterr().err
    assert jit.stats.compiled == 0


def test_warmup_that_cannot_write_fails(tiny, monkeypatch, capsys):
    monkeypatch.setattr(cache, "write", lambda *args: False)
    assert cli.main(["warmup", "tiny0"]) == 1
    assert "not in the cache" in capsys.readouterr().err


def test_warmup_without_sources_fails(tiny, monkeypatch, capsys, tmp_path):
    """Imported from a zip."""
    monkeypatch.setattr(jit, "_source_dirs", lambda: [tmp_path / "kda.zip" / "kernels"])
    assert cli.main(["warmup", "tiny0"]) == 1
    assert "there is no cache to fill" in capsys.readouterr().err
    assert jit.stats.compiled == 0


def test_warmup_in_several_processes(tmp_path, monkeypatch, capfd):
    """Each compiles its share of what is not there yet."""
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(tmp_path))
    names = ["kda_decode_gbf16_log", "kda_decode_gbf16_log_vk"]
    assert cli.main(["warmup", "--jobs", "8", *names]) == 0
    assert "2 kernels: 2 compiled, 0 already there" in capfd.readouterr().out
    assert cli.main(["warmup", "--jobs", "8", *names]) == 0
    assert "0 compiled, 2 already there" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["warmup", "--jobs", "0"])


def test_default_of_warmup_is_every_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(jit, "load", lambda config, arch: asked.append((config, arch)))
    jit.warmup()
    assert asked == [(config, "sm_90a") for config in all_configs()]


def test_inspect(tiny, capsys):
    assert cli.main(["inspect", "tiny0", "--sass"]) == 0
    out = capsys.readouterr().out
    assert "registers" in out and "spills         0 registers" in out and "0 HGMMA" in out and "EXIT" in out


@pytest.mark.parametrize("stack, status", [(0, 0), (40, 0), (41, 1), (44, 1)])
def test_inspect_allows_what_the_tests_allow(stack, status, tiny, capsys, monkeypatch):
    """Local memory of up to 10 registers, however often it is accessed."""
    real = cubin.kernels

    def spilling(image):
        return [dataclasses.replace(k, stack=stack, opcodes=k.opcodes + Counter(STL=7, LDL=6)) for k in real(image)]

    monkeypatch.setattr(cubin, "kernels", spilling)
    monkeypatch.setitem(cubin.MAX_SPILLS, TinyConfig, cubin.MAX_SPILLS[KdaFwdConfig])
    assert cli.main(["inspect", "tiny0"]) == status
    assert "of at most 10 (STL 7, LDL 6)" in capsys.readouterr().out


def test_inspect_says_what_is_missing(tiny, capsys, monkeypatch):
    def absent():
        raise FileNotFoundError("nvdisasm not found: pip install nvidia-cuda-nvdisasm")

    monkeypatch.setattr(cubin, "nvdisasm", absent)
    assert cli.main(["inspect"]) == 1
    assert "pip install nvidia-cuda-nvdisasm" in capsys.readouterr().err
