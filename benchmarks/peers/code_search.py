"""What nearest-code searches and quantiser updates are measured against: the formulas that networks use, and three libraries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.bench.case import Call, State, Unavailable


def expanded(x: Tensor, codebook: Tensor) -> Tensor:
    """The usual formula, |x|^2 - 2 x.e + |e|^2 and argmin."""
    return torch.argmin(x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1), 1)


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """torch.cdist and argmin."""
    return torch.cdist(x, codebook).argmin(1)


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
        dim=codes.shape[1], codebook_size=codes.shape[0], decay=decay, commitment_weight=0.25, rotation_trick=False, kmeans_init=False
    )
    module = module.to(codes.device, codes.dtype).train()
    book = module._codebook
    kept = ((book.embed, codes), (book.cluster_size, state["size"]), (book.embed_avg, state["average"]))

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        for buffer, value in kept:
            buffer.data.copy_(value[None])
        leaf = x.detach().requires_grad_()
        quantized, _, loss = module(leaf[None])
        (dx,) = torch.autograd.grad((quantized[0] * grad).sum() + loss.sum(), leaf)
        return quantized[0].detach(), dx, book.embed[0].clone()

    return run


def one_hot_step(x: Tensor, grad: Tensor, codebook: Tensor, size: Tensor, average: Tensor, decay: float) -> tuple[Tensor, ...]:
    """Quantise, differentiate and update the codebook by moving averages, through a one-hot matrix as many tutorials do."""
    leaf = x.detach().requires_grad_()
    hot = F.one_hot(expanded(leaf.detach(), codebook), len(codebook)).to(x.dtype)
    q = hot @ codebook
    loss = F.mse_loss(leaf, q)
    quantized = leaf + (q - leaf).detach()
    (dx,) = torch.autograd.grad((quantized * grad).sum() + 0.25 * loss, leaf)
    with torch.no_grad():
        return q, dx, updated(hot.sum(0), hot.T @ x, size, average, decay)


def scatter_step(x: Tensor, grad: Tensor, codebook: Tensor, size: Tensor, average: Tensor, decay: float) -> tuple[Tensor, ...]:
    """The same with a gather and `index_add_` instead of a one-hot matrix."""
    leaf = x.detach().requires_grad_()
    index = expanded(leaf.detach(), codebook)
    q = codebook[index]
    loss = F.mse_loss(leaf, q)
    quantized = leaf + (q - leaf).detach()
    (dx,) = torch.autograd.grad((quantized * grad).sum() + 0.25 * loss, leaf)
    with torch.no_grad():
        counts = torch.bincount(index, minlength=len(codebook)).to(x.dtype)
        return q, dx, updated(counts, torch.zeros_like(codebook).index_add_(0, index, x), size, average, decay)


def updated(counts: Tensor, sums: Tensor, size: Tensor, average: Tensor, decay: float) -> Tensor:
    """The codebook after one step of moving averages with Laplace smoothing, from given averages."""
    size = size.lerp(counts, 1 - decay)
    return average.lerp(sums, 1 - decay) / smoothed(size)[:, None]


def smoothed(size: Tensor) -> Tensor:
    """Laplace's smoothing of the codes' average sizes; their total stays."""
    total = size.sum()
    return (size + 1e-5) / (total + len(size) * 1e-5) * total
