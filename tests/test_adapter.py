"""The adapters compute what section 3.3 of arXiv 2403.15226 says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_eas import InputAdapter, PropagationAdapter

REFERENCE = Path(__file__).with_name("pia_reference.safetensors")
ADAPTERS = [PropagationAdapter, InputAdapter]


@pytest.fixture(scope="module")
def reference(device) -> dict[str, torch.Tensor]:
    """Inputs, weights and outputs of the released module."""
    return load_file(REFERENCE, device=device)


def load_reference(adapter, reference, prefix):
    """`adapter` with the reference's weights, in evaluation mode; its statistics are no part of the reference."""
    names = [name for name in reference if name.startswith(prefix) and name != f"{prefix}output"]
    weights = {name.removeprefix(prefix): reference[name] for name in names}
    missing, unexpected = adapter.to(reference["input"].device).load_state_dict(weights, strict=False)
    assert set(missing) == {"running_context", "num_contexts"}
    assert not unexpected
    return adapter.eval()


def randomised(adapter_class, d=8, r=4, groups=2, seed=0, device="cpu", **options):
    """An adapter that is far from the identity, in evaluation mode."""
    torch.manual_seed(seed)
    adapter = adapter_class(d, r, groups=groups, **options)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return adapter.to(device).eval()


def test_pia_matches_the_released_module(reference):
    adapter = load_reference(PropagationAdapter(48, 16), reference, "pia.")
    z = reference["input"]
    torch.testing.assert_close(adapter(z, z.mean(1)), reference["output"], rtol=0, atol=1e-6)


def test_input_adapter_matches_the_released_module(reference):
    adapter = load_reference(InputAdapter(48, 16), reference, "attention_adapter.")
    z = reference["input"]
    torch.testing.assert_close(adapter(z, z.mean(1)), reference["attention_adapter.output"], rtol=0, atol=1e-6)


def test_router_matches_the_released_module(reference):
    adapter = load_reference(PropagationAdapter(48, 16), reference, "pia.")
    torch.testing.assert_close(
        adapter.route(reference["input"].mean(1)), reference["router_weights"], rtol=0, atol=1e-6
    )


def test_pia_by_hand(device):
    adapter = PropagationAdapter(2, 2, groups=1, scale=3.0, router_temperature=2.0).to(device).eval()
    adapter.load_state_dict(
        {
            "context_down.weight": torch.tensor([[2.0, 0.0], [0.0, 4.0]]),
            "context_down.bias": torch.tensor([1.0, -1.0]),
            "token_down.weight": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
            "token_down.bias": torch.tensor([0.0, 2.0]),
            "up.0.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
            "up.0.bias": torch.tensor([0.0, 1.0]),
            "up.1.weight": torch.tensor([[0.0, 4.0], [0.0, 0.0]]),
            "up.1.bias": torch.tensor([2.0, 0.0]),
            # Logits 2 ln 3 and 0, over τ = 2: weights 3/4 and 1/4.
            "router.weight": torch.zeros(2, 2),
            "router.bias": torch.tensor([2 * 1.0986122886681098, 0.0]),
        },
        strict=False,
    )
    z = torch.tensor([[[1.0, 2.0]]], device=device)
    context = torch.tensor([[3.0, 1.0]], device=device)
    # A m + a = (7, 3); C z + c = (2, 3); u = (4.5, 3); Ū = ((.75, 1), (0, 1.5)); β = (.5, .75).
    # Ū u + β = (3.375 + 3 + .5, 4.5 + .75) = (6.875, 5.25); z + 3 · that.
    expected = torch.tensor([[[1 + 3 * 6.875, 2 + 3 * 5.25]]], device=device)
    torch.testing.assert_close(adapter(z, context), expected)


def test_input_adapter_by_hand(device):
    adapter = InputAdapter(2, 2, groups=1, scale=0.5, router_temperature=1.0).to(device).eval()
    adapter.load_state_dict(
        {
            "token_down.weight": torch.tensor([[1.0, 1.0], [0.0, -1.0]]),
            "token_down.bias": torch.tensor([1.0, 0.0]),
            "up.0.weight": torch.tensor([[2.0, 0.0], [0.0, 2.0]]),
            "up.0.bias": torch.tensor([1.0, 1.0]),
            "up.1.weight": torch.tensor([[0.0, 4.0], [4.0, 0.0]]),
            "up.1.bias": torch.tensor([0.0, 0.0]),
            # The context alone drives the router: logits (m_0, 0) = (ln 3, 0), weights 3/4 and 1/4.
            "router.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
            "router.bias": torch.zeros(2),
        },
        strict=False,
    )
    z = torch.tensor([[[1.0, 2.0]]], device=device)
    # C z + c = (4, −2); no halving; Ū = ((1.5, 1), (1, 1.5)); β = (.75, .75): (4.75, 1.75); z + that / 2.
    context = torch.tensor([[1.0986122886681098, 7.0]], device=device)
    torch.testing.assert_close(adapter(z, context), torch.tensor([[[3.375, 2.875]]], device=device))


