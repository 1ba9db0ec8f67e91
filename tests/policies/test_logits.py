"""Merged attention against the softmax written out in float64, by every kernel that tells its sums here."""

from collections.abc import Iterator

import pytest
import torch
from blocktune.policies.attention import ScaledAttention, _with_scaled
from blocktune.policies.logits import _traced, weighted_attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BATCH, HEADS, DIM, TEXT, IMAGE = 2, 3, 64, 21, 83  # of no kernel's tile
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-10}
FLASH, EFFICIENT, CUDNN, MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: its kernels")
KERNELS = [
    *(pytest.param(("cpu", kind, dtype)) for kind in (FLASH, MATH) for dtype in TOLERANCE),
    *(
        pytest.param(("cuda", kind, dtype), marks=on_cuda)
        for kind, dtypes in (
            (FLASH, (torch.bfloat16, torch.float16)),
            (CUDNN, (torch.bfloat16, torch.float16)),
            (EFFICIENT, (torch.bfloat16, torch.float16, torch.float32)),
            (MATH, tuple(TOLERANCE)),
        )
        for dtype in dtypes
    ),
]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=KERNELS, ids=lambda kernel: "-".join(str(part).rpartition(".")[2].lower() for part in kernel))
def kernel(request) -> Iterator[tuple[str, torch.dtype]]:
    """Device and dtype, while torch has that one kernel to pick."""
    device, kind, dtype = request.param
    with sdpa_kernel(kind):
        skip_unless_it_runs(tensors(device, dtype))
        yield device, dtype


def skip_unless_it_runs(given: Tensors) -> None:
    """Without our own code: this device may lack the kernel, or the kernel such heads."""
    try:
        scaled_dot_product_attention(*given)
    except RuntimeError as error:
        pytest.skip(str(error))


