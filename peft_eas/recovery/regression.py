"""Linear regression of low rank in closed form, from sums that are gathered batch by batch."""

import torch

from ..evaluation import from_all_ranks
from ..folding.fold import LowRankMap, exact

# Weight of the ridge penalty, as a share of the mean variance of the inputs.
RIDGE = 0.3


class Moments:
    """The first and second moments of inputs x and targets y, as sums over tokens.

    Memory: (d_in + 1) (d_in + d_out) numbers in float32, however many tokens are added.

    Attributes:
        count: how many tokens were added.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.count = 0
        self._offset: torch.Tensor | None = None
        self._sum_x = torch.zeros(d_in, device=device)
        self._sum_y = torch.zeros(d_out, device=device)
        self._xx = torch.zeros(d_in, d_in, device=device)
        self._xy = torch.zeros(d_in, d_out, device=device)
        self._yy = torch.zeros((), device=device)

    @staticmethod
    def bytes(d_in: int, d_out: int) -> int:
        """How much memory the moments of these widths take."""
        return 4 * (d_in + 1) * (d_in + d_out)

    @exact
    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds tokens: x of shape (tokens, d_in), y of shape (tokens, d_out)."""
        if len(x) == 0:
            return
        x, y = x.float(), y.float()
        if self._offset is None:  # a mean that is far from zero would leave few digits for the variance
            self._offset = from_all_ranks(x.mean(0)).mean(0)
        x = x - self._offset
        self.count += len(x)
        self._sum_x += x.sum(0)
        self._sum_y += y.sum(0)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)
        self._yy += y.square().sum()

    @property
    def square(self) -> float:
        """The square of y, summed over tokens."""
        return float(self._yy)

    def gather(self) -> None:
        """Adds up what all ranks of a distributed run have added. All must call it, once, after the last token."""
        self.count = int(from_all_ranks(self._sum_x.new_tensor(self.count)).sum())
        for moment in (self._sum_x, self._sum_y, self._xx, self._xy, self._yy):
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(moment)

    @exact
    def low_rank_fit(self, r: int, groups: int = 1, ridge: float = RIDGE) -> tuple[LowRankMap, float]:
        """The map x → left (right x) + shift of rank r that is closest to y, and what it leaves.

        Reduced-rank ridge regression (Mukherjee and Zhu, 2011): of the ridge solution W, with the Gram matrix G of the
        centred inputs and penalty λ, the projection onto the r leading eigenvectors of Wᵀ (G + λ) W. With `groups`,
        each of as many equal parts of y has r / groups of the rank to itself, so that left is block-diagonal.

        Args:
            ridge: λ as a share of the mean diagonal element of G.

        Returns:
            the map, and the squared error that it leaves of y, summed over tokens; see `square`.
        """
        moments = (self._sum_x, self._sum_y, self._xx, self._xy, self._yy, self._offset)
        if self._xx.device.type == "mps":  # which has no eigenvalues
            moments = tuple(moment.cpu() for moment in moments)
        sum_x, sum_y, xx, xy, yy, offset = moments
        mean_x, mean_y = sum_x / self.count, sum_y / self.count
        gram = xx - torch.outer(sum_x, mean_x)
        cross = xy - torch.outer(sum_x, mean_y)
        strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        damped = gram + torch.diag(strength.expand(len(gram)))
        solution = torch.cholesky_solve(cross, torch.linalg.cholesky(damped))  # W, (d_in, d_out)
        fitted = cross.T @ solution  # Wᵀ (G + λ) W
        width, rank = len(mean_y) // groups, r // groups
        lefts, rights = [], []
        for part in (slice(start, start + width) for start in range(0, len(mean_y), width)):
            leading = torch.linalg.eigh(fitted[part, part]).eigenvectors[:, -rank:]
            leading = torch.nn.functional.pad(leading, (0, rank - leading.shape[1]))  # more rank than width
            lefts.append(leading)
            rights.append((solution[:, part] @ leading).T)
        left, right = torch.block_diag(*lefts), torch.cat(rights)
        shift = mean_y - left @ (right @ (mean_x + offset))
        # |y − ŷ|² about the means, where ŷ = left (right x)
        explained = 2 * (left * (cross.T @ right.T)).sum() - ((right @ gram) * (left.T @ left @ right)).sum()
        left_over = yy - self.count * mean_y.square().sum() - explained
        return LowRankMap(left, right, shift), max(0.0, float(left_over))
