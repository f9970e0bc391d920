"""Every kernel configuration compiles for sm_90a and is what it should be, read off the machine code. Needs no GPU."""

from __future__ import annotations

import pytest

from kda_cute import cli, cubin, jit
from kda_cute.kernels.config import (
    MAX_SMEM_BYTES,
    KdaBuildConfig,
    KdaDecodeConfig,
    KdaFusedDecodeConfig,
    KdaFwdConfig,
    all_configs,
)


@pytest.fixture(scope="session")
def kept(tmp_path_factory, worker_id):
    """One cache for all workers: each configuration compiles once."""
    base = tmp_path_factory.getbasetemp()
    return {
        "KDA_CUTE_CACHE_DIR": str((base if worker_id == "master" else base.parent) / "kernels"),
        "KDA_CUTE_CACHE": "1",
    }


@pytest.fixture(scope="session")
def kernels(kept):
    """Configuration -> (its kernels, dynamic shared memory of each)."""

    def compiled(config):
        with pytest.MonkeyPatch.context() as m:
            for name, value in kept.items():
                m.setenv(name, value)
            header, payload = jit.artifact(config, "sm_90a")
        found = [kernel for image in cubin.extract(payload) for kernel in cubin.kernels(image)]
        assert found, "no cubin in the compiled object"
        return found, header["dynamic_smem"]

    return compiled


OTHERS = [
    KdaFwdConfig("fp16", "safe", 1, dtype="fp16"), KdaFwdConfig("fp32", "softplus", 2, dtype="fp16"),
    KdaBuildConfig("fp16", "log", dtype="fp16"), KdaFwdConfig(K=64), KdaFwdConfig("fp32", "softplus", 2, K=64),
    KdaFwdConfig(V=64), KdaFwdConfig("fp32", "log", 1, True, "fp16", 64, 64), KdaDecodeConfig(K=64),
    KdaDecodeConfig("fp32", "log", True, "fp16", 64, 64), KdaFwdConfig(checkpoints="every"),
    KdaFwdConfig("fp32", "softplus", 2, checkpoints="every"),
    KdaFwdConfig("fp32", "softplus", 2, True, checkpoints="offsets"), KdaDecodeConfig(by_token=True),
    KdaDecodeConfig("fp32", "softplus", True, by_token=True), KdaDecodeConfig(K=64, V=64, by_token=True),
    KdaFusedDecodeConfig("fp32", "softplus"), KdaFusedDecodeConfig("fp16", dtype="fp16"),
]  # fmt: skip
configs = pytest.mark.parametrize("config", [*all_configs(), *OTHERS], ids=lambda config: config.name)


@configs
def test_registers_suffice(config, kernels):
    """What is spilled is what `kda-cute inspect` allows. Short of registers in earnest, ptxas waits after each WGMMA;
    the source has four waits (three for maps, and none in what goes from segment to segment)."""
    for kernel in kernels(config)[0]:
        assert kernel.spills <= cubin.max_spills(config), kernel
        waits = 0 if kernel.count("HGMMA") == 0 else 3 if isinstance(config, KdaBuildConfig) else 4
        assert sum(n for name, n in kernel.opcodes.items() if name.startswith("WARPGROUP.DEPBAR")) == waits, kernel


@configs
def test_roles_share_what_registers_there_are(config, kernels):
    """More than the block gets at its launch, and setmaxnreg waits for ever."""
    if isinstance(config, (KdaDecodeConfig, KdaFusedDecodeConfig)):
        return
    groups = (1, 1, 1, 2) if isinstance(config, KdaBuildConfig) else (1, config.v_split, 3 - config.v_split)
    for kernel in kernels(config)[0]:
        if kernel.setmaxnreg:
            wanted = sum(n * registers for n, registers in zip(groups, kernel.setmaxnreg, strict=True))
            assert wanted <= sum(groups) * kernel.registers, kernel


@configs
def test_uses_tensor_cores_and_tma(config, kernels):
    found, _ = kernels(config)
    if isinstance(config, KdaDecodeConfig):  # has no use for them: it reads and writes states, in vectors
        vectors = [name for name in found[0].opcodes if name.startswith("LDG") and name.split(".")[-1] in ("64", "128")]
        assert sum(found[0].opcodes[name] for name in vectors) >= 4
        return
    if isinstance(config, KdaFusedDecodeConfig):  # reads a state in one piece, and writes it in vectors
        assert found[0].count("UBLKCP") == 1 + config.conv and found[0].opcodes["STG.E.128"] >= 8
        return
    assert sum(kernel.count("HGMMA") for kernel in found) > 0
    assert sum(kernel.count("UTMALDG") for kernel in found) > 0


def test_blocks_of_fused_decoding_are_as_many_as_planned(kernels):
    """Eight on an SM, by registers and by the shared memory that is asked for."""
    for config in all_configs():
        if isinstance(config, KdaFusedDecodeConfig):
            (kernel,), (dynamic,) = kernels(config)
            assert kernel.registers <= 64
            assert 8 * (kernel.static_smem + dynamic + 1024) <= 0.75 * (228 << 10)


@configs
def test_shared_memory_fits(config, kernels):
    found, dynamic = kernels(config)
    assert dynamic is not None and len(dynamic) == len(found)
    for kernel, at_launch in zip(found, dynamic, strict=True):
        assert kernel.static_smem + at_launch <= MAX_SMEM_BYTES


def test_inspect_allows_what_is_allowed_here(kernels, kept, capsys, monkeypatch):
    """Of this one ptxas spills some registers."""
    config = KdaFwdConfig()
    kernels(config)
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["inspect", config.name]) == 0
    assert config.name in capsys.readouterr().out
