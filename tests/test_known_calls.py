"""A call like an earlier one is not checked again: what that lets through, and what it must not. Needs no GPU."""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kda_cute import contract, devices, jit, known_calls, replay_shape
from kda_cute.backends import hopper
from kda_cute.kernels import build_sm90, decode_sm90
from kda_cute.kernels.arguments import Kept, Numbers
from kda_cute.kernels.config import INDEX_INT64, KEPT_INT64, KdaBuildConfig, KdaDecodeConfig, KdaFwdConfig
from kda_cute.ops import chunk_kda, fused_recurrent_kda, fwd
from tests.strategies import Case
from tests.test_contract import BAD, LOG, NOT_SERVED, SOFTPLUS, OnGpu, arguments, bf16, fp32, fp64, on_gpu, zeros

H, D, T = 2, 128, 20
FIXED = Case(1, (T,), H=H, initial_state="fp32")
PACKED = Case(1, (7, 13), "int64", H=H, initial_state="fp32")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hopper GPU that notes each launch: the configuration and the arguments, of tensors the address and strides."""
    calls: list[tuple[Any, ...]] = []

    def load(config: KdaFwdConfig) -> Any:
        return lambda *given: calls.append(
            (config, *((x.data_ptr(), x.stride()) if isinstance(x, torch.Tensor) else x for x in given))
        )

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(hopper, "sm_count", lambda device: 132)
    monkeypatch.setattr(hopper, "current_device", lambda: 0)
    monkeypatch.setattr(devices, "gpu", lambda index: ((9, 0), "NVIDIA H200"))
    monkeypatch.setattr(hopper, "copies_logged", set())
    monkeypatch.setattr(hopper, "torch", SimpleNamespace(**{**vars(torch), "device": lambda *_: "cpu"}))
    monkeypatch.setattr(known_calls, "known", {})
    return calls


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call that was checked."""
    calls: list[None] = []
    check_call = contract.check_call

    def counted(*args: Any) -> Any:
        calls.append(None)
        return check_call(*args)

    monkeypatch.setattr(contract, "check_call", counted)
    return calls


def full(case: Case, **changes: Any) -> dict[str, Any]:
    """A call that brings its outputs along."""
    states = dict(final_state=zeros(*case.state_shape, dtype=fp32))
    return on_gpu(arguments(case, out=zeros(1, T, H, D), **states, **changes))


def make_known(kwargs: dict[str, Any], launches: list[Any]) -> None:
    """Two calls, so that the third takes the short way."""
    for _ in range(2):
        chunk_kda(**kwargs)
    assert any(known_calls.known.values())
    launches.clear()


