"""`--compile`: under DDP, so that what DDP adds can still be left out."""

import copy
import datetime
import multiprocessing
import os
import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from packaging.version import Version
from torch.nn.parallel import DistributedDataParallel

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training import Run, allow_tf32, train_step
from effnet_hf.training.compilation import compile_model, require_compiler
from effnet_hf.training.loop import validate

from ..gpu_device import DEVICE, REHEARSAL


# Dynamo hides it from users by another way than a filter.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager_backend(monkeypatch):
    """Dynamo without a code generator: seconds instead of minutes, and the same wrapping."""
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, dynamic, mode: compile_in_place(self, dynamic=dynamic, backend="eager")
    )


@pytest.mark.parametrize("mode", ["full", "blocks"])
def test_the_model_stays_itself(mode, tiny_config, eager_backend):
    model = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.0, survival_prob=1.0)).train()
    plain = copy.deepcopy(model)
    names = list(model.state_dict())
    compile_model(model, mode)
    assert type(model) is EfficientNetNVForImageClassification and list(model.state_dict()) == names
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    losses = []
    for network in (model, plain):
        loss = network(pixel_values=pixels, labels=labels).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for own, expected in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "blocks"])
def test_what_is_compiled_is_called_compiled(mode, tiny_config, eager_backend):
    """In training through DDP's forward pass, in validation not through DDP."""
    model = EfficientNetNVForImageClassification(tiny_config())
    compile_model(model, mode)
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        model.eval()(pixel_values=torch.randn(2, 3, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 20


def test_cuda_graphs_are_refused_without_a_gpu():
    with pytest.raises(UserError, match="--compile graphs records CUDA graphs and needs a GPU"):
        require_compiler("graphs", "cpu")


def test_compiling_deterministically_needs_a_torch_that_can(tiny_config, monkeypatch):
    from torch._inductor import config

    model = EfficientNetNVForImageClassification(tiny_config())
    if Version(torch.__version__) >= Version("2.10"):
        monkeypatch.setattr(config, "deterministic", False)
        compile_model(model, "full", deterministic=True)
        assert config.deterministic
    monkeypatch.setattr(torch._inductor, "config", object())  # as torch 2.9's, which has no such setting
    with pytest.raises(UserError, match="needs torch 2.10 or newer"):
        compile_model(model, "full", deterministic=True)


def _rank(rank: int, port: int, make_config, mode: str) -> None:
    """Trains a step and validates through the loop's own functions; rank 1 has no validation batch."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    from accelerate.utils import InitProcessGroupKwargs

    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=60))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[timeout], gradient_accumulation_steps=2)
    torch.manual_seed(0)
    bare = EfficientNetNVForImageClassification(make_config)
    for part in [bare] if mode == "full" else bare.efficientnet.encoder.stages:
        part.compile(backend="eager", dynamic=False)
    model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.01))

    class Batches:
        def epoch(self, _):
            for _ in range(1 - rank):
                yield {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(5, (4,))}

    for _ in range(2):  # validation in between: accumulation must still leave out DDP's reduction afterwards
        model.train()
        for _ in range(2):
            with accelerator.accumulate(model):
                model(pixel_values=torch.randn(4, 3, 32, 32)).logits.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert validate(bare, Batches(), accelerator)["n"] == 4
    assert isinstance(model, DistributedDataParallel) and hasattr(model, "no_sync")
    torch.distributed.destroy_process_group()


# `blocks` goes the same way through DDP and compiles half as long.
@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "blocks"])
def test_a_rank_without_a_validation_batch_holds_nobody_up(mode, tiny_config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has imported everything already. On a GPU backward passes have threads, and then no fork may make one.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    config = tiny_config(num_block_repeats=[1, 1, 2])
    ranks = [context.Process(target=_rank, args=(rank, port, config, mode)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0, 0]


def _losses_of_six_steps(config, device: str, mode: str, accumulation: int) -> tuple[list[float], dict]:
    """Through the loop's own step, with a validation in the middle, in fp32 without TF32."""
    torch.manual_seed(0)
    bare = EfficientNetNVForImageClassification(config).to(device)
    compile_model(bare, mode)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", gradient_accumulation_steps=accumulation)
    allow_tf32(False)
    optimizer = torch.optim.RMSprop(bare.parameters(), lr=0.001, momentum=0.9, eps=0.01, foreach=True)
    run = SimpleNamespace(
        recipe=Recipe(compile=mode), accelerator=accelerator, bare_model=bare, teacher=None,
        plan=SimpleNamespace(accumulation_steps=accumulation),
    )  # fmt: skip
    run.keeps_gradients = Run.keeps_gradients.fget(run)
    if run.keeps_gradients:
        for parameter in bare.parameters():
            parameter.grad = torch.zeros_like(parameter)
    run.model, run.optimizer = accelerator.prepare(bare, optimizer)
    generator = torch.Generator().manual_seed(1)

    def batch(size: int) -> dict:
        pixels = torch.randn(size, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        return {"pixel_values": pixels.to(device), "labels": labels.to(device)}

    losses = []
    for step in range(6):
        bare.train()
        losses += [train_step(run, batch(8)).item() for _ in range(accumulation)]
        if step == 2:
            loader = SimpleNamespace(epoch=lambda _: iter([batch(8), batch(8), batch(3)]))
            losses.append(validate(bare, loader, accelerator)["loss"])
    return losses, {name: tensor.cpu() for name, tensor in bare.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", ["full", "graphs", "blocks"])
def test_on_a_gpu_each_mode_trains_as_eager_does(mode, accumulation, tiny_config):
    """Replayed CUDA graphs lend their memory out again: sums of gradients over micro-batches are what could break."""
    config = tiny_config(survival_prob=1.0, dropout_rate=0.0)
    expected, right = _losses_of_six_steps(config, DEVICE, "none", accumulation)
    measured, mine = _losses_of_six_steps(config, DEVICE, "full" if REHEARSAL else mode, accumulation)
    assert measured == pytest.approx(expected, rel=2e-3)
    for name, tensor in right.items():
        torch.testing.assert_close(mine[name], tensor, rtol=2e-2, atol=2e-3, msg=name)