def tensors(device: str, dtype: torch.dtype, tokens_first: bool = False, dim: int = DIM) -> Tensors:
    """Query, key and value, in the memory of SD3 (heads before tokens) or of FLUX (tokens before heads)."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, BATCH, TEXT + IMAGE, HEADS, dim) if tokens_first else (3, BATCH, HEADS, TEXT + IMAGE, dim)
    made = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    query, key, value = made.transpose(2, 3) if tokens_first else made
    return query, key, value


def factor_of(*rows: float, like: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(rows, dtype=dtype, device=like.device)[:, None, None]


def parts(text_first: bool) -> tuple[slice, slice]:
    if text_first:
        return slice(0, TEXT), slice(TEXT, TEXT + IMAGE)
    return slice(IMAGE, IMAGE + TEXT), slice(0, IMAGE)


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, text: slice, image: slice, factor):
    query, key, value, factor = (x.double().cpu() for x in (query, key, value, factor))
    weights = torch.exp(query @ key.mT / query.shape[-1] ** 0.5)
    more = torch.ones_like(factor[..., None]).repeat(1, 1, *weights.shape[2:])
    more[:, :, image, text] = factor[..., None]
    weights = weights * more
    return weights @ value / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("factors", [[1.3], [0.0], [1.0], [40.0], [0.0, 2.5]])
def test_is_the_softmax_with_more_weight_on_the_text(kernel, text_first, tokens_first, factors):
    device, dtype = kernel
    given, (text, image) = tensors(device, dtype, tokens_first), parts(text_first)
    factor = factor_of(*factors, like=given[0])
    out = weighted_attention(*given, text, image, factor, None)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double().cpu(), written_out(*given, text, image, factor), rtol=0, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dim", [12, 128])
def test_any_size_of_a_head(kernel, dim):
    device, dtype = kernel
    given, (text, image) = tensors(device, dtype, dim=dim), parts(True)
    factor = factor_of(1.7, like=given[0])
    skip_unless_it_runs(given)
    out = weighted_attention(*given, text, image, factor, None)
    torch.testing.assert_close(
        out.double().cpu(), written_out(*given, text, image, factor), rtol=0, atol=TOLERANCE[dtype]
    )


def test_no_weight_is_no_text(kernel):
    """Not a bit of what the image hears depends on a text of weight 0."""
    device, dtype = kernel
    (query, key, value), (text, image) = tensors(device, dtype), parts(False)
    silent = torch.zeros(1, 1, 1, device=device)
    first = weighted_attention(query, key, value, text, image, silent, None)
    key, value = key.clone(), value.clone()
    key[:, :, text] *= -3
    value[:, :, text] += 100
    second = weighted_attention(query, key, value, text, image, silent, None)
    assert torch.equal(first[:, :, image], second[:, :, image])
    assert not torch.equal(first[:, :, text], second[:, :, text])


def stand_in(factor: torch.Tensor, text_keys="last") -> ScaledAttention:
    scaled = ScaledAttention(nn.Identity(), text_keys, None, None, factor)
    scaled.text_tokens = TEXT
    return scaled


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text_keys", ["first", "last"])
@pytest.mark.parametrize("factor", [0.0, 0.25, 2.0])
def test_merged_and_masked_agree(device, dtype, text_keys, factor):
    """A factor for each token takes the mask."""
    given = tensors(device, dtype)
    merged = stand_in(torch.full((1, 1, 1), factor), text_keys).attend(*given)
    masked = stand_in(torch.full((1, TEXT, 1), factor), text_keys).attend(*given)
    torch.testing.assert_close(merged, masked, rtol=0, atol=TOLERANCE[dtype])


def test_gradients_are_those_of_the_mask():
    query, key, value = (x.requires_grad_() for x in tensors("cpu", torch.float64))
    (text, image), factor = parts(False), torch.full((1, 1, 1), 1.7, dtype=torch.float64)
    out = stand_in(factor).attend(query, key, value)
    torch.testing.assert_close(out, written_out(query, key, value, text, image, factor))
    found = torch.autograd.grad(out.square().sum(), (query, key, value))
    expected = torch.autograd.grad(
        written_out(query, key, value, text, image, factor).square().sum(), (query, key, value)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tokens_first", [True, False])
def test_the_graph_knows_the_layout(kernel, tokens_first):
    query, key, value = tensors(*kernel, tokens_first)
    text, image = parts(True)
    given = (query[:, :, image], key[:, :, text], value[:, :, text], None)
    torch.library.opcheck(_traced, given, test_utils=("test_schema", "test_faketensor"))
    faked, real = _traced(*(x if x is None else x.to("meta") for x in given)), _traced(*given)
    for fake, made in zip(faked, real, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (made.shape, made.stride(), made.dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.filterwarnings("default")
def test_compiled_is_one_graph(device, tokens_first):
    torch._dynamo.reset()
    given, (text, image) = tensors(device, torch.float32, tokens_first), parts(True)
    factor = torch.full((1, 1, 1), 1.7, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(weighted_attention, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(*given, text, image, factor, None), weighted_attention(*given, text, image, factor, None)
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("factor", [0.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keys_are_scaled_in_place_and_expanded_or_learning_ones_are_not(factor, dtype):
    (_, key, _), (text, _) = tensors("cpu", dtype), parts(True)
    factors, before = torch.full((1, 1, 1), factor, dtype=torch.float64), key.clone()
    learning = _with_scaled(key.clone().requires_grad_(), text, factors)
    assert learning.requires_grad
    expanded = key[:, :1].expand(-1, HEADS, -1, -1)
    scaled = _with_scaled(expanded, text, factors)
    assert torch.equal(key, before)
    assert torch.equal(scaled[:, 0], learning[:, 0])
    assert torch.equal(scaled[:, 0], scaled[:, 1])
    assert _with_scaled(key, text, factors) is key
    assert torch.equal(key, learning)
    assert torch.equal(key[:, :, text], (before[:, :, text].double() * factor).to(dtype) + 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_that_serves_as_key_and_value_is_scaled_as_two(dtype):
    (query, both, _), (text, _) = tensors("cpu", dtype), parts(True)
    factors = [torch.full((1, 1, 1), factor) for factor in (1.5, 2.0)]
    seen = []
    for value in (both.clone(), None):
        scaled = ScaledAttention(nn.Identity(), "first", *factors, None)
        scaled.text_tokens = text.stop
        key = both.clone()
        seen.append(scaled.attend(query, key, key if value is None else value))
    assert torch.equal(*seen)
