"""What nearest-code searches and quantiser updates are measured against: the formulas that networks use, and three libraries.

In a lower precision the formulas compute their products and distances in float32, as careful networks do: rounded to it, a distance
has too few digits to tell codes apart, and the gate does not time a search that chooses wrongly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.bench.case import CLEAR, Call, State, Unavailable

Search = Callable[[Tensor, Tensor], Tensor]

#: The weight of the commitment loss.
COMMITMENT = 0.25


def wide(t: Tensor) -> Tensor:
    """In float32, or as it is if that is wider."""
    return t if t.dtype == torch.float64 else t.float()


def product(x: Tensor, codebook: Tensor) -> Tensor:
    """argmin of |e|^2 - 2 x.e, which one call of BLAS computes: two passes over all distances fewer than the usual formula."""
    x, codebook = wide(x), wide(codebook)
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def expanded(x: Tensor, codebook: Tensor) -> Tensor:
    """The usual formula, |x|^2 - 2 x.e + |e|^2 and argmin."""
    return rounded(wide(x), wide(codebook))


def rounded(x: Tensor, codebook: Tensor) -> Tensor:
    """The usual formula in the dtype of its operands, however low: fast where it has matrix units, and wrong for many rows."""
    return torch.argmin(x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1), 1)


def accumulated(x: Tensor, codebook: Tensor) -> Tensor:
    """Products of low precision summed in float32 by a GPU's matrix units; such products are exact."""
    if not x.is_cuda:
        raise Unavailable("products of low precision with sums in float32 are for CUDA")
    products = torch.mm(x, codebook.T, out_dtype=torch.float32)
    return torch.sub(codebook.float().square().sum(1), products, alpha=2).argmin(1)


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """torch.cdist and argmin."""
    return torch.cdist(wide(x), wide(codebook)).argmin(1)


def clear(x: Tensor, codebook: Tensor) -> Tensor:
    """Rows (N,) whose nearest code is nearer than the second by more than `CLEAR` of the latter's squared distance."""
    if len(codebook) == 1:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    found = []
    for rows in x.split(max(1, (1 << 25) // len(codebook))):  # a quarter of a gigabyte of distances at a time
        distances = rows.square().sum(1, keepdim=True) - 2 * rows @ codebook.T + codebook.square().sum(1)
        best, second = distances.topk(2, largest=False).values.clamp_min(0).unbind(1)
        found.append(second - best > CLEAR * second)
    return torch.cat(found)


def faiss_flat(state: State) -> Call:
    """faiss's exact search on a CPU, with our number of threads; the index is built beforehand."""
    try:
        import faiss
    except ImportError as error:
        raise Unavailable("faiss is not installed; pip install faiss-cpu") from error
    codebook = state["codebook"]
    if codebook.dtype != torch.float32 or codebook.is_cuda:
        raise Unavailable("faiss-cpu searches in float32 on a CPU")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda x: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def flash_kmeans(state: State) -> Call:
    """The assignment kernel of flash-kmeans (arXiv 2603.09229) with its own choice of tiles; it wants the squares of both operands."""
    codebook = state["codebook"]
    if not codebook.is_cuda:
        raise Unavailable("flash-kmeans needs CUDA")
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    except ImportError as error:
        raise Unavailable("flash-kmeans is not installed; pip install flash-kmeans") from error
    codes = codebook[None].contiguous()
    squares = codes.float().square().sum(-1)

    def run(x: Tensor) -> Tensor:
        index: Tensor = euclid_assign_triton(x[None], codes, x[None].float().square().sum(-1), c_sq=squares)
        return index[0].long()

    return run


def vector_quantize_pytorch(state: State) -> Call:
    """The modules of vector-quantize-pytorch in evaluation mode with this codebook, (stages, K, D) for the residual one; its
    answer is the indices."""
    try:
        from vector_quantize_pytorch import ResidualVQ, VectorQuantize
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed; pip install vector-quantize-pytorch") from error
    codes = state["codebook"]
    sizes = {"dim": codes.shape[-1], "codebook_size": codes.shape[-2]}
    residual = codes.dim() == 3
    module = ResidualVQ(num_quantizers=len(codes), **sizes) if residual else VectorQuantize(**sizes)
    module = module.to(codes.device, codes.dtype).eval()
    for layer, book in zip(module.layers if residual else [module], codes if residual else [codes], strict=True):
        layer._codebook.embed.data.copy_(book[None])

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        answer: Tensor = module(x[None])[1][0]
        return answer

    return run


def vector_quantize_pytorch_step(state: State, decay: float) -> Call:
    """The same module in training mode, without its rotation trick: a step from the given averages, which are put back each time."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed; pip install vector-quantize-pytorch") from error
    codes = state["codebook"]
    module = VectorQuantize(
        dim=codes.shape[1], codebook_size=codes.shape[0], decay=decay, commitment_weight=COMMITMENT, rotation_trick=False, kmeans_init=False
    )
    module = module.to(codes.device, codes.dtype).train()
    book = module._codebook
    kept = ((book.embed, codes), (book.cluster_size, state["size"]), (book.embed_avg, state["average"]))

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        for buffer, value in kept:
            buffer.data.copy_(value[None])
        leaf = x.detach().requires_grad_()
        quantized, _, loss = module(leaf[None])
        (dx,) = torch.autograd.grad([quantized, loss], leaf, [grad[None], torch.ones_like(loss)])
        return quantized[0].detach(), dx, book.embed[0].clone()

    return run


def quantized(x: Tensor, codebook: Tensor, search: Search = product) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x replaced by its codes, through which gradients pass to x as they are; the commitment loss; the codes; their indices."""
    index = search(x.detach(), codebook)
    q = codebook[index]
    return x + (q - x).detach(), F.mse_loss(x, q), q, index


def scattered(x: Tensor, index: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many rows chose each of the codes, and their sums, in float32 at least."""
    x = wide(x)
    counts = x.new_zeros(codes).index_add_(0, index, x.new_ones(()).expand(len(x)))
    return counts, x.new_zeros(codes, x.shape[1]).index_add_(0, index, x)


def one_hot(x: Tensor, index: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """The same through a one-hot matrix, as many tutorials do."""
    x = wide(x)
    hot = F.one_hot(index, codes).to(x.dtype)
    return hot.sum(0), hot.T @ x


def step(forward: Callable[..., tuple[Tensor, ...]], gather: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """A training step (x, gradient, codebook, sizes, averages, decay) -> (codes, gradient of x, new codebook), made of something
    like `quantized` and something like `scattered`."""

    def run(x: Tensor, grad: Tensor, codebook: Tensor, size: Tensor, average: Tensor, decay: float) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y, loss, q, index = forward(leaf, codebook)
        (dx,) = torch.autograd.grad([y, loss], leaf, [grad, loss.new_full((), COMMITMENT)])
        with torch.no_grad():
            return q, dx, updated(*gather(x, index, len(codebook)), size, average, decay)

    return run


def updated(counts: Tensor, sums: Tensor, size: Tensor, average: Tensor, decay: float) -> Tensor:
    """The codebook after one step of moving averages with Laplace smoothing, from given averages; computed as `wide` says."""
    sizes = wide(size).lerp(wide(counts), 1 - decay)
    return (wide(average).lerp(wide(sums), 1 - decay) / smoothed(sizes)[:, None]).to(average.dtype)


def smoothed(size: Tensor) -> Tensor:
    """Laplace's smoothing of the codes' average sizes; their total stays."""
    total = size.sum()
    return (size + 1e-5) / (total + len(size) * 1e-5) * total