CALLS: dict[str, Any] = {
    "fixed": lambda: full(FIXED),
    "packed": lambda: full(PACKED),
    "allocates": lambda: on_gpu(arguments(FIXED, output_final_state=True)),
    "no states": lambda: on_gpu(arguments()),
    "log decay": lambda: on_gpu(arguments(LOG)),
    "state in place": lambda: {**(x := full(FIXED)), "final_state": x["initial_state"]},
    "pool of states": lambda: {
        **full(PACKED, state_indices=torch.tensor([4, 0], dtype=torch.int32)),
        "initial_state": (pool := zeros(5, H, D, D, dtype=fp32)),
        "final_state": pool,
    },  # fmt: skip
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_third_call_is_not_checked(make: Any, launches: list[Any], checks: list[None]) -> None:
    kwargs = make()
    o, S = zip(*(chunk_kda(**kwargs) for _ in range(5)), strict=True)
    assert len(checks) == 2 and len(launches) == 5
    given = kwargs.get("out"), kwargs.get("final_state")
    for i in range(5):
        assert o[i] is given[0] if given[0] is not None else o[i].shape == (1, T, H, D) and o[i].dtype == bf16
        assert launches[i][5] == (o[i].data_ptr(), o[i].stride())
        if kwargs.get("output_final_state"):
            assert (
                S[i].shape == (1, H, D, D)
                and S[i].dtype == fp32
                and address(launches[i], "final_state") == S[i].data_ptr()
            )
        else:
            assert S[i] is given[1]
    if given[0] is None:
        assert len({x.data_ptr() for x in o}) == 5  # each call its own
    else:
        assert all(x == launches[0] for x in launches)


def test_another_gpu_is_current(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are on GPU 0: there is the launch, whichever is the current one, which it is again afterwards."""
    current = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(hopper, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    on: list[int] = []
    load = jit.load
    monkeypatch.setattr(jit, "load", lambda config: lambda *given: (on.append(current[0]), load(config)(*given)))
    kwargs = full(FIXED)
    for index in (0, 1, 1, 0, 1):
        current[0] = index
        chunk_kda(**kwargs)
        assert current == [index]
    assert on == [0] * 5
    assert launches == [launches[0]] * 5


def test_shapes_in_turn(launches: list[Any], checks: list[None]) -> None:
    cases = Case(1, (5,), H=H), Case(1, (6,), H=H), Case(1, (2, 4), "int64", H=H), Case(1, (1, 2, 3), "int64", H=H)
    for _ in range(4):
        for case in cases:
            chunk_kda(**on_gpu(arguments(case)))
    assert len(checks) == 2 * len(cases) and len(launches) == 4 * len(cases)


def test_fwd_is_known_too(launches: list[Any], checks: list[None]) -> None:
    a = full(FIXED)
    A_log, dt_bias = a["A_log"].requires_grad_(), a["dt_bias"].requires_grad_()
    for _ in range(4):
        fwd(a["q"], a["k"], a["v"], a["g"], a["beta"], 0.1, a["out"], A_log, dt_bias, -5.0)
    assert len(checks) == 2 and len(launches) == 4 and launches[0] == launches[3]
    with pytest.raises(NotImplementedError, match="A_log, dt_bias requires grad"):  # as ever outside of no_grad
        chunk_kda(
            a["q"], a["k"], a["v"], a["g"], a["beta"], 0.1, None, False, True, True, True, False, True, -5.0, True,
            A_log=A_log, dt_bias=dt_bias, out=a["out"],
        )  # fmt: skip


# ---- what is refused, is refused after a good call


FOR_THE_GPU = {
    name: entry
    for name, entry in BAD.items()
    if entry[0] is not SOFTPLUS and name not in ("q-list", "backend-cute-cpu", "out-and-grad")
    and not name.startswith(("cu_seqlens-start", "cu_seqlens-neg", "cu_seqlens-dec", "cu_seqlens-past"))
    # nor are these values looked at
    and name not in ("indices-past-the-pool", "indices-twice", "checkpoint-indices-past-the-pool")
}  # fmt: skip


@pytest.mark.parametrize("case, changes, error, message", FOR_THE_GPU.values(), ids=FOR_THE_GPU)
def test_error(case: Case, changes: dict[str, Any], error: type[Exception], message: str, launches: list[Any]) -> None:
    good = arguments(case)
    for name in changes.keys() & {"initial_state", "final_state", "out"}:  # so that a good call has it too
        shape = (1, T, H, D) if name == "out" else case.state_shape
        good[name] = zeros(*shape, dtype=bf16 if name == "out" else fp32)
    make_known(on_gpu(good), launches)
    with pytest.raises(error, match=message):
        chunk_kda(**on_gpu({**good, **changes}))
    assert not launches


def test_not_a_tensor_in_place_of_q(launches: list[Any]) -> None:
    kwargs = full(FIXED)
    make_known(kwargs, launches)
    with pytest.raises(TypeError, match="q is a list"):
        chunk_kda(**{**kwargs, "q": [1.0]})


@pytest.mark.parametrize("name", ["fp32", "g", "beta"])
def test_not_served(name: str, launches: list[Any]) -> None:
    case, changes, message = NOT_SERVED[name]
    make_known(on_gpu(arguments(Case(1, (T,), H=H))), launches)
    with pytest.raises(NotImplementedError, match=message):
        chunk_kda(**on_gpu(arguments(case, **changes)))
    assert not launches


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
@pytest.mark.parametrize("how", ["same tensor", "gradients are on again"])
def test_requires_grad(how: str, name: str, launches: list[Any]) -> None:
    kwargs = full(FIXED)
    if how == "same tensor":
        make_known(kwargs, launches)
        kwargs[name].requires_grad_()
    else:
        kwargs[name].requires_grad_()
        with torch.no_grad():
            make_known(kwargs, launches)
    with pytest.raises(NotImplementedError, match=f"^{name} requires grad"):
        chunk_kda(**kwargs)
    assert not launches


@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "initial_state", "final_state", "out", "A_log", "cu_seqlens"])
def test_tensor_that_changed_under_its_name(name: str, launches: list[Any]) -> None:
    """The same objects, but one has another shape now."""
    kwargs = full(PACKED)
    make_known(kwargs, launches)
    kwargs[name].resize_(0, *kwargs[name].shape)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        chunk_kda(**kwargs)
    assert not launches


def test_check_of_values(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = full(PACKED)
    make_known(kwargs, launches)
    monkeypatch.setattr(contract, "CHECK_VALUES", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kwargs["cu_seqlens"][1] = T + 1
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 20: must be at least"):
        chunk_kda(**kwargs)
    assert not launches


def test_another_backend(launches: list[Any]) -> None:
    kwargs = full(FIXED)
    make_known(kwargs, launches)
    chunk_kda(**kwargs, backend="reference")
    assert not launches and not (kwargs["out"] == 0).all()
    with pytest.raises(ValueError, match="backend is 'triton'"):
        chunk_kda(**kwargs, backend="triton")
    with pytest.raises(ValueError, match=r"backend is \['cute'\]"):
        chunk_kda(**kwargs, backend=["cute"])


# ---- what is served in another way, is


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, strides and type at an address that is no multiple of 16."""
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x.as_subclass(torch.Tensor))
    assert flat.data_ptr() % 16 and flat.stride() == x.stride()
    return flat.as_subclass(type(x))


def by_name(launch: tuple[Any, ...]) -> dict[str, Any]:
    """What a kernel was given; of tensors the address."""
    config, *given = launch
    tensors, names = ("q", "k", "v", "g", "out"), Numbers._fields
    if isinstance(config, KdaDecodeConfig):
        names = decode_sm90.Numbers._fields + (decode_sm90.ByToken._fields if config.by_token else ())
    elif isinstance(config, KdaFwdConfig) and config.checkpoints:
        names += tuple(f"kept_{name}" for name in Kept._fields)
    elif isinstance(config, KdaBuildConfig):
        tensors = ("k", "v", "g")
        names = tuple(inspect.signature(build_sm90.KdaBuildSm90.__call__).parameters)[4:-1]
    values = [x[0] for x in given[: len(tensors)]] + given[len(tensors) :]
    return dict(zip((*tensors, *names), values, strict=True))


def address(launch: tuple[Any, ...], name: str) -> int:
    return by_name(launch)[name]


class OneWorkspace(dict[Any, Any]):
    """One workspace on the default stream, of any size."""

    def setdefault(self, key: Any, default: Any = None) -> Any:
        return [self["workspace"]]


@pytest.mark.parametrize("kernel", ["forward", "checkpoints", "offsets", "maps", "decode", "by token"])
def test_numbers_are_in_their_places(kernel: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = torch.zeros(1, dtype=torch.uint8)
    monkeypatch.setattr(hopper, "current_stream", lambda device: 0)
    monkeypatch.setattr(hopper, "kept_workspaces", OneWorkspace(workspace=workspace))
    T, N = (8192, 1) if kernel == "maps" else (96, 2)
    kwargs = arguments(Case(1, (T,) if N == 1 else (T - 7, 7), "int64" if N > 1 else None, H=H), scale=0.75)
    pools = [zeros(5, size, dtype=fp32)[:, : H * D * D].view(5, H, D, D) for size in (3 * H * D * D, 2 * H * D * D)]
    kwargs.update(initial_state=pools[0], final_state=pools[1], state_indices=torch.arange(N, dtype=torch.int32))
    kwargs.update(out=zeros(1, T, H, D), lower_bound=-2.5, has_initial_state=zeros(N, dtype=torch.bool))
    kwargs["beta"] = zeros(2, T, H + 3)[:1, :, :H]
    if kernel in ("decode", "by token"):
        del kwargs["safe_gate"]
        kwargs["token_states"] = zeros(1, T, H, D, D, dtype=fp32)
        if kernel == "by token":
            kwargs["token_states"] = zeros(7, 9, 2, H, D, D, dtype=fp32)[:, :, 0].contiguous()[::2]
            kwargs["token_state_indices"], kwargs["num_accepted_tokens"] = zeros(2, dtype=torch.int64), zeros(2).int()
            kwargs["state_indices"] = zeros(2, 3, dtype=torch.int32)
        fused_recurrent_kda(**on_gpu(kwargs))
    elif kernel == "offsets":
        kwargs["checkpoint_offsets"], kwargs["checkpoint_indices"] = zeros(2, 3).int(), zeros(2, 3).long()
        kwargs["checkpoint_state"] = zeros(9, 2, H, D, D, dtype=fp32)[:, 0]
        chunk_kda(**on_gpu(kwargs))
    else:
        chunk_kda(**on_gpu(kwargs), checkpoint_interval=64 if kernel == "checkpoints" else None)
    expected = {name: x.data_ptr() for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
    expected.update(P=5, N=N, items=N * H, scale=0.75, lower_bound=-2.5, initial_pitch=3 * H * D * D * 4)
    expected.update(final_pitch=2 * H * D * D * 4, beta_row=H + 3, beta_batch=T * (H + 3))
    if kernel == "by token":
        expected.update(per=3, accepted=expected["num_accepted_tokens"], rows_of=expected["token_state_indices"])
        expected.update(rows=4, tokens=9, row_pitch=2 * 9 * H * D * D * 4, replay=0)
    if kernel == "offsets":
        kept = dict(states="checkpoint_state", offsets="checkpoint_offsets", indices="checkpoint_indices")
        expected.update({f"kept_{name}": expected[argument] for name, argument in kept.items()})
        expected.update(kept_pitch=2 * H * D * D * 4, kept_rows=9, kept_every=0, kept_first=0, kept_per=3)
    if kernel == "checkpoints":
        expected.update(kept_pitch=H * D * D * 4, kept_every=2, kept_offsets=0, kept_indices=0, kept_per=0)
    assert len(launches) == (2 if kernel == "maps" else 1)
    for launch in launches:
        config, found = launch[0], by_name(launch)
        expected["workers"] = 132 if isinstance(config, KdaBuildConfig) else 132 // getattr(config, "v_split", 1)
        expected["workspace"] = workspace.data_ptr() if found.get("workspace") else 0
        expected.setdefault("cu_seqlens", 0)
        assert found.pop("flags") != 0
        assert (found.pop("kept_scratch", 0) != 0) == (kernel == "offsets")
        if kernel == "checkpoints":  # which the call makes
            assert found.pop("kept_states") and found.pop("kept_first") and found.pop("kept_rows") == 96 // 64 + 2
        assert found == {name: expected[name] for name in found}
        assert found.get("workspace") or kernel != "maps"


def test_a_call_between_two_launches_of_another(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a workspace of its own to the end; later calls have them again."""
    monkeypatch.setattr(hopper, "current_stream", lambda device: 0)
    monkeypatch.setattr(hopper, "kept_workspaces", {})
    kwargs = on_gpu(arguments(Case(1, (8192,), H=H)))
    load, between = jit.load, [kwargs]

    def load_with_another(config: Any) -> Any:
        launch = load(config)

        def launched(*given: Any) -> None:
            launch(*given)
            if isinstance(config, KdaBuildConfig) and between:
                chunk_kda(**between.pop())

        return launched

    monkeypatch.setattr(jit, "load", load_with_another)
    chunk_kda(**kwargs)
    first, other, other_end, first_end = (by_name(launch)["workspace"] for launch in launches)
    assert first == first_end and other == other_end and first != other
    for _ in range(3):
        chunk_kda(**kwargs)
    assert {by_name(launch)["workspace"] for launch in launches[4:]} <= {first, other}
    assert [len(kept) for kept in hopper.kept_workspaces.values()] == [2]


@pytest.mark.parametrize("name", sorted({*"qkvg", "out", "A_log", "dt_bias", "initial_state", "final_state"}))
def test_odd_address(name: str, launches: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    kwargs = full(PACKED)
    make_known(kwargs, launches)
    x = shifted(kwargs[name])
    with caplog.at_level(logging.WARNING, "kda_cute"):
        for _ in range(3):
            chunk_kda(**{**kwargs, name: x})
    assert all(address(y, name) % 16 == 0 for y in launches) and len(launches) == 3
    logged = [r.getMessage().split()[0] for r in caplog.records]
    assert logged == ([] if name in ("A_log", "dt_bias") else [name])


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "out", "initial_state", "cu_seqlens"])
def test_odd_strides(name: str, launches: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    kwargs = full(PACKED)
    make_known(kwargs, launches)
    x = kwargs[name]
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 0].as_subclass(type(x))
    with caplog.at_level(logging.WARNING, "kda_cute"):
        for _ in range(3):
            chunk_kda(**{**kwargs, name: wide})
    assert all(address(y, name) != wide.data_ptr() for y in launches) and len(launches) == 3
    assert [r.getMessage().split()[0] for r in caplog.records] == [name]


@pytest.mark.parametrize("twice", ["state_indices", "token_state_indices"])
def test_one_tensor_for_two_arguments(twice: str, launches: list[Any]) -> None:
    """Once they are two, each is looked at: rows in int64 are not read as int32."""
    pool, rows = zeros(5, H, D, D, dtype=fp32), torch.tensor([1, 0], dtype=torch.int32)
    kwargs = {**full(PACKED), "initial_state": pool, "state_indices": rows, "token_state_indices": rows}
    kwargs.update(final_state=pool, token_states=zeros(2, T, H, D, D, dtype=fp32))
    del kwargs["safe_gate"]
    for _ in range(4):
        fused_recurrent_kda(**kwargs)
    fused_recurrent_kda(**{**kwargs, twice: rows.long()})
    flags = [by_name(launch)["flags"] for launch in launches]
    wide = INDEX_INT64 if twice == "state_indices" else KEPT_INT64
    assert {x & wide for x in flags[:4]} == {0} and flags[4] & wide


@pytest.mark.parametrize("how", ["address", "pitch"])
@pytest.mark.parametrize("name", ["initial_state", "final_state", "checkpoint_state", "token_states", "replay"])
def test_what_is_never_copied(name: str, how: str, launches: list[Any]) -> None:
    """States of servers that the kernels cannot address are refused, before and after calls that were right."""
    pool, rows = zeros(5, H, D, D, dtype=fp32), torch.tensor([1, 0])
    kwargs = {**full(PACKED), "state_indices": torch.tensor([4, 0]), "initial_state": pool}
    kwargs["final_state"] = torch.zeros_like(pool)
    function: Any = chunk_kda
    if name in ("token_states", "replay"):
        function = fused_recurrent_kda
        del kwargs["safe_gate"]
        kwargs[name] = (
            zeros(3, 2, H, D, D, dtype=fp32)
            if name == "token_states"
            else (zeros(*replay_shape(3, 2, H, D, D), dtype=fp32))
        )
        kwargs["token_state_indices"] = rows
    elif name == "checkpoint_state":
        kwargs.update(checkpoint_offsets=torch.tensor([3, 2]), checkpoint_indices=rows, checkpoint_state=pool.clone())
    x = kwargs[name] = kwargs[name].as_subclass(OnGpu)
    for _ in range(3):
        function(**kwargs)
    launches.clear()
    wide = torch.zeros(len(x), x[0].numel() + 1)[:, :-1].view(x.shape).as_subclass(OnGpu)
    for _ in range(3):
        with pytest.raises(
            ValueError, match=f"^{name} (is at address|has strides) .*16|^{name} has strides .* contiguous"
        ):
            function(**{**kwargs, name: shifted(x) if how == "address" else wide})
    assert not launches


CHANGES: dict[str, dict[str, Any]] = {
    "scale": dict(scale=0.25),
    "lower_bound": dict(lower_bound=-1.0),
    "l2norm": dict(use_qk_l2norm_in_kernel=False),
    "beta sigmoid": dict(use_beta_sigmoid_in_kernel=False),
    "negative eigenvalues": dict(allow_neg_eigval=True),
    "layout": dict(state_v_first=True),
    "gate": dict(use_gate_in_kernel=False, A_log=None, dt_bias=None),
    "no A_log": dict(A_log=None),
    "no dt_bias": dict(dt_bias=None),
    "no initial_state": dict(initial_state=None),
    "no final_state": dict(final_state=None),
    "state in place": dict.fromkeys(("initial_state", "final_state"), zeros(2, H, D, D, dtype=fp32)),
    "initial_state": dict(initial_state=zeros(2, H, D, D)),
    "final_state": dict(final_state=zeros(2, H, D, D)),
    "g": dict(g=zeros(1, T, H, D, dtype=fp32)),
    "beta": dict(beta=zeros(1, T, H, dtype=fp32)),
    "cu_seqlens": dict(cu_seqlens=torch.tensor([0, 7, T], dtype=torch.int32)),
    "more sequences": dict(
        cu_seqlens=torch.tensor([0, 7, 9, T]), initial_state=zeros(3, H, D, D), final_state=zeros(3, H, D, D)
    ),
    "strides": dict(k=zeros(1, T, H, 3 * D)[..., D : 2 * D]),
    "flags that are no bool": dict(use_qk_l2norm_in_kernel=torch.tensor(False), use_beta_sigmoid_in_kernel=0),
    "old name of the layout": dict(transpose_state_layout=True),
}


@pytest.mark.filterwarnings("ignore:transpose_state_layout:DeprecationWarning")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_change_takes_effect(changes: dict[str, Any], launches: list[Any]) -> None:
    """A changed call, between known ones and known itself, launches what it launches when nothing is known."""
    kwargs = full(PACKED, scale=0.5, allow_neg_eigval=False)
    changed = {**kwargs, **changes}
    chunk_kda(**changed)
    chunk_kda(**kwargs)
    expected, plain = launches
    assert expected != plain
    known_calls.known.clear()
    make_known(kwargs, launches)
    for _ in range(4):
        chunk_kda(**changed)
        chunk_kda(**kwargs)
    assert launches == [expected, plain] * 4


def test_outputs_given_and_not(launches: list[Any]) -> None:
    kwargs = full(FIXED)
    for _ in range(4):
        for changes in (
            {},
            dict(out=None),
            dict(final_state=None),
            dict(final_state=None, output_final_state=True),
            dict(out=None, final_state=None, output_final_state=True),
        ):
            asked: dict[str, Any] = {**kwargs, **changes}
            o, S = chunk_kda(**asked)
            assert o is asked["out"] or asked["out"] is None and o is not kwargs["out"]
            assert S is asked["final_state"] or asked["output_final_state"] and S is not None
            assert address(launches[-1], "out") == o.data_ptr()
            assert address(launches[-1], "final_state") == (0 if S is None else S.data_ptr())


def test_gate_without_parameters(launches: list[Any]) -> None:
    kwargs = full(FIXED, A_log=None, dt_bias=None)
    for _ in range(4):
        chunk_kda(**kwargs)
        chunk_kda(**{**kwargs, "use_gate_in_kernel": False})
    assert [x[0].gate for x in launches] == ["safe", "log"] * 4


def test_flag_that_changes_its_mind(launches: list[Any]) -> None:
    flag = torch.tensor(True)
    kwargs = full(FIXED, use_qk_l2norm_in_kernel=flag)
    make_known(kwargs, launches)
    chunk_kda(**kwargs)
    flag.zero_()
    chunk_kda(**kwargs)
    assert launches[0] != launches[1]


def test_fp64_parameters_are_converted_in_every_call(launches: list[Any]) -> None:
    kwargs = full(FIXED)
    make_known(kwargs, launches)
    for _ in range(3):
        chunk_kda(**{**kwargs, "A_log": kwargs["A_log"].to(fp64)})
    assert all(address(x, "A_log") != kwargs["A_log"].data_ptr() for x in launches)


def test_configuration_follows_the_call(launches: list[Any]) -> None:
    for gate, case in (("safe", Case(1, (T,), H=H)), ("log", LOG)):
        for g_dtype, name in ((bf16, "bf16"), (fp32, "fp32")):
            for _ in range(3):
                chunk_kda(**on_gpu(arguments(case, g=zeros(1, T, H, D, dtype=g_dtype))))
            assert {x[0] for x in launches} == {KdaFwdConfig(name, gate, 2)}  # few heads
            launches.clear()


# ---- what it costs


def test_memory_is_bounded(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "KNOWN_MAX", 3)
    for scale in range(1, 20):
        for _ in range(2):
            chunk_kda(**full(FIXED, scale=scale))
        assert len(known_calls.known) <= 3
    assert by_name(launches[-1])["scale"] == 19


def test_no_tensor_is_kept(launches: list[Any]) -> None:
    kwargs = full(PACKED)
    make_known(kwargs, launches)
    watched = [weakref.ref(x) for x in kwargs.values() if isinstance(x, torch.Tensor)]
    assert len(watched) == 11
    del kwargs
    assert not any(ref() is not None for ref in watched)


def test_torch_without_its_guards(launches: list[Any], checks: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "TensorGuards", None)
    for _ in range(4):
        chunk_kda(**full(FIXED))
    assert len(launches) == len(checks) == 4