@pytest.mark.parametrize("adapter_class", ADAPTERS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_group_reads_its_own_slice_of_the_bottleneck(adapter_class, groups, device):
    adapter = randomised(adapter_class, groups=groups, device=device)
    z, context = torch.randn(1, 3, 8, device=device), torch.randn(1, 8, device=device)
    before = adapter(z, context)
    with torch.no_grad():
        adapter.token_down.bias[-4 // groups :] += 1.0  # the last group's slice
    changed = ((adapter(z, context) - before).abs() > 1e-6).all((0, 1)).tolist()
    assert changed == [False] * (8 - 8 // groups) + [True] * (8 // groups)


@pytest.mark.parametrize("adapter_class", ADAPTERS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_formula_token_by_token(adapter_class, groups, device):
    adapter = randomised(adapter_class, groups=groups, scale=1.7, router_temperature=0.6, device=device)
    z, contexts = torch.randn(3, 5, 8, device=device), torch.randn(3, 8, device=device)
    ups = [(torch.block_diag(*up.weight.chunk(groups)), up.bias) for up in adapter.up]
    expected = torch.empty_like(z)
    for b, m in enumerate(contexts):
        g = torch.softmax((adapter.router.weight @ m + adapter.router.bias) / 0.6, dim=0)
        for t in range(5):
            u = adapter.token_down(z[b, t])
            if adapter_class is PropagationAdapter:
                u = 0.5 * (u + adapter.context_down(m))
            expected[b, t] = z[b, t] + 1.7 * sum(g[e] * (weight @ u + bias) for e, (weight, bias) in enumerate(ups))
    torch.testing.assert_close(adapter(z, contexts), expected)


@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_any_number_of_paths(adapter_class, paths, device):
    adapter = randomised(adapter_class, paths=paths, router_temperature=0.6, device=device)
    z, contexts = torch.randn(2, 5, 8, device=device), torch.randn(2, 8, device=device)
    gates = torch.ones(2, 1, device=device) if paths == 1 else torch.softmax(adapter.router(contexts) / 0.6, dim=-1)
    u = adapter.token_down(z)
    if adapter_class is PropagationAdapter:
        u = 0.5 * (u + adapter.context_down(contexts)[:, None])
    outputs = torch.stack([u @ torch.block_diag(*up.weight.chunk(2)).T + up.bias for up in adapter.up])
    expected = z + torch.einsum("be,ebtd->btd", gates, outputs)
    torch.testing.assert_close(adapter(z, contexts), expected)
    left, shift = adapter.affine_map(contexts)
    mapped = z + torch.einsum("btr,bdr->btd", z @ adapter.token_down.weight.T, left) + shift[:, None]
    torch.testing.assert_close(mapped, expected)


def test_one_path_by_hand(device):
    adapter = InputAdapter(2, 2, groups=1, scale=0.5, paths=1).to(device).eval()
    assert sorted(adapter.state_dict()) == ["token_down.bias", "token_down.weight", "up.0.bias", "up.0.weight"]
    adapter.load_state_dict(
        {
            "token_down.weight": torch.tensor([[1.0, 1.0], [0.0, -1.0]]),
            "token_down.bias": torch.tensor([1.0, 0.0]),
            "up.0.weight": torch.tensor([[2.0, 0.0], [1.0, 2.0]]),
            "up.0.bias": torch.tensor([1.0, 1.0]),
        }
    )
    # C z + c = (4, −2); U (4, −2) + β = (9, 1); z + that / 2. There is no context to ask for.
    z = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]], device=device)
    expected = torch.tensor([[[5.5, 2.5]], [[5.5, 2.5]]], device=device)
    torch.testing.assert_close(adapter(z), expected)


def test_pia_with_one_path_keeps_its_context(device):
    adapter = randomised(PropagationAdapter, paths=1, device=device)
    names = set(adapter.state_dict())
    assert not any(name.startswith(("router", "up.1")) for name in names)
    assert {"context_down.weight", "running_context", "num_contexts"} < names
    z, contexts = torch.randn(1, 3, 8, device=device), torch.randn(2, 8, device=device)
    assert (adapter(z, contexts[:1]) - adapter(z, contexts[1:])).abs().max() > 1e-3


@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_no_path(adapter_class):
    with pytest.raises(ValueError, match="at least 1 up-projection, but paths=0 was received"):
        adapter_class(8, 4, paths=0)


@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_one_context_serves_all_sequences(adapter_class, device):
    adapter = randomised(adapter_class, device=device)
    z, context = torch.randn(3, 5, 8, device=device), torch.randn(1, 8, device=device)
    torch.testing.assert_close(adapter(z, context), adapter(z, context.expand(3, 8)))


@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_a_new_adapter_is_the_identity(adapter_class, device):
    torch.manual_seed(0)
    adapter = adapter_class(8, 4, dropout=0.5).to(device).train()
    z, context = torch.randn(3, 5, 8, device=device), torch.randn(3, 8, device=device)
    assert torch.equal(adapter(z, context), z)
    bound = (6 / (8 + 4)) ** 0.5
    downs = [adapter.token_down] + ([adapter.context_down] if adapter_class is PropagationAdapter else [])
    for down in downs:
        assert 0.5 * bound < down.weight.abs().max() <= bound
        assert down.bias.count_nonzero() == 0


@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_without_init_weights_it_is_not_the_identity(adapter_class, device):
    torch.manual_seed(0)
    adapter = adapter_class(8, 4, init_weights=False).to(device).eval()
    z, context = torch.randn(3, 5, 8, device=device), torch.randn(3, 8, device=device)
    assert (adapter(z, context) - z).abs().amin(-1).max() > 1e-3
    assert not torch.equal(adapter.up[0].weight, adapter.up[1].weight)


@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_a_new_adapter_learns(adapter_class, device):
    """From the identity, the first gradient reaches the up-projections and the second everything else."""
    torch.manual_seed(0)
    adapter = adapter_class(8, 4, router_temperature=1.0).to(device)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    z, context = torch.randn(3, 5, 8, device=device), torch.randn(3, 8, device=device)
    target = torch.randn_like(z)
    for _ in range(3):
        optimizer.zero_grad()
        (adapter(z, context) - target).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.count_nonzero() > 0 for parameter in adapter.parameters())


