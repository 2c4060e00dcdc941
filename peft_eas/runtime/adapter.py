"""The two adapters of Efficient Attention Skipping as plain modules, without any knowledge of PEFT.

Source: Wu et al., "Not All Attention is Needed" (arXiv 2403.15226), section 3.3, with the modality routing of
LaVIN (Luo et al., "Cheap and Quick", arXiv 2305.15023).
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn


class Affine(nn.Module):
    """x → W x + b, W of shape (d_out, d_in), drawn like `nn.Linear`'s.

    It is none, since what looks for linear layers to adapt or to quantise would take this one, whose weights are also
    read without a call.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        nn.Linear.reset_parameters(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes (…, d_in), returns (…, d_out)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class GroupedUp(nn.Module):
    """Up-projection r → d in `groups` diagonal blocks: block g of the output reads slice g of the bottleneck.

    `weight` has shape (d, r / groups): rows g·d/groups … (g+1)·d/groups hold block g. `bias` has shape (d,). Both
    start at zero.
    """

    def __init__(self, r: int, d: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(d, r // groups))
        self.bias = nn.Parameter(torch.zeros(d))

    def dense_weight(self) -> torch.Tensor:
        """The block-diagonal matrix of shape (d, r) that this projection stands for."""
        return _block_diagonal(self.weight, self.groups)

    def extra_repr(self) -> str:
        d, slice_size = self.weight.shape
        return f"{slice_size * self.groups}, {d}, groups={self.groups}"


def _block_diagonal(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Weights of shape (…, d, r / groups) as the block-diagonal matrices, (…, d, r), that they stand for."""
    blocks = weight.unflatten(-2, (groups, -1))
    dense = weight.new_zeros(*blocks.shape[:-1], groups, blocks.shape[-1])
    dense.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
    return dense.flatten(-4, -3).flatten(-2)


class RoutedAdapter(nn.Module):
    """What both adapters share: a bottleneck, up-projections that a router mixes, and the running mean of the
    contexts.

    The router mixes the paths by g = softmax((R m) / τ). The mix is the same for all tokens of a sequence, so the
    paths' weights are mixed, once per sequence, or once for all if the context is the running mean. One path needs no
    router: Σ_e g_e U_e is then U_0. An adapter that reads no context keeps no running mean.

    The running mean is a buffer while it moves, and an untrained parameter once it is frozen (`freeze_context`) and
    decides what the adapter computes; float32 in any case.

    Args:
        d: width of the model. r: rank of the bottleneck. groups: diagonal blocks of the up-projections.
        scale: factor s on the adapter's output. router_temperature: τ.
        dropout: probability with which a bottleneck unit is dropped in training.
        init_weights: True: the up-projections start at zero, and the adapter is the identity. False: they are drawn
            like the down-projections.
        paths: number of up-projections that the router mixes; 1 for no router.

    Raises:
        ValueError: if r or `paths` is below 1, or if `groups` does not divide r and d.
    """

    has_context_path: ClassVar[bool] = False
    _annealed_to: tuple[torch.Tensor, torch.Tensor] | None = None
    _mean_was_seen = False
    is_annealing_paused = False

    def __init__(
        self,
        d: int,
        r: int,
        groups: int = 2,
        scale: float = 1.0,
        router_temperature: float = 10.0,
        dropout: float = 0.0,
        init_weights: bool = True,
        paths: int = 2,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"The rank of an adapter must be at least 1, but r={r} was received.")
        if paths < 1:
            raise ValueError(f"An adapter needs at least 1 up-projection, but paths={paths} was received.")
        for name, value in (("the rank", r), ("the model's width", d)):
            if groups < 1 or value % groups:
                raise ValueError(
                    f"groups={groups} does not divide {name} ({value}). Choose a number of groups that divides both "
                    f"r={r} and d={d}; groups=1 always does."
                )
        self.scale = scale
        self.router_temperature = router_temperature
        self.token_down = Affine(d, r)
        if self.has_context_path:
            self.context_down = Affine(d, r)
        self.up = nn.ModuleList([GroupedUp(r, d, groups) for _ in range(paths)])
        self.router = Affine(d, paths) if paths > 1 else None
        self.dropout = nn.Dropout(dropout)
        # Statistics in the manner of BatchNorm: the context that takes the prompt's place once it is frozen.
        self.register_buffer("running_context", torch.zeros(d) if self.needs_context else None)
        self.register_buffer("num_contexts", torch.zeros((), dtype=torch.long) if self.needs_context else None)
        self.reset_parameters(init_weights)

    @property
    def needs_context(self) -> bool:
        """Whether what the adapter computes depends on a context."""
        return self.has_context_path or self.router is not None

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draws the weights anew; see `init_weights` of the class."""
        for down in [self.token_down] + ([self.context_down] if self.has_context_path else []):
            nn.init.xavier_uniform_(down.weight)
            nn.init.zeros_(down.bias)
        for up in self.up:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            if not init_weights:
                nn.init.xavier_uniform_(up.weight)
                nn.init.normal_(up.bias, std=0.02)

    def route(self, context: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Weights of the paths, shape (B, paths), for contexts of shape (B, d); in the adapter's dtype by default."""
        dtype = dtype or self.router.weight.dtype
        logits = F.linear(context.to(dtype), self.router.weight.to(dtype), self.router.bias.to(dtype))
        return F.softmax(logits / self.router_temperature, dim=-1, dtype=torch.float32).to(logits.dtype)

    def mixed_up(
        self, context: torch.Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ_e g_e U_e, shape (B, d, r / groups), and Σ_e g_e β_e, shape (B, d), for contexts of shape (B, d).

        Without a router B is 1, for sequences of any context. In the adapter's dtype by default.
        """
        weights = torch.stack([up.weight for up in self.up]).to(dtype or self.up[0].weight.dtype)
        biases = torch.stack([up.bias for up in self.up]).to(weights.dtype)
        if self.router is None:
            return weights, biases
        gates = self.route(context, dtype)
        return torch.einsum("be,edk->bdk", gates, weights), gates @ biases

    def affine_map(self, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The map z → z + left (C z) + shift that the adapter is, in evaluation mode, for a fixed context.

        Takes contexts of shape (B, d); returns left, (B, d, r), and shift, (B, d), in float32. With Ū = Σ_e g_e U_e
        and β = Σ_e g_e β_e (arXiv 2403.15226, section 3.3, equation of the re-parameterisation): for PIA, left = s/2 Ū
        and shift = s (½ Ū (A m + a + c) + β); for a kept MHA's adapter, left = s Ū and shift = s (Ū c + β). For an
        adapter that needs no context, which may be None, B is 1.
        """
        up, up_bias = self.mixed_up(context, torch.float32)
        constant, share = self.token_down.bias.float(), 1.0
        if self.has_context_path:
            down, share = self.context_down, 0.5
            constant = constant + F.linear(context.float(), down.weight.float(), down.bias.float())
        left = (self.scale * share) * _block_diagonal(up, self.up[0].groups)
        shift = (left @ constant[..., None])[..., 0] + self.scale * up_bias
        return left.expand(len(shift), -1, -1), shift

    def freeze_context(self) -> None:
        """Makes the running mean a parameter, so that whoever copies, averages or shards by parameters takes it along.

        It keeps its name in the state dict, and is not trained.
        """
        if "running_context" in self._buffers and self.needs_context:
            mean = self._buffers.pop("running_context")
            self.running_context = nn.Parameter(mean, requires_grad=False)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What is trained: all of `named_parameters` but a frozen running mean.

        By this PEFT switches training on and off, and reports whether it is.
        """
        return (parameter for parameter in super().parameters(recurse) if parameter is not self.running_context)

    def has_lost_context(self) -> bool:
        """Whether the running mean is zero although that counts, as where weights were copied without it.

        Waits for the device until a mean was seen once.
        """
        mean = self.running_context
        if self._mean_was_seen or mean.is_meta or mean.numel() == 0:  # DeepSpeed's ZeRO-3 leaves empty ones behind
            return False
        self._mean_was_seen = bool(mean.any())
        return not self._mean_was_seen and any(bool(weight.any()) for weight in self.up.parameters())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RoutedAdapter":
        """As of `nn.Module`, behind `to`, `half` and the like; but the running mean is moved alone, never cast.

        In half precision it would stop moving long before the end of a training run, and be off by the rounding.
        """
        mean = None if self.running_context is None else self.running_context.detach()
        super()._apply(fn, recurse)
        if mean is not None and self.running_context.dtype != mean.dtype:
            self.running_context.data = mean.to(self.running_context.device)
        return self

    @torch.no_grad()
    def record(self, context: torch.Tensor, momentum: float = 0.01) -> None:
        """Adds the batch's mean of `context`, shape (B, d), to the running mean.

        The first 1 / momentum batches count alike, so that a short run has an unbiased mean; later ones enter with
        weight `momentum`, so that a long run follows the weights as they change.
        """
        self.num_contexts += 1
        weight = (1.0 / self.num_contexts).clamp_min(momentum)
        self.running_context.lerp_(context.mean(0).to(self.running_context), weight.to(self.running_context))

    def anneal(self, share: float) -> None:
        """Until the next call, `annealed` mixes the running mean, as it is now, into each context, with the weight
        `share`.

        As long as no mean is known, the weight is 0. The mean is not moved until the next call, so that passes stay
        equal that must be: gradient checkpointing computes one twice, and ranks have several micro-batches.
        """
        self.is_annealing_paused = False
        self._annealed_to = (self.running_context.clone(), share * (self.num_contexts > 0)) if share > 0 else None

    def annealed(self, context: torch.Tensor) -> torch.Tensor:
        """The contexts, (B, d), to use instead of the prompts' own; see `anneal`."""
        if self._annealed_to is None or self.is_annealing_paused:
            return context
        mean, share = self._annealed_to
        return torch.lerp(context, mean.to(context), share.to(context))

    def _expand(self, z: torch.Tensor, bottleneck: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """z + s (Σ_e g_e U_e) dropout(bottleneck), for z of shape (B, T, d) and a bottleneck of shape (B, T, r)."""
        weight, bias = self.mixed_up(context)
        groups = self.up[0].groups
        # (B, T, r) → (B, groups, T, r/groups), times (B, groups, r/groups, d/groups): one batched product.
        sliced = self.dropout(bottleneck).unflatten(-1, (groups, -1)).transpose(1, 2)
        blocks = weight.unflatten(1, (groups, -1)).transpose(-1, -2)
        update = (sliced @ blocks).transpose(1, 2).flatten(-2) + bias[:, None]
        return z + (self.scale * update).to(z.dtype)


class PropagationAdapter(RoutedAdapter):
    """PIA, the propagation-of-information adapter: stands for a skipped MHA in front of the FFN.

    For z of shape (B, T, d) and a context m of shape (B, d), or (1, d) for all sequences alike (section 3.3):

        u = ½ (A m + C z)        g = softmax((R m) / τ)        PIA(z) = z + s Σ_e g_e U_e dropout(u)

    Submodules: `context_down` (A), `token_down` (C), `up` (U_0, U_1, …), `router` (R). Arguments and errors are those
    of `RoutedAdapter`.
    """

    has_context_path = True

    def forward(self, z: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Returns PIA(z), in the shape and dtype of z."""
        dtype = self.token_down.weight.dtype
        bottleneck = 0.5 * (self.context_down(context.to(dtype))[:, None] + self.token_down(z.to(dtype)))
        return self._expand(z, bottleneck, context)


class InputAdapter(RoutedAdapter):
    """The adapter at the input of a kept MHA: z + s Σ_e g_e U_e dropout(C z).

    The context, shape (B, d) or (1, d), does not enter the bottleneck; it only drives the router, and may be None if
    there is none. With one path, this is also the adapter that stands for a skipped MHA with context="none". Arguments
    and errors are those of `RoutedAdapter`.
    """

    def forward(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the adapted input, in the shape and dtype of z."""
        return self._expand(z, self.token_down(z.to(self.token_down.weight.dtype)), context)
