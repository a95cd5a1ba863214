"""The shim itself: what it computes agrees with the PTX manual's layouts, and what it must catch it catches."""

from __future__ import annotations

import pytest
import torch

from tests.simt import host

SEEDS = range(6)


@pytest.fixture(scope="module")
def probe():
    return host.module("probe")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, -7, dtype=dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("tf32", torch.float32)])
def test_mma_with_ldmatrix_is_the_matrix_product(probe, name, dtype, seed):
    depth = 32 // dtype.itemsize
    a, b, d = numbers(16, depth, dtype=dtype), numbers(8, depth, dtype=dtype).flip(0).contiguous(), buffer(16, 8)
    getattr(probe, f"product_{name}")(seed, a.data_ptr(), b.data_ptr(), d.data_ptr(), False)
    exact = a.double() @ b.double().T
    rounding = 2.0**-11 if name == "tf32" else 0.0  # of each factor, to nearest
    bound = 2.0**-20 * exact.abs().max() + 2.1 * rounding * (a.double().abs() @ b.double().abs().T)
    assert ((d - exact).abs() <= bound).all()
    assert name != "tf32" or not torch.equal(d, a @ b.T), "tf32 factors were not rounded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transposed_ldmatrix_reads_b_by_columns(probe, dtype):
    a, b, d = numbers(16, 16, dtype=dtype), numbers(16, 8, dtype=dtype), buffer(16, 8)
    getattr(probe, f"product_{str(dtype)[6:]}")(1, a.data_ptr(), b.data_ptr(), d.data_ptr(), True)
    torch.testing.assert_close(d, (a.double() @ b.double()).float())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_layout(probe, count, transposed):
    """Lane l holds elements (l / 4, 2 (l % 4)) and the one after it of each 8 x 8 matrix; transposed, of its transpose."""
    out = buffer(32, count, dtype=torch.int32)
    getattr(probe, f"ldmatrix_{count}{'_trans' if transposed else ''}")(3, out.data_ptr())
    matrices = torch.arange(count * 64).view(count, 8, 8)
    if transposed:
        matrices = matrices.transpose(1, 2)
    pairs = matrices.reshape(count, 32, 2)
    assert torch.equal(out.long().T, pairs[..., 0] + (pairs[..., 1] << 16))


@pytest.mark.parametrize("kernel", ["reverse_block", "reverse_warp"])
def test_a_deleted_barrier_is_seen(probe, kernel):
    threads = 256 if kernel == "reverse_block" else 32
    x = numbers(threads)

    def run(seed, barrier):
        out = buffer(threads)
        getattr(probe, kernel)(seed, barrier, x.data_ptr(), out.data_ptr())
        return torch.equal(out, x.flip(0))

    assert all(run(seed, True) for seed in SEEDS)
    assert not any(run(seed, False) for seed in SEEDS)


def test_a_missing_wait_for_cp_async_is_seen(probe):
    x = numbers(128)
    expected = x.clone()
    expected[-2:] = 0  # the last copy has 8 of 16 bytes, the rest becomes zero
    out = buffer(128)
    probe.copy_through_shared(0, True, x.data_ptr(), out.data_ptr())
    assert torch.equal(out, expected)
    probe.copy_through_shared(0, False, x.data_ptr(), out.data_ptr())
    assert out.isnan().all()


def test_waiting_for_all_but_one_group_completes_the_older_one(probe):
    x, first, second = numbers(128), buffer(128), buffer(128)
    probe.copy_in_two_groups(0, x.data_ptr(), first.data_ptr(), second.data_ptr())
    assert torch.equal(first, x)
    assert second.isnan().all()


def test_misaligned_16_byte_accesses_are_errors(probe):
    x = numbers(16)
    address = (x.data_ptr() + 15) // 16 * 16
    probe.misaligned_copy(address, 16, 0)
    with pytest.raises(RuntimeError, match="a shared address is not a multiple of 16"):
        probe.misaligned_copy(address, 8, 0)
    with pytest.raises(RuntimeError, match="a global address is not a multiple of 16"):
        probe.misaligned_copy(address, 0, 8)
    with pytest.raises(RuntimeError, match="outside of the block's shared memory"):
        probe.misaligned_copy(address, 64, 0)


def test_undefined_behaviour_is_an_error(probe):
    x, out = numbers(4), buffer(1)
    probe.misaligned_float(x.data_ptr() + 4, out.data_ptr())
    with pytest.raises(RuntimeError, match="1 reports of undefined behaviour"):
        probe.misaligned_float(x.data_ptr() + 2, out.data_ptr())


def test_a_misaligned_16_byte_load_is_reported():
    """In a process of its own: after the report the processor itself may refuse the load."""
    script = "b = numpy.zeros(16, numpy.float32)\na = (b.ctypes.data + 15) // 16 * 16\nprobe.misaligned_load(a{}, a + 16)"
    assert host.run_alone("probe", script.format(""), host.UNDEFINED).returncode == 0
    done = host.run_alone("probe", script.format(" + 4"), host.UNDEFINED)
    assert done.returncode != 0
    assert "misaligned address" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_and_votes(probe, seed):
    out = buffer(64, 10, dtype=torch.int32)
    probe.warp_functions(seed, out.data_ptr())
    for lane, row in enumerate(out[32:].tolist()):
        down = lane + 3 if lane % 16 + 3 < 16 else lane
        ballot = sum(1 << i for i in range(0, 32, 3))
        signed = ballot - (1 << 32) if ballot >> 31 else ballot
        last = lane ^ 1 if lane < 16 else -7
        assert row == [5, max(lane - 3, 0) if lane >= 3 else lane, down, lane ^ 9, signed, 1, 0, 1, 0, last]


def test_atomics_and_the_last_block(probe):
    for seed in SEEDS:
        total, largest = torch.zeros(1), buffer(1, dtype=torch.int32)
        arrived, last = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        probe.count_arrivals(seed, 5, 96, total.data_ptr(), arrived.data_ptr(), last.data_ptr(), largest.data_ptr())
        assert (total.item(), arrived.item(), last.item(), largest.item()) == (480, 5, 96, 479)


def test_a_race_on_global_memory_is_seen(probe):
    for seed in SEEDS:
        total = torch.zeros(1, dtype=torch.int32)
        probe.count_with_a_race(seed, total.data_ptr())
        assert total.item() < 64


def test_threads_that_cannot_go_on_are_an_error(probe):
    with pytest.raises(RuntimeError, match=r"no thread can go on; 7 threads have returned; 57 threads wait at __syncthreads"):
        probe.diverging_barrier()
    with pytest.raises(RuntimeError, match="lanes of one warp diverge"):
        probe.diverging_warp()


def test_shared_memory_is_poisoned_before_each_block(probe):
    static, dynamic = buffer(3, 32), buffer(3, 32)
    probe.read_uninitialised(static.data_ptr(), dynamic.data_ptr())
    assert static.isnan().all()
    assert dynamic.isnan().all()


def test_the_launch_must_give_the_shared_memory_that_the_kernel_names(probe):
    with pytest.raises(RuntimeError, match="uses 64 bytes of dynamic shared memory and was launched with 32"):
        probe.wrong_shared_size()


@pytest.mark.parametrize("overrun", ["write_shared(64)", "write_shared(-1)", "write_global(b.ctypes.data, 4)"])
def test_the_address_sanitizer_sees_overruns(overrun):
    script = f"b = numpy.zeros(4, numpy.float32)\nprobe.write_global(b.ctypes.data, 3)\nprobe.{overrun}"
    done = host.run_alone("probe", script, host.ADDRESS)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
