"""Settings and bases for the tests of the adapter core."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only wait for their threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_biases(model):
    """Fresh models have zero biases, which any scaling leaves alone."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


@pytest.fixture(scope="module")
def make_dense(make_llama):
    """Grouped-query Llama with random biases everywhere."""
    return lambda: random_biases(make_llama(attention_bias=True, mlp_bias=True)).requires_grad_(False)
