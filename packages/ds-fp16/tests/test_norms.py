"""Norms and clipping against plain torch, where plain torch has no answer against arithmetic in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_core.errors import CommError, EngineError, NotBuiltError
from ds_core.testing.ranks import run_ranks
from ds_fp16 import norms

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BAD = [math.inf, -math.inf, math.nan]
P = [1, 2, 2.5, 3, math.inf]
TOL = 2**-15
"""What ``sum_of_squares`` promises of its sum (1.7e-5) holds of the root, with a factor of two to spare; and p-norms of
fp64 are better than that."""


def _param(values: Any, dtype: torch.dtype = torch.float32, grad: bool = True) -> nn.Parameter:
    param = nn.Parameter(torch.as_tensor(values, dtype=dtype))
    if grad:
        param.grad = param.detach().clone()
    return param


def _params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Odd shapes, an empty one, one that is not contiguous, one without a gradient; in both senses of the value."""
    torch.manual_seed(0)
    shapes = [(3, 5), (0, 4), (), (63,), (4097,)]
    params = [_param(torch.randn(shape), dtype) for shape in shapes]
    params.append(_param(torch.randn(4, 6), dtype, grad=False))
    params.append(_param(torch.randn(4, 6).t(), dtype))
    return params


def _exact(tensors: list[torch.Tensor], p: float) -> float:
    flat = torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])
    return float(torch.linalg.vector_norm(flat, p)) if flat.numel() else 0.0


