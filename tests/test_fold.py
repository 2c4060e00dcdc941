"""A folded projection computes what adapter and projection computed, in place and by thin products."""

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from peft_eas import InputAdapter, PropagationAdapter
from peft_eas.folding.fold import check_projection, fold, fold_is_finite, low_rank_map, unfold

D, R = 32, 8
ADAPTERS = [PropagationAdapter, InputAdapter]
# What the projections of the families look like: name → how to make the layer that reads z.
LAYOUTS = {
    "separate, with bias": lambda: nn.Linear(D, D),
    "separate, without bias": lambda: nn.Linear(D, D, bias=False),
    "grouped keys, without bias": lambda: nn.Linear(D, D // 2, bias=False),
    "fused qkv, with bias": lambda: nn.Linear(D, 3 * D),
    "fused qkv, without bias": lambda: nn.Linear(D, 2 * D, bias=False),
    "fused gate_up, without bias": lambda: nn.Linear(D, 6 * D, bias=False),
    "fused qkv, Conv1D": lambda: Conv1D(3 * D, D),
    "FFN, Conv1D": lambda: Conv1D(4 * D, D),
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make_adapter(adapter_class, device, groups=2, seed=0, d=D, r=R, **options):
    """An adapter with every weight drawn, which adds about as much as it passes on; in evaluation mode."""
    torch.manual_seed(seed)
    adapter = adapter_class(d, r, groups=groups, dropout=0.3, **{"router_temperature": 0.5, **options})
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter.to(device).eval()


def make_projection(layout, device, dtype=torch.float32):
    """The layer of `layout` with random weight and bias."""
    torch.manual_seed(2)
    projection = LAYOUTS[layout]()
    for parameter in projection.parameters():
        nn.init.normal_(parameter, std=0.5)
    return projection.to(device, dtype)


def relative(actual, expected):
    """Largest difference over the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("adapter_class", ADAPTERS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folded_is_unfolded(layout, dtype, groups, adapter_class, device):
    adapter = make_adapter(adapter_class, device, groups, scale=1.5)
    projection = make_projection(layout, device, dtype)
    z, context = torch.randn(2, 7, D, device=device, dtype=dtype), torch.randn(D, device=device)
    expected = projection(adapter(z, context[None]))
    before = projection(z)
    fold(projection, low_rank_map(adapter, context))
    assert projection.weight.dtype == projection.bias.dtype == dtype
    assert relative(projection(z), expected) <= TOLERANCES[dtype]
    assert relative(before, expected) > 0.1  # the adapter matters


@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_folding_any_number_of_paths(adapter_class, paths, device):
    adapter, projection = (
        make_adapter(adapter_class, device, paths=paths),
        make_projection("separate, with bias", device),
    )
    z = torch.randn(2, 7, D, device=device)
    context = torch.randn(D, device=device) if adapter.needs_context else None
    expected = projection(adapter(z, None if context is None else context[None]))
    fold(projection, low_rank_map(adapter, context))
    assert relative(projection(z), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_the_rounded_exact_ones(dtype, device):
    """Accumulated in float32 and rounded once: within one unit in the last place of the exact result."""
    adapter = make_adapter(PropagationAdapter, device)
    projection = make_projection("fused qkv, with bias", device, dtype)
    update = low_rank_map(adapter, torch.randn(D, device=device))
    weight, bias = projection.weight.double(), projection.bias.double()
    left, right, shift = update.left.double(), update.right.double(), update.shift.double()
    fold(projection, update)
    for actual, exact in (
        (projection.weight, weight + weight @ left @ right),
        (projection.bias, bias + weight @ shift),
    ):
        assert ((actual.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * 0.5 + 1e-6).all()


def test_fold_matches_the_released_matrix_and_bias(device):
    reference = load_file(Path(__file__).with_name("pia_reference.safetensors"), device=device)
    adapter = PropagationAdapter(48, 16).to(device).eval()
    weights = {k.removeprefix("pia."): v for k, v in reference.items() if k.startswith("pia.")}
    adapter.load_state_dict(weights, strict=False)
    z = reference["fold.input"]
    identity = nn.Linear(48, 48, bias=False).to(device)
    nn.init.eye_(identity.weight)
    fold(identity, low_rank_map(adapter, z.mean((0, 1))))
    torch.testing.assert_close(identity.weight, reference["fold.matrix"], rtol=0, atol=1e-6, check_stride=False)
    torch.testing.assert_close(identity.bias, reference["fold.bias"], rtol=0, atol=1e-6)
    torch.testing.assert_close(identity(z), reference["fold.output"], rtol=0, atol=2e-6)


def by_hand(adapter_class, device):
    """d = 2, r = 1: C = (1 0), c = 2, Ū = (1 −1)ᵀ, β = (1 0), s = 2; for PIA also A = (0 3), a = 1."""
    adapter = adapter_class(2, 1, groups=1, scale=2.0)
    state = {
        "token_down.weight": torch.tensor([[1.0, 0.0]]),
        "token_down.bias": torch.tensor([2.0]),
        "context_down.weight": torch.tensor([[0.0, 3.0]]),
        "context_down.bias": torch.tensor([1.0]),
        "router.weight": torch.zeros(2, 2),
        "router.bias": torch.zeros(2),  # both paths count ½
        "up.0.weight": torch.tensor([[2.0], [0.0]]),
        "up.0.bias": torch.tensor([2.0, 0.0]),
        "up.1.weight": torch.tensor([[0.0], [-2.0]]),
        "up.1.bias": torch.tensor([0.0, 0.0]),
    }
    own = adapter.state_dict()
    adapter.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return adapter.to(device).eval()


def test_pia_fold_by_hand(device):
    """The bias takes the ORIGINAL weight: with the folded one it would be (31, 30) instead of (15, 14)."""
    projection = nn.Linear(2, 2).to(device)
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, -2.0]]))
        projection.bias.copy_(torch.tensor([1.0, 2.0]))
    fold(projection, low_rank_map(by_hand(PropagationAdapter, device), torch.tensor([5.0, 1.0], device=device)))
    # A m + a + c = 3 + 1 + 2 = 6; shift = 2 (½ (1 −1) 6 + (1 0)) = (8 −6); W shift = (14, 12).
    # W Ū = (2, 2); W' = W + 2/2 (2 2)ᵀ (1 0).
    assert projection.weight.tolist() == [[3.0, -1.0], [2.0, -2.0]]
    assert projection.bias.tolist() == [15.0, 14.0]


def test_input_adapter_fold_by_hand(device):
    projection = nn.Linear(2, 2, bias=False).to(device)
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, -2.0]]))
    fold(projection, low_rank_map(by_hand(InputAdapter, device), torch.tensor([5.0, 1.0], device=device)))
    # shift = 2 ((1 −1) 2 + (1 0)) = (6 −4); W shift = (10, 8); W' = W + 2 (2 2)ᵀ (1 0).
    assert projection.weight.tolist() == [[5.0, -1.0], [4.0, -2.0]]
    assert projection.bias.tolist() == [10.0, 8.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fold_is_in_place(layout, dtype, device):
    projection = make_projection(layout, device, dtype).requires_grad_(False)
    weight, place = projection.weight, projection.weight.data_ptr()
    fold(projection, low_rank_map(make_adapter(PropagationAdapter, device), torch.randn(D, device=device)))
    assert projection.weight is weight
    assert weight.data_ptr() == place
    assert projection.bias.device == weight.device
    assert not weight.requires_grad
    assert not projection.bias.requires_grad
    assert {name for name, _ in projection.named_parameters()} == {"weight", "bias"}


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation allocates."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("adapter_class", ADAPTERS)
@pytest.mark.parametrize("conv", [False, True])
def test_no_d_by_d_matrix_is_made(adapter_class, conv, device):
    d, d_out = 512, 256
    adapter = make_adapter(adapter_class, device, d=d)
    projection = (Conv1D(d_out, d) if conv else nn.Linear(d, d_out)).to(device)
    context = torch.randn(d, device=device)
    with LargestTensor(projection.weight) as largest:
        record = fold(projection, low_rank_map(adapter, context))
        unfold(projection, record)
    assert largest.elements <= d * (R + 1)


def test_a_large_half_precision_weight_is_not_copied_whole(device):
    d = 4096
    adapter = make_adapter(InputAdapter, device, d=d)
    projection = nn.Linear(d, d, bias=False, device=device, dtype=torch.bfloat16)
    context = torch.randn(d, device=device)
    with LargestTensor(projection.weight) as largest:
        update = low_rank_map(adapter, context)
        assert fold_is_finite(projection, update)
        record = fold(projection, update)
        unfold(projection, record)
    assert largest.elements <= d * d / 2


@pytest.mark.parametrize("adapter_class", ADAPTERS)
@pytest.mark.parametrize(("layout", "dtype"), list(product(LAYOUTS, [torch.float32, torch.bfloat16])), ids=str)
def test_unfold_restores_to_rounding(layout, dtype, adapter_class, device):
    projection = make_projection(layout, device, dtype)
    before = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    update = low_rank_map(make_adapter(adapter_class, device), torch.randn(D, device=device))
    record = fold(projection, update)
    assert relative(projection.weight, before["weight"]) > 0.1
    unfold(projection, record)
    after = projection.state_dict()
    assert set(after) == set(before)
    assert (projection.bias is None) == ("bias" not in before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_an_untrained_adapter_folds_to_the_same_weights(device):
    projection = make_projection("separate, with bias", device)
    before = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    fold(projection, low_rank_map(PropagationAdapter(D, R).to(device), torch.randn(D, device=device)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in projection.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_nothing(dtype, device):
    adapter, context = make_adapter(PropagationAdapter, device), torch.randn(D, device=device)
    weight, results = torch.randn(2 * D, D, device=device, dtype=dtype), []
    for enabled in (False, True):
        projection = nn.Linear(D, 2 * D, bias=False, device=device, dtype=dtype)
        projection.weight.data = weight.clone()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
            update = low_rank_map(adapter, context)
            assert fold_is_finite(projection, update)
            record = fold(projection, update)
        results.append((projection.weight.clone(), projection.bias))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
            unfold(projection, record)
        results[-1] += (projection.weight,)
    assert all(map(torch.equal, *results))


def test_adapters_in_half_precision_fold_in_float32(device):
    adapter = make_adapter(PropagationAdapter, device).bfloat16()
    projection = make_projection("separate, without bias", device)
    z, context = torch.randn(2, 7, D, device=device), torch.randn(D, device=device)
    expected = projection(adapter.float()(z, context[None]))
    adapter.bfloat16()
    fold(projection, low_rank_map(adapter, context))
    assert relative(projection(z), expected) <= 1e-5


@pytest.mark.parametrize("bad", ["context_down.bias", "token_down.weight", "up.1.bias", "up.0.weight", "router.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_is_found_before_anything_changes(bad, value, device):
    adapter = make_adapter(PropagationAdapter, device)
    projection = make_projection("separate, with bias", device)
    before = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    context = torch.randn(D, device=device)
    assert fold_is_finite(projection, low_rank_map(adapter, context))
    with torch.no_grad():
        adapter.get_parameter(bad).view(-1)[0] = value
    assert not fold_is_finite(projection, low_rank_map(adapter, context))
    assert all(torch.equal(tensor, before[name]) for name, tensor in projection.state_dict().items())


def test_an_overflow_of_float16_is_found(device):
    adapter = make_adapter(InputAdapter, device, scale=1e5)
    projection = make_projection("separate, with bias", device, torch.float16)
    update = low_rank_map(adapter, torch.randn(D, device=device))
    assert not fold_is_finite(projection, update)
    assert fold_is_finite(projection.float(), update)


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.Conv2d(1, 1, 1), nn.Identity()])
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=rf"into a.b, a {type(module).__name__}: only torch.nn.Linear and .*Conv1D"):
        check_projection(module, "a.b")


def test_quantised_weights_are_refused():
    projection = nn.Linear(4, 4)
    projection.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"into a.b: its weight is quantised .*int8.*float32, float16 or bfloat16"):
        check_projection(projection, "a.b")


def test_projections_that_fit_are_accepted():
    for layout, dtype in product(LAYOUTS, TOLERANCES):
        check_projection(make_projection(layout, "cpu", dtype), layout)
