"""Layers that an engine runs, in compiled and exported models: the graph takes the layer as an input."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import WAYS, change_scale
from torch import nn

from diffusers_msfp.engines import ENGINES
from diffusers_msfp.engines.compiled import run_layer
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.layers import QUANT_LAYERS, QuantLayer
from diffusers_msfp.schemes import SCHEMES


class Block(nn.Module):
    """A quantized layer that an engine has made ready, and something for a compiler to do."""

    def __init__(self, seed: int, channels: int = 8, engine: str = "int8") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = QUANT_LAYERS[nn.Conv2d].from_float(
            nn.Conv2d(8, channels, 3, padding=1), "place", SCHEMES["w4a4"].inner
        )
        with torch.no_grad():
            self.layer(images())
        self.layer.freeze()
        self.layer.use_engine(ENGINES[engine]())
        self.layer.prepare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 2


def images() -> torch.Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


class Compiler:
    """A backend of `torch.compile` that keeps its graphs as they are."""

    def __init__(self) -> None:
        self.graphs = []

    def __call__(self, graph: torch.fx.GraphModule, _inputs):
        self.graphs.append(graph)
        return graph

    def compiled(self, block: Block):
        return torch.compile(block, backend=self, fullgraph=True)


@pytest.fixture
def compiler() -> Compiler:
    torch._dynamo.reset()
    return Compiler()


@torch.no_grad()
def test_blocks_of_one_kind_share_a_graph_and_do_not_mix_up(compiler):
    """More blocks than dynamo compiles a function for; `compile_repeated_blocks` compiles each of a model's."""
    blocks = [Block(seed) for seed in range(12)]
    expected = [block(images()) for block in blocks]
    ready = [compiler.compiled(block) for block in blocks]
    for _ in range(2):
        for block, y in zip(ready, expected, strict=True):
            assert torch.equal(block(images()), y)
    assert len(compiler.graphs) == 1
    assert not any(torch.equal(expected[0], other) for other in expected[1:])


@torch.no_grad()
def test_layers_of_other_sizes_have_graphs_of_their_own(compiler):
    for channels in (8, 12):
        block = Block(0, channels)
        assert torch.equal(compiler.compiled(block)(images()), block(images()))
    assert len(compiler.graphs) == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compilers_take_it(backend):
    torch._dynamo.reset()
    block = Block(0)
    assert torch.equal(torch.compile(block, backend=backend, fullgraph=True)(images()), block(images()))


@torch.no_grad()
def test_a_layer_made_ready_anew_is_the_one_that_runs(compiler):
    block = Block(0)
    call = compiler.compiled(block)
    before = call(images())
    block.layer.store_input(block.layer.input_scale * 2, block.layer.input_zero_point)
    block.layer.prepare()
    assert torch.equal(call(images()), block(images()))
    assert not torch.equal(call(images()), before)
    assert len(compiler.graphs) == 1


@torch.no_grad()
def test_deep_copies_do_not_share(compiler):
    block = Block(0)
    call = compiler.compiled(block)
    expected = call(images())
    other = copy.deepcopy(block)
    other.layer.prepare()
    assert other.layer.prepared.layer is other.layer
    other.layer.store_input(other.layer.input_scale * 2, other.layer.input_zero_point)
    other.layer.prepare()
    assert torch.equal(compiler.compiled(other)(images()), other(images()))
    assert torch.equal(call(images()), expected)
    assert not torch.equal(other(images()), expected)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@torch.no_grad()
def test_a_copy_of_a_prepared_layer_refers_to_itself(make):
    prepared = Block(0).layer.prepared
    x, numbers = images(), (0, 0, None)
    again = make(prepared)
    assert again._reference.prepared() is again
    assert torch.equal(run_layer(x, again._reference, *numbers), run_layer(x, prepared._reference, *numbers))


@torch.no_grad()
def test_compiled_graphs_keep_no_layer(compiler):
    block = Block(0)
    call = compiler.compiled(block)
    call(images())
    layer, prepared = weakref.ref(block.layer), weakref.ref(block.layer.prepared)
    block.layer.changed()
    gc.collect()
    assert prepared() is None
    del block, call
    compiler.graphs.clear()
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_tensors_that_are_written_to_or_exchanged_reach_the_graph(compiler, way):
    block, expected = Block(0), Block(0)
    call = compiler.compiled(block)
    before = call(images())
    for layer in (block.layer, expected.layer):
        change_scale(layer, way)
    found = call(images())
    assert torch.equal(found, expected(images()))
    assert not torch.equal(found, before)
    assert len(compiler.graphs) == 1


class Twice(Block):
    """Calls its layer twice, as blocks with chunks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.layer(2 * x)


@torch.no_grad()
def test_written_tensors_of_a_layer_that_is_called_often(compiler):
    block, other = Twice(0), Twice(0)
    call = compiler.compiled(block)
    call(images())

    def called(_: int) -> torch.Tensor:
        with torch.no_grad():
            return call(images())

    for factor in (1.5, 0.5):
        for layer in (block.layer, other.layer):
            layer.weight_scale.mul_(factor)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(called, range(8)))
        assert all(torch.equal(each, other(images())) for each in found)


@torch.no_grad()
def test_whole_numbers_stay_whole_in_graphs_under_autocast(compiler):
    block = Block(0, engine="bf16")
    expected = block(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiler.compiled(block)(images())
    torch.testing.assert_close(found, expected.to(found.dtype))


@torch.no_grad()
def test_what_is_gone_is_an_error(compiler):
    block = Block(0)
    compiler.compiled(block)(images())
    reference = block.layer.prepared._reference
    copied = copy.deepcopy(reference)
    block.layer.changed()
    gc.collect()  # the first compilation of a process leaves cycles
    for stale in (reference, copied):
        with pytest.raises(UnsupportedError, match=r"of QuantConv2d\(8, 8, .* has been changed or freed since"):
            run_layer(images(), stale, 0, 0, None)


@torch.no_grad()
def test_threads_compile_and_run_their_own(compiler):
    blocks = [Block(seed) for seed in range(4)]
    expected = [block(images()) for block in blocks]

    def call(block: Block) -> torch.Tensor:
        with torch.no_grad():
            return compiler.compiled(block)(images())

    with ThreadPoolExecutor(len(blocks)) as pool:
        for _ in range(3):
            results = list(pool.map(call, blocks))
            assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("engine", ["int8", "bf16"])
@torch.no_grad()
def test_an_exported_program_stands_alone(engine):
    """It is run in other processes, where this one's layers are not: it holds the reference's operations."""
    block = Block(0, engine=engine)
    program = torch.export.export(block, (images(),))
    assert not [node for node in program.graph.nodes if "diffusers_msfp" in str(node.target)]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    block.layer.use_engine(None)
    assert torch.equal(torch.export.load(file).module()(images()), block(images()))


def test_no_reference_is_part_of_a_model():
    block = Block(0)
    assert isinstance(block.layer, QuantLayer)
    assert "prepared" not in pickle.loads(pickle.dumps(block)).layer.__dict__
