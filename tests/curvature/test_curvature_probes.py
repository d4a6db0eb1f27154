"""Probes are fair signs that depend on the seed and the indices only."""

import pytest
import torch

from hap_hf.curvature import rademacher


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return tensors whose sizes are no multiples of 64."""
    return {"b": torch.zeros(5, 13, dtype=dtype), "a": torch.zeros(7, 11, dtype=dtype)}


def test_every_entry_is_one_or_minus_one_in_the_shape_and_dtype_of_its_tensor() -> None:
    signs = rademacher(tensors(torch.bfloat16), 0, 0, 0)
    assert {n: (s.shape, s.dtype) for n, s in signs.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors(torch.bfloat16).items()
    }
    assert all(torch.equal(s.abs(), torch.ones_like(s)) for s in signs.values())


def test_the_same_key_gives_the_same_probe_again() -> None:
    first, second = rademacher(tensors(), 3, 1, 2), rademacher(tensors(), 3, 1, 2)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("key", [(4, 1, 2), (3, 2, 2), (3, 1, 3), (3, 2, 1)])
def test_another_seed_batch_or_probe_gives_another_probe(key: tuple[int, int, int]) -> None:
    first, second = rademacher(tensors(), 3, 1, 2), rademacher(tensors(), *key)
    assert not any(torch.equal(first[n], second[n]) for n in first)


def test_two_tensors_of_one_shape_get_different_signs() -> None:
    signs = rademacher({"a": torch.zeros(100), "b": torch.zeros(100)}, 0, 0, 0)
    assert not torch.equal(signs["a"], signs["b"])


def test_the_order_of_the_tensors_does_not_matter() -> None:
    given = tensors()
    first, second = rademacher(given, 0, 0, 0), rademacher(dict(reversed(given.items())), 0, 0, 0)
    assert all(torch.equal(first[n], second[n]) for n in given)


def test_the_dtype_does_not_change_the_signs() -> None:
    first, second = rademacher(tensors(torch.float16), 0, 0, 0), rademacher(tensors(torch.float64), 0, 0, 0)
    assert all(torch.equal(first[n].double(), second[n]) for n in first)


def test_every_one_of_the_64_bits_of_a_random_number_is_fair() -> None:
    words = 20_000
    signs = rademacher({"w": torch.zeros(words, 64)}, 0, 0, 0)["w"]
    assert signs.mean(0).abs().max() < 4.5 / words**0.5  # 64 means with standard deviation words ** -0.5


def test_signs_of_different_entries_tensors_and_probes_are_uncorrelated() -> None:
    many = torch.stack([rademacher({"w": torch.zeros(130)}, 0, b, p)["w"] for b in range(40) for p in range(50)])
    correlation = many.T @ many / len(many) - torch.eye(130)
    assert correlation.abs().max() < 5.5 / len(many) ** 0.5
    across = (many[:-1] * many[1:]).mean()
    assert across.abs() < 4.5 / many.numel() ** 0.5


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), rademacher(tensors(), 0, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = rademacher(tensors(), 0, 0, 0)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_bits_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    first = rademacher(tensors(), 0, 0, 0)
    with torch.device("meta"):
        second = rademacher({n: torch.zeros(t.shape, device="cpu") for n, t in tensors().items()}, 0, 0, 0)
    assert all(torch.equal(first[n], second[n]) for n in first)