def _grads(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [param.grad for param in params if param.grad is not None]


class TestClipGradNorm:
    @pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, math.inf])
    @pytest.mark.parametrize("p", P)
    def test_it_is_torchs_where_there_is_one_process(self, p: float, max_norm: float) -> None:
        ours, theirs = _params(), _params()
        norm = norms.clip_grad_norm_(ours, max_norm, p)
        # torch takes no maximum of an empty tensor.
        expected = torch.nn.utils.clip_grad_norm_([q for q in theirs if q.numel()], max_norm, p)
        assert float(norm) == pytest.approx(float(expected), rel=2**-11)  # torch sums 4097 terms in fp32
        for a, b in zip(_grads(ours), _grads(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=2**-11, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        params = _params(dtype)
        exact = _exact(_grads(params), 2)
        norm = norms.clip_grad_norm_(params, 1.0)
        assert norm.shape == ()
        assert norm.dtype == torch.float64
        assert float(norm) == pytest.approx(exact, rel=TOL)
        assert all(grad.dtype == dtype for grad in _grads(params))
        # Each scaled element is rounded once, by half a unit of its dtype; tiny ones fall among fp16's subnormals.
        assert _exact(_grads(params), 2) == pytest.approx(1.0, rel=TOL + torch.finfo(dtype).eps)

    def test_below_the_limit_nothing_changes(self) -> None:
        params = _params()
        before = [grad.clone() for grad in _grads(params)]
        norms.clip_grad_norm_(params, 1e3)
        assert all(torch.equal(a, b) for a, b in zip(_grads(params), before, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("p", P)
    @pytest.mark.parametrize("bad", BAD)
    def test_inf_and_nan_show_as_in_torch(self, bad: float, p: float, dtype: torch.dtype) -> None:
        ours, theirs = ([_param([1.0, bad], dtype), _param([2.0], dtype)] for _ in range(2))
        norm = norms.clip_grad_norm_(ours, 1.0, p)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0, p)
        assert float(norm) == pytest.approx(float(expected), nan_ok=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, equal_nan=True)

    def test_a_generator_and_a_single_tensor(self) -> None:
        assert float(norms.clip_grad_norm_((p for p in [_param([3.0]), _param([4.0])]), 9.0)) == pytest.approx(5)
        assert float(norms.clip_grad_norm_(_param([3.0, 4.0]), 9.0)) == pytest.approx(5)

    @pytest.mark.parametrize("params", [[], [_param([1.0], grad=False)], [_param(torch.empty(0))]])
    @pytest.mark.parametrize("p", P)
    def test_nothing_to_clip(self, params: list[nn.Parameter], p: float) -> None:
        assert float(norms.clip_grad_norm_(params, 1.0, p)) == 0.0

    def test_mixed_dtypes(self) -> None:
        params = [_param([3.0], torch.float16), _param([4.0], torch.float64), _param([12.0], torch.bfloat16)]
        assert float(norms.clip_grad_norm_(params, 6.5)) == pytest.approx(13.0)
        assert [float(param.grad) for param in params] == pytest.approx([1.5, 2.0, 6.0], rel=2**-8)

    @pytest.mark.parametrize("p", [0, -1, -math.inf, math.nan])
    def test_what_is_no_norm_is_refused(self, p: float) -> None:
        with pytest.raises(EngineError, match="norm_type is"):
            norms.clip_grad_norm_(_params(), 1.0, p)

    @pytest.mark.parametrize("max_norm", [-1.0, math.nan])
    def test_a_limit_that_is_none_is_refused(self, max_norm: float) -> None:
        with pytest.raises(EngineError, match="max_norm is"):
            norms.clip_grad_norm_(_params(), max_norm)
        with pytest.raises(EngineError, match="max_norm is"):
            norms.clip_tensors_by_global_norm([torch.ones(1)], max_norm)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.lists(st.floats(-1e3, 1e3, width=32), max_size=9), min_size=1, max_size=4),
        st.floats(0.01, 1e4),
        st.sampled_from(P),
    )
    def test_the_limit_is_kept(self, values: list[list[float]], max_norm: float, p: float) -> None:
        params = [_param(value) for value in values]
        exact = _exact(_grads(params), p)
        assert float(norms.clip_grad_norm_(params, max_norm, p)) == pytest.approx(exact, rel=TOL, abs=1e-30)
        after = _exact(_grads(params), p)
        # Subnormal results lose digits, which no relative bound covers.
        assert after == pytest.approx(min(exact, max_norm * exact / (exact + 1e-6)), rel=TOL, abs=1e-30)


class TestLargeFinite:
    """Sums of squares overflow long before the numbers do."""

    CASES = ((torch.float16, 6e4), (torch.bfloat16, 1e38), (torch.float32, 1e38), (torch.float32, 3e38))

    @pytest.mark.parametrize(("dtype", "value"), CASES)
    @pytest.mark.parametrize("p", [1, 2, 3, math.inf])
    def test_their_norm_is_finite(self, dtype: torch.dtype, value: float, p: float) -> None:
        params = [_param(torch.full((2000,), value), dtype), _param(torch.full((3,), -value), dtype)]
        exact = _exact(_grads(params), p)
        assert float(norms.get_global_norm_of_tensors(_grads(params), p)) == pytest.approx(exact, rel=TOL)
        assert norms.get_weight_norm(params, p) == pytest.approx(exact, rel=TOL)
        assert norms.get_flattened_grad_norm(params, p) == pytest.approx(exact, rel=TOL)

    def test_they_are_clipped_to_the_limit(self) -> None:
        params = [_param(torch.full((2000,), 1e30))]
        norms.clip_grad_norm_(params, 2.0)
        assert _exact(_grads(params), 2) == pytest.approx(2.0, rel=TOL)


class TestNorms:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("p", P)
    def test_of_weights_gradients_and_tensors(self, p: float, dtype: torch.dtype) -> None:
        params = _params(dtype)
        assert norms.get_weight_norm(params, p) == pytest.approx(_exact(list(params), p), rel=TOL)
        exact = _exact(_grads(params), p)
        assert norms.get_flattened_grad_norm(params, p) == pytest.approx(exact, rel=TOL)
        found = norms.get_global_norm_of_tensors(_grads(params), p)
        assert isinstance(found, torch.Tensor)
        assert found.shape == ()
        assert float(found) == pytest.approx(exact, rel=TOL)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("p", P)
    def test_inf_and_nan_are_minus_one(self, p: float, bad: float, dtype: torch.dtype) -> None:
        params = [_param([1.0, 2.0], dtype), _param([bad, 1.0], dtype)]
        assert norms.get_weight_norm(params, p) == -1
        assert norms.get_flattened_grad_norm(params, p) == -1
        assert float(norms.get_global_norm_of_tensors(_grads(params), p)) == -1

    @pytest.mark.parametrize("p", P)
    def test_of_nothing(self, p: float) -> None:
        assert norms.get_weight_norm([], p) == 0
        assert norms.get_flattened_grad_norm([_param([1.0], grad=False)], p) == 0
        assert float(norms.get_global_norm_of_tensors([], p)) == 0
        assert float(norms.get_global_norm_of_tensors([torch.empty(0)], p)) == 0

    def test_weights_that_another_stage_counts_are_left_out(self) -> None:
        tied = _param([100.0])
        tied.ds_pipe_replicated = True
        assert norms.get_weight_norm([_param([3.0]), tied]) == pytest.approx(3)
        assert norms.get_weight_norm(_param([3.0, 4.0])) == pytest.approx(5)

    def test_zeros_of_gradients(self) -> None:
        params = [_param([0.0, 1.0, -0.0], torch.float16), _param(torch.zeros(2, 2)), _param([0.0], grad=False)]
        assert norms.get_grad_zeros([*params, _param(torch.empty(0))]) == 6
        assert norms.get_grad_zeros([]) == 0

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(0, 1e200), max_size=8))
    def test_global_norm_combines(self, parts: list[float]) -> None:
        assert norms.get_global_norm(parts) == pytest.approx(math.hypot(*parts))
        assert norms.get_global_norm([torch.tensor(part, dtype=torch.float64) for part in parts]) == pytest.approx(
            math.hypot(*parts)
        )
        assert norms.get_global_norm([*parts, -1.0]) == -1

    def test_graphs_are_not_built(self) -> None:
        with pytest.raises(NotBuiltError, match="use_graph"):
            norms.get_global_norm_of_tensors([torch.ones(1)], use_graph=True)
        with pytest.raises(NotBuiltError, match="use_graph"):
            norms.clip_tensors_by_global_norm([torch.ones(1)], use_graph=True)


