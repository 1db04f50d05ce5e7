"""The historical helpers of half precision: casting networks, and masters by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_core.errors import EngineError
from ds_fp16 import fp16_utils, loss_scaler


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.LayerNorm(6), nn.Linear(6, 2)
    )


def _dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in module.state_dict().items()}


class TestNetworks:
    def test_everything_is_half_but_affine_batch_norm(self) -> None:
        net = _net()
        half = fp16_utils.network_to_half(net)
        assert half[1] is net
        kept = {name for name, dtype in _dtypes(half).items() if dtype == torch.float32}
        assert kept == {"1.1.weight", "1.1.bias", "1.1.running_mean", "1.1.running_var"}
        assert {dtype for name, dtype in _dtypes(half).items() if name not in kept} == {torch.float16, torch.int64}

    def test_it_takes_fp32_input_and_trains(self) -> None:
        half = fp16_utils.network_to_half(_net())
        out = half(torch.randn(8, 4))
        assert out.dtype == torch.float16
        out.float().pow(2).mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())

    def test_batch_norm_keeps_its_bits(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(3))
        net[0].running_mean.fill_(1 / 3)
        weight = net[0].weight.detach().fill_(0.1).clone()
        fp16_utils.network_to_half(net)
        assert torch.equal(net[0].weight.detach(), weight)
        assert torch.equal(net[0].running_mean, torch.full((3,), 1 / 3))

    def test_integer_input_is_left_alone(self) -> None:
        half = fp16_utils.network_to_half(nn.Embedding(5, 3))
        assert half(torch.tensor([1, 4])).dtype == torch.float16

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_convert_network(self, dtype: torch.dtype) -> None:
        net = _net()
        params = list(net.parameters())
        assert fp16_utils.convert_network(net, dtype) is net
        assert [id(p) for p in net.parameters()] == [id(p) for p in params]
        assert net[0].weight.dtype == net[3].bias.dtype == net[2].running_mean.dtype == dtype
        assert net[1].weight.dtype == torch.float32
        assert net[2].num_batches_tracked.dtype == torch.int64

    def test_a_recurrent_network_still_runs(self) -> None:
        lstm = fp16_utils.convert_network(nn.LSTM(3, 4), torch.bfloat16)
        assert lstm(torch.ones(2, 1, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16

    def test_convert_module_is_not_recursive_and_takes_gradients_along(self) -> None:
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.own = nn.Parameter(torch.ones(2))
                self.register_buffer("noise", torch.ones(2))
                self.register_buffer("count", torch.ones(2, dtype=torch.int32))
                self.inner = nn.Linear(2, 2)

        outer = Outer()
        outer.own.grad = torch.full((2,), 3.0)
        fp16_utils.convert_module(outer, torch.float16)
        assert outer.own.dtype == outer.noise.dtype == torch.float16
        assert outer.own.grad.dtype == torch.float16
        assert outer.own.grad.tolist() == [3.0, 3.0]
        assert outer.count.dtype == torch.int32
        assert outer.inner.weight.dtype == torch.float32

    def test_bn_convert_float_after_half(self) -> None:
        net = _net().half()
        assert fp16_utils.BN_convert_float(net) is net
        assert net[1].weight.dtype == net[1].running_var.dtype == torch.float32
        assert net[0].weight.dtype == net[2].running_var.dtype == torch.float16

    def test_tofp16(self) -> None:
        cast = fp16_utils.tofp16()
        assert cast(torch.ones(2)).dtype == torch.float16
        assert cast(torch.ones(2, dtype=torch.int64)).dtype == torch.int64
        assert not list(cast.parameters())


def _half_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half()
    model[0].bias.requires_grad_(False)
    return model


def _grads(params: list[nn.Parameter]) -> None:
    for index, param in enumerate(params):
        param.grad = torch.randn_like(param) + index


class TestMasters:
    def test_masters_are_fp32_copies_of_what_trains(self) -> None:
        model = _half_model()
        params, masters = fp16_utils.prep_param_lists(model)
        assert [id(p) for p in params] == [id(p) for p in model.parameters() if p.requires_grad]
        assert len(params) == 3
        for param, master in zip(params, masters, strict=True):
            assert master.dtype == torch.float32
            assert master.requires_grad
            assert master.is_leaf
            assert master.grad is None
            assert torch.equal(master, param.float())

    @pytest.mark.parametrize("flat", [False, True])
    def test_masters_of_fp32_parameters_do_not_share_their_storage(self, flat: bool) -> None:
        model = nn.Linear(3, 2, bias=False)
        before = model.weight.detach().clone()
        _, masters = fp16_utils.prep_param_lists(model, flat_master=flat)
        masters[0].detach().add_(1)
        assert torch.equal(model.weight.detach(), before)

    def test_a_flat_master_holds_all_in_order(self) -> None:
        params, (master,) = fp16_utils.prep_param_lists(_half_model(), flat_master=True)
        assert torch.equal(master, torch.cat([p.detach().float().reshape(-1) for p in params]))
        assert master.requires_grad
        assert master.grad is not None
        assert torch.equal(master.grad, torch.zeros_like(master))

    @pytest.mark.parametrize("flat", [False, True])
    def test_gradients_go_up_and_values_come_down(self, flat: bool) -> None:
        params, masters = fp16_utils.prep_param_lists(_half_model(), flat_master=flat)
        _grads(params)
        fp16_utils.model_grads_to_master_grads(params, masters, flat_master=flat)
        up = torch.cat([p.grad.float().reshape(-1) for p in params])
        assert torch.equal(torch.cat([m.grad.reshape(-1) for m in masters]), up)
        assert all(m.grad.dtype == torch.float32 for m in masters)
        torch.optim.SGD(masters, lr=0.5).step()
        fp16_utils.master_params_to_model_params(params, masters, flat_master=flat)
        down = torch.cat([m.detach().reshape(-1) for m in masters])
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in params]), down.half())

    def test_gradients_are_copied_into_those_that_are_there(self) -> None:
        params, masters = fp16_utils.prep_param_lists(_half_model())
        _grads(params)
        fp16_utils.model_grads_to_master_grads(params, masters)
        first = [m.grad for m in masters]
        _grads(params)
        fp16_utils.model_grads_to_master_grads(params, masters)
        assert all(m.grad is grad for m, grad in zip(masters, first, strict=True))
        assert torch.equal(masters[0].grad, params[0].grad.float())

    def test_no_gradient_takes_the_masters_away(self) -> None:
        params, masters = fp16_utils.prep_param_lists(_half_model())
        _grads(params)
        fp16_utils.model_grads_to_master_grads(params, masters)
        params[1].grad = None
        fp16_utils.model_grads_to_master_grads(params, masters)
        assert masters[1].grad is None
        assert masters[0].grad is not None

    def test_a_flat_master_needs_every_gradient(self) -> None:
        params, masters = fp16_utils.prep_param_lists(_half_model(), flat_master=True)
        _grads(params)
        params[1].grad = None
        with pytest.raises(EngineError, match=r"this one has none\n  where: .*model_params\[1\] of shape \(2, 4\)"):
            fp16_utils.model_grads_to_master_grads(params, masters, flat_master=True)
        assert masters[0].grad.count_nonzero() == 0  # nothing was half done

    def test_a_flat_master_refuses_mixed_dtypes(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2))
        with pytest.raises(
            EngineError, match=r"one dtype.*float16 on cpu \('0\.bias'\), torch\.float32 on cpu"
        ) as caught:
            fp16_utils.prep_param_lists(model, flat_master=True)
        assert "flat_master=False" in str(caught.value.fix)
        assert len(fp16_utils.prep_param_lists(model)[1]) == 4

    @pytest.mark.parametrize("flat", [False, True])
    def test_complex_parameters_are_refused(self, flat: bool) -> None:
        model = nn.Module()
        model.rotation = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(EngineError, match=r"complex64(?s:.*)parameter 'rotation'"):
            fp16_utils.prep_param_lists(model, flat_master=flat)

    @pytest.mark.parametrize("flat", [False, True])
    def test_nothing_trains(self, flat: bool) -> None:
        params, masters = fp16_utils.prep_param_lists(nn.Linear(2, 2).requires_grad_(False), flat_master=flat)
        assert params == []
        assert sum(m.numel() for m in masters) == 0
        fp16_utils.model_grads_to_master_grads(params, masters, flat_master=flat)
        fp16_utils.master_params_to_model_params(params, masters, flat_master=flat)

    @pytest.mark.parametrize("flat", [False, True])
    def test_zero_size_and_transposed_parameters(self, flat: bool) -> None:
        model = nn.Module()
        model.none = nn.Parameter(torch.empty(0, 3))
        model.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        params, masters = fp16_utils.prep_param_lists(model, flat_master=flat)
        _grads(params)
        fp16_utils.model_grads_to_master_grads(params, masters, flat_master=flat)
        assert torch.equal(torch.cat([m.grad.reshape(-1) for m in masters]), params[1].grad.reshape(-1))
        for master in masters:
            master.detach().mul_(2)
        fp16_utils.master_params_to_model_params(params, masters, flat_master=flat)
        assert torch.equal(model.turned.detach(), 2 * torch.arange(6.0).view(2, 3).t())

    @pytest.mark.parametrize("call", [fp16_utils.model_grads_to_master_grads, fp16_utils.master_params_to_model_params])
    def test_lists_that_do_not_belong_together(self, call: Any) -> None:
        params, masters = fp16_utils.prep_param_lists(_half_model())
        flat_params, flat_masters = fp16_utils.prep_param_lists(_half_model(), flat_master=True)
        with pytest.raises(EngineError, match="3 model parameters and 2 masters"):
            call(params, masters[:2])
        with pytest.raises(EngineError, match="do not have the same shapes"):
            call(flat_params, flat_masters)
        with pytest.raises(EngineError, match=r"one flat master of 22 elements, given are \[\(4, 3\)"):
            call(params, masters, flat_master=True)


def test_training_by_hand_follows_fp32() -> None:
    """The loop of the module's docstring, against the same network in fp32."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    half = fp16_utils.network_to_half(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    half[1].load_state_dict(reference.state_dict())
    params, masters = fp16_utils.prep_param_lists(half)
    optimizer = torch.optim.SGD(masters, lr=0.1)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    x, y, scale = torch.randn(16, 4), torch.randn(16, 1), 1024.0
    for _ in range(10):
        half.zero_grad()
        ((half(x).float() - y).pow(2).mean() * scale).backward()
        fp16_utils.model_grads_to_master_grads(params, masters)
        for master in masters:
            master.grad.div_(scale)
        fp16_utils.clip_grad_norm(masters, 1.0)
        optimizer.step()
        fp16_utils.master_params_to_model_params(params, masters)
        plain.zero_grad()
        loss = (reference(x) - y).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
    # Clipped gradients of norm 1 and rate 0.1 move a weight by 1 in 10 steps, each right to some 4 roundings of fp16.
    for master, expected in zip(masters, reference.parameters(), strict=True):
        assert (master - expected).abs().max() < 2**-9


def test_to_python_float_is_the_one_of_loss_scaler() -> None:
    assert fp16_utils.to_python_float is loss_scaler.to_python_float
    assert fp16_utils.to_python_float(torch.tensor(2.0)) == 2.0