def test_dropout_is_on_the_bottleneck_and_only_in_training(device):
    """r = 2 in two groups and dropout ½: each half of the output is either untouched or changed twice as much."""
    adapter = randomised(InputAdapter, d=4, r=2, groups=2, dropout=0.5, device=device)
    with torch.no_grad():
        for up in adapter.up:
            up.bias.zero_()
    z, context = torch.randn(1, 1, 4, device=device), torch.zeros(1, 4, device=device)
    full = adapter(z, context) - z
    assert torch.equal(adapter(z, context) - z, full)
    torch.manual_seed(0)
    adapter.train()
    seen = set()
    for _ in range(40):
        ratio = ((adapter(z, context) - z) / full).flatten()
        torch.testing.assert_close(ratio[[0, 2]], ratio[[1, 3]], rtol=1e-3, atol=1e-3)
        seen.add(tuple(round(x, 2) for x in ratio[[0, 2]].tolist()))
    assert seen == {(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (2.0, 2.0)}


@pytest.mark.parametrize("adapter_class", ADAPTERS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(adapter_class, adapter_dtype, device):
    adapter = randomised(adapter_class, device=device)
    z, context = torch.randn(2, 3, 8, device=device), torch.randn(2, 8, device=device)
    expected = adapter(z, context)
    output = adapter.to(adapter_dtype)(z.bfloat16(), context)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("adapter_class", ADAPTERS)
def test_running_context_is_the_mean_of_the_batches(adapter_class, device):
    adapter = adapter_class(2, 2).to(device)
    adapter.record(torch.tensor([[1.0, 0.0], [3.0, 0.0]], device=device))
    assert adapter.running_context.tolist() == [2.0, 0.0]
    adapter.record(torch.tensor([[5.0, 6.0]], device=device))
    adapter.record(torch.tensor([[5.0, 6.0]], device=device))
    torch.testing.assert_close(adapter.running_context.cpu(), torch.tensor([4.0, 4.0]))


def test_running_context_follows_a_change_late_in_a_long_run(device):
    adapter = InputAdapter(2, 2).to(device)
    for _ in range(300):
        adapter.record(torch.tensor([[0.0, 0.0]], device=device))
    for _ in range(500):
        adapter.record(torch.tensor([[1.0, 2.0]], device=device))
    expected = torch.tensor([1.0, 2.0]) * (1 - 0.99**500)
    torch.testing.assert_close(adapter.running_context.cpu(), expected, rtol=1e-3, atol=0)


def test_statistics_are_saved_but_not_trained():
    adapter = InputAdapter(2, 2)
    assert {"running_context", "num_contexts"} <= set(adapter.state_dict())
    assert not {"running_context", "num_contexts"} & {name for name, _ in adapter.named_parameters()}


@pytest.mark.parametrize("adapter_class", ADAPTERS)
@pytest.mark.parametrize(
    ("d", "r", "groups", "message"),
    [
        (8, 0, 1, "at least 1, but r=0 was received"),
        (8, -4, 1, "at least 1, but r=-4 was received"),
        (8, 3, 2, r"groups=2 does not divide the rank \(3\).*groups=1"),
        (6, 8, 4, r"groups=4 does not divide the model's width \(6\).*groups=1"),
        (8, 4, 0, r"groups=0 does not divide"),
        (8, 4, -2, r"groups=-2 does not divide"),
    ],
)
def test_sizes_that_do_not_fit(adapter_class, d, r, groups, message):
    with pytest.raises(ValueError, match=message):
        adapter_class(d, r, groups=groups)