class TestMask:
    def test_masked_ranges_do_not_count(self) -> None:
        params = [_param([1.0, 2.0, 3.0, 4.0]), _param([[5.0, 6.0], [7.0, 8.0]])]
        mask = [torch.tensor([[0, 1], [2, 3]]), [[1, 3], [2, 4]]]
        assert norms.get_flattened_grad_norm(params, grad_norm_mask=mask) == pytest.approx(math.sqrt(4 + 16 + 25))
        assert norms.get_flattened_grad_norm(params, math.inf, grad_norm_mask=[[], [[3, 4]]]) == 7
        assert norms.get_flattened_grad_norm(params, grad_norm_mask=[[[0, 4]], [[0, 4]]]) == 0

    def test_an_overflow_in_a_masked_range_is_anothers(self) -> None:
        assert norms.get_flattened_grad_norm([_param([math.inf, 3.0])], grad_norm_mask=[[[0, 1]]]) == pytest.approx(3)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_it_equals_a_boolean_mask(self, data: st.DataObject) -> None:
        numel = data.draw(st.integers(0, 30))
        place = st.integers(0, numel)
        ranges = [sorted(pair) for pair in data.draw(st.lists(st.tuples(place, place), max_size=5))]
        values = torch.arange(1.0, numel + 1)
        kept = torch.ones(numel, dtype=torch.bool)
        for start, end in ranges:
            kept[start:end] = False
        found = norms.get_flattened_grad_norm([_param(values)], grad_norm_mask=[ranges])
        assert found == pytest.approx(_exact([values[kept]], 2), rel=TOL)

    @pytest.mark.parametrize("pair", [[-1, 2], [2, 1], [0, 5], [1]])
    def test_a_range_outside_is_refused(self, pair: list[int]) -> None:
        with pytest.raises(EngineError, match=r"no range of a gradient of 4 elements\n.*grad_norm_mask\[1\]"):
            norms.get_flattened_grad_norm([_param([1.0]), _param([1.0] * 4)], grad_norm_mask=[[], [pair]])

    def test_a_mask_of_another_length_is_refused(self) -> None:
        with pytest.raises(EngineError, match="for 1 parameters, given are 2"):
            norms.get_flattened_grad_norm([_param([1.0]), _param([1.0])], grad_norm_mask=[[]])


class TestClipTensors:
    def test_it_scales_and_returns_the_norm(self) -> None:
        tensors = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float16), torch.empty(0)]
        assert float(norms.clip_tensors_by_global_norm(tensors, 1.0)) == pytest.approx(5)
        assert [float(t) for t in tensors[:2]] == pytest.approx([0.6, 0.8], rel=2**-10)

    def test_a_known_norm_is_used(self) -> None:
        tensors = [torch.tensor([3.0])]
        assert norms.clip_tensors_by_global_norm(tensors, 1.0, global_norm=10.0, eps=0.0) == 10.0
        assert float(tensors[0]) == pytest.approx(0.3)

    def test_eps(self) -> None:
        tensors = [torch.tensor([3.0])]
        norms.clip_tensors_by_global_norm(tensors, 1.0, eps=1.0)
        assert float(tensors[0]) == pytest.approx(0.75)

    def test_below_the_limit_nothing_changes(self) -> None:
        tensors = [torch.tensor([3.0])]
        norms.clip_tensors_by_global_norm(tensors, 4.0)
        assert tensors[0].item() == 3.0

    def test_a_leaf_that_requires_grad(self) -> None:
        param = _param([3.0])
        norms.clip_tensors_by_global_norm([param], 1.0)
        assert param.item() == pytest.approx(1.0)

    @pytest.mark.parametrize("known", [None, -1.0, math.inf, math.nan])
    def test_an_overflow_does_not_turn_them_around(self, known: float | None) -> None:
        # -1 in the quotient is a factor of -1.
        tensors = [torch.tensor([3.0, math.inf])]
        found = norms.clip_tensors_by_global_norm(tensors, 1.0, global_norm=known)
        assert tensors[0].tolist() == [3.0, math.inf]
        assert float(found) == pytest.approx(-1.0 if known is None else known, nan_ok=True)


