"""A packed weight gives the same product, and says nothing of its memory twice."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch.nn import functional as F

from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.workers.held_bytes import held_bytes
from drumline.workers.layers import Linear, ParallelMlp
from drumline.workers.layers.packing import pack_weight
from drumline.workers.models import Decoder, ModelBuild
from tests.checkpoints import Checkpoints
from tests.unit.workers.pieces import CPU, own_slots

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_linear_is_the_same_product(tokens: int, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight, bias = torch.randn(640, 512).to(dtype), torch.randn(640).to(dtype) if biased else None
    x = torch.randn(tokens, 512).to(dtype)
    layer = Linear(weight, bias)
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    layer.pack()
    assert layer.weight.is_meta, "nothing was packed"
    found = layer(x)
    assert (found.dtype, found.shape) == (dtype, (tokens, 640))
    # bfloat16 keeps 8 bits: half of the last one is lost in rounding the result, once.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=1e-4 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_wider_rows_is_multiplied_rightly(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    layer = Linear(torch.randn(640, 512).to(dtype))
    wide = torch.randn(5, 1024).to(dtype)
    expected = layer(wide[:, 256:768].contiguous())
    layer.pack()
    torch.testing.assert_close(layer(wide[:, 256:768]), expected, rtol=1e-2, atol=1e-4 if dtype == DTYPES[0] else 0.3)


def test_a_small_linear_and_another_dtype_are_left_as_they_are() -> None:
    layer = Linear(torch.randn(32, 16))
    layer.pack()
    assert layer.weight.device.type == "cpu"
    assert pack_weight(torch.randn(640, 512, dtype=torch.float64)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3-wide", "llama-wide", "deepseek-v3-wide"])
def test_packing_holds_no_byte_more_but_for_a_head_that_is_the_embedding_too(
    name: str, dtype: torch.dtype, checkpoints: Checkpoints
) -> None:
    small = ModelSpec.from_folder(checkpoints(name))
    spec = msgspec.structs.replace(small, hidden_size=512, intermediate_size=768, vocab_size=1000)
    layout = Layout()
    model = Decoder(ModelBuild(spec, layout, 0, own_slots(spec, layout), 64, dtype, CPU))
    before = held_bytes(model)
    model.finish_loading()
    assert model.head is not None
    assert model.head.linear.weight.is_meta
    assert isinstance(model.layers[0].mlp, ParallelMlp)
    assert model.layers[0].mlp.mlp.down.weight.is_meta
    # Rows are looked up in the one, the other is laid out for products: with tied embeddings there are two.
    second = spec.vocab_size * spec.hidden_size * dtype.itemsize if spec.tie_word_embeddings else 0
    assert held_bytes(model) == before + second
