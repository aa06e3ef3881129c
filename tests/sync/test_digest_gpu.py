"""Digests of tensors on a CUDA device: the same as on a CPU, with Triton and without it."""

from __future__ import annotations

import pytest
import torch

from miles_spec.sync.digest import COLUMNS, ROWS, Digester, digest, digests

pytestmark = pytest.mark.gpu

CHUNK = ROWS * COLUMNS
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
]
SIZES = [0, 1, 3, 31, COLUMNS - 1, COLUMNS, 31 * COLUMNS, 32 * COLUMNS + 1, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK - 77]


def random(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Whose bits are all random, signs among them, but for bool."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data > 127 if dtype == torch.bool else data.view(dtype)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_and_cpu_agree(dtype: torch.dtype, backend: str) -> None:
    """All sizes in one launch; then views that are aligned to less than 16 bytes, and others that are copied."""
    tensors = [random(size, dtype, seed=i) for i, size in enumerate(SIZES)]
    here = {str(i): tensor for i, tensor in enumerate(tensors)}
    there = {name: tensor.cuda() for name, tensor in here.items()}
    for name, tensor in list(there.items()):
        for start in (1, 2, 4, 8, 12):
            here[f"{name} from {start}"], there[f"{name} from {start}"] = here[name][start:], tensor[start:]
        here[f"{name} in part"], there[f"{name} in part"] = here[name][::3], tensor[::3]
    square, on_gpu = (x.view(9, -1) for x in (random(9 * 1111, dtype), random(9 * 1111, dtype).cuda()))
    here["turned"], there["turned"], here["one"], there["one"] = square.T, on_gpu.T, square[3, 5], on_gpu[3, 5]
    assert digests(there.items(), backend) == digests(here.items())


def test_a_gpu_takes_triton_by_itself() -> None:
    digester = Digester()
    digester.add("a", torch.ones(3, device="cuda"))
    assert digester._lanes[torch.device("cuda", 0)].kernel


def test_devices_may_mix() -> None:
    tensor = random(CHUNK + 5, torch.float32)
    seen = digests([("a", tensor), ("b", tensor.cuda()), ("c", tensor[1:]), ("d", tensor[1:].cuda())])
    assert seen == {"a": digest(tensor), "b": digest(tensor), "c": digest(tensor[1:]), "d": digest(tensor[1:])}


def test_digests_do_not_depend_on_the_order_of_programs() -> None:
    tensors = [(str(i), random(200 * CHUNK + i, torch.int16, seed=i).cuda()) for i in range(5)]
    first = digests(tensors)
    for _ in range(20):
        assert digests(tensors) == first
    assert {name: digest(tensor) for name, tensor in reversed(tensors)} == first


def test_more_than_two_billion_words() -> None:
    """Offsets beyond 32 bits: what changes at the far end is noticed, as what changes at the near one."""
    tensor = torch.zeros((1 << 31) + CHUNK + 3, dtype=torch.int32, device="cuda")
    seen = {digest(tensor)}
    for at in (0, CHUNK, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 31) + CHUNK + 2):
        tensor[at] = 1
        seen.add(digest(tensor))
        tensor[at] = 0
    assert len(seen) == 7
    tail = tensor[1 << 31 :]
    tail.copy_(random(len(tail), torch.int32))
    tensor[5] = -7
    assert digest(tensor) == digest(tensor, "reference")


def test_a_launch_is_of_the_moment_of_the_flush_on_its_stream() -> None:
    tensor = random(64 * CHUNK, torch.int32).cuda()
    before, other = digest(tensor), digest(tensor.view(64, -1).T)
    digester = Digester()
    digester.add("a", tensor)
    digester.add("b", tensor.view(64, -1).T)
    digester.flush()
    tensor.zero_()
    del tensor
    torch.empty(64 * CHUNK, dtype=torch.int32, device="cuda").fill_(-1)  # likely where the copy was
    assert digester.read() == {"a": before, "b": other}


def test_other_streams_than_the_default_are_taken() -> None:
    tensor = torch.zeros(64 * CHUNK, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        tensor.fill_(3)
        seen = digest(tensor)
    assert seen == digest(torch.full((64 * CHUNK,), 3, dtype=torch.int32))


def test_any_changed_word_of_a_gpu_is_noticed() -> None:
    tensor = random(CHUNK + 300, torch.int32).cuda()
    seen = {digest(tensor)}
    places = [0, 1, 255, 256, 5000, CHUNK - 1, CHUNK, CHUNK + 299]
    for at in places:
        for bit in (0, 15, 31):
            tensor[at] ^= -(1 << 31) if bit == 31 else 1 << bit
            seen.add(digest(tensor))
            tensor[at] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert len(seen) == 1 + 3 * len(places)