class TestExperts:
    def test_parts_are_combined(self) -> None:
        experts = {"ep_size_2": [torch.tensor([4.0])], "ep_size_4": [torch.tensor([12.0]), torch.empty(0)]}
        assert norms.get_norm_with_moe_layers(3.0, None, experts) == pytest.approx(13)
        assert norms.get_norm_with_moe_layers(torch.tensor(3.0), None, experts, 1) == pytest.approx(19)
        assert norms.get_norm_with_moe_layers(3.0, None, experts, math.inf) == 12
        assert norms.get_norm_with_moe_layers(3.0, None, {}) == 3

    def test_one_overflow_is_everybodys(self) -> None:
        assert norms.get_norm_with_moe_layers(-1.0, None, {"e": [torch.ones(1)]}) == -1
        assert norms.get_norm_with_moe_layers(1.0, None, {"e": [torch.tensor([math.nan])]}) == -1


class TestSmallOnes:
    @pytest.mark.parametrize("name", ["model_parallel", "tensor_model_parallel"])
    def test_model_parallel_parameters(self, name: str) -> None:
        param = _param([1.0])
        assert norms.is_model_parallel_parameter(param) is False
        setattr(param, name, False)
        assert norms.is_model_parallel_parameter(param) is False
        setattr(param, name, True)
        assert norms.is_model_parallel_parameter(param) is True

    def test_dummy_optim(self) -> None:
        params = _params()
        optimizer = norms.DummyOptim(iter(params))
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]
        assert vars(optimizer).keys() == {"param_groups"}

    def test_an_mpu_that_knows_nothing(self) -> None:
        with pytest.raises(CommError, match="get_tensor_model_parallel_rank, get_slice_parallel_rank"):
            norms.get_weight_norm([_param([1.0])], mpu=object())

    def test_the_order_in_which_an_mpu_is_asked(self) -> None:
        class Mpu:
            get_model_parallel_rank = get_slice_parallel_rank = get_model_parallel_world_size = staticmethod(
                lambda: pytest.fail("asked for the old name")
            )
            get_tensor_model_parallel_rank = staticmethod(lambda: 0)
            get_slice_parallel_world_size = staticmethod(lambda: 1)
            # The group of one rank is None; it must not be taken for all ranks.
            get_model_parallel_group = staticmethod(lambda: None)

        assert norms.get_weight_norm([_param([3.0])], mpu=Mpu()) == pytest.approx(3)


class FakeMpu:
    """Both ranks are one model; each is its own data-parallel group."""

    def __init__(self, prefix: str = "model_parallel", data: bool = True) -> None:
        self.own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        setattr(self, f"get_{prefix}_rank", dist.get_rank)
        setattr(self, f"get_{prefix}_world_size", dist.get_world_size)
        setattr(self, f"get_{prefix}_group", lambda: dist.group.WORLD)
        if data:
            self.get_data_parallel_group = lambda: self.own

    def get_expert_parallel_group(self, name: str) -> Any:
        assert name == "ep_size_2"
        return dist.group.WORLD


def _split(rank: int) -> list[nn.Parameter]:
    """A parameter in two parts, of 3 and of 4, and one of 12 that both ranks hold."""
    part = _param([3.0] if rank == 0 else [4.0])
    part.model_parallel = True
    return [part, _param([12.0])]


def _without_mpu() -> tuple[float, float, float, list[float]]:
    """Gradients of norm 6 and 8 average to 7 before they are reduced, and are clipped by one factor."""
    rank = dist.get_rank()
    params = [_param([6.0] if rank == 0 else [8.0])]
    norm = norms.clip_grad_norm_(params, 3.5)
    inf = norms.clip_grad_norm_([_param([6.0 if rank == 0 else math.inf])], 1.0)
    nan = norms.clip_grad_norm_([_param([6.0 if rank == 0 else math.nan])], 1.0, math.inf)
    return float(norm), float(inf), float(nan), params[0].grad.tolist()


def _with_mpu(prefix: str) -> dict[str, Any]:
    rank, mpu = dist.get_rank(), FakeMpu(prefix)
    params = _split(rank)
    expert = [torch.tensor([0.0])]
    found = {
        "weights": norms.get_weight_norm(params, mpu=mpu),
        "weights of 1": norms.get_weight_norm(params, 1, mpu=mpu),
        "largest": norms.get_weight_norm(params, math.inf, mpu=mpu),
        "zeros": norms.get_grad_zeros([*params, _param([0.0, 0.0])], mpu=mpu),
        "mask": norms.get_flattened_grad_norm(params, mpu=mpu, grad_norm_mask=[[], [[0, 1]] if rank else []]),
        "tensors": float(norms.get_global_norm_of_tensors([params[0].grad], mpu=mpu)),
        "nothing here": float(norms.get_global_norm_of_tensors([params[0].grad] if rank else [], mpu=mpu)),
        "experts": float(norms.get_global_norm_of_tensors([params[0].grad], moe_ep_group=dist.group.WORLD)),
        "moe": norms.get_norm_with_moe_layers(3.0, FakeAlone(), {"ep_size_2": [params[0].grad]}),
        "no moe": norms.get_norm_with_moe_layers(5.0, mpu, {"ep_size_2": expert}),
        "clip": float(norms.clip_grad_norm_(params, 6.5, mpu=mpu)),
    }
    found["clipped"] = [param.grad.item() for param in params]
    return found


class FakeAlone(FakeMpu):
    """Each rank is a whole model; the experts are spread over both."""

    def __init__(self) -> None:
        self.get_model_parallel_rank = lambda: 0
        self.get_model_parallel_world_size = lambda: 1
        self.get_model_parallel_group = lambda: None


def _one_overflows() -> list[float]:
    mpu, found = FakeMpu(), []
    for bad in BAD:
        for p in P:
            tensors = [torch.tensor([bad if dist.get_rank() else 1.0])]
            found.append(float(norms.get_global_norm_of_tensors(tensors, p, mpu=mpu)))
            found.append(norms.get_weight_norm([nn.Parameter(tensors[0])], p, mpu=FakeMarked(mpu)))
    return found


class FakeMarked:
    """Counts what each rank holds: every rank says it is the first."""

    def __init__(self, mpu: FakeMpu) -> None:
        self.get_model_parallel_rank = lambda: 0
        self.get_model_parallel_world_size = mpu.get_model_parallel_world_size
        self.get_model_parallel_group = mpu.get_model_parallel_group


def _a_pure_model_parallel_job() -> float:
    return float(norms.clip_grad_norm_(_split(dist.get_rank()), 1.0, mpu=FakeMpu(data=False)))


def _experts_nobody_knows() -> str:
    try:
        norms.get_norm_with_moe_layers(1.0, None, {"ep_size_2": [torch.ones(1)]})
    except NotBuiltError as error:
        return str(error)
    return "no error"


PREFIXES = ["tensor_model_parallel", "slice_parallel", "model_parallel"]


def _each_prefix() -> list[dict[str, Any]]:
    return [_with_mpu(prefix) for prefix in PREFIXES]


def test_two_ranks() -> None:
    without, prefixes, overflows, pure, unknown = run_ranks(
        [_without_mpu, _each_prefix, _one_overflows, _a_pure_model_parallel_job, _experts_nobody_knows], 2
    )
    assert [result[0] for result in without] == pytest.approx([7.0, 7.0])
    assert [result[1] for result in without] == [math.inf, math.inf]
    assert all(math.isnan(result[2]) for result in without)
    assert [result[3] for result in without] == [pytest.approx([3.0]), pytest.approx([4.0])]
    for rank in range(2):
        for found in prefixes[rank]:
            clipped = found.pop("clipped")
            assert clipped == pytest.approx([[1.5, 2.0][rank], 6.0])
            assert found == pytest.approx(
                {
                    **dict.fromkeys(["weights", "mask", "clip"], 13.0),
                    "weights of 1": 19.0,
                    "largest": 12.0,
                    "zeros": 2,
                    "tensors": 5.0,
                    "nothing here": 4.0,
                    "experts": 5.0,
                    "moe": math.sqrt(9 + 25),
                    "no moe": 5.0,
                }
            )
    assert set(overflows[0]) == set(overflows[1]) == {-1.0}
    assert pure == [pytest.approx(13.0)] * 2
    for text in unknown:
        assert "expert group 'ep_size_2' is not built yet" in text
        assert "get_expert_parallel_group(name)" in text
