"""Batches leave data workers through blocks of shared memory that are used again: they arrive as they are, and stay."""

import gc
import os
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from vlm_taid.data.workers import DeafContext
from vlm_taid.streams import PairedBatch, blocks
from vlm_taid.streams import batch as batch_module
from vlm_taid.streams.blocks import ALIGNED, LARGE, Blocks, joining, received


def made(number: int) -> PairedBatch:
    """A batch whose two models read the same tensors, of every type and shape that there is."""
    generator = torch.Generator().manual_seed(number)
    with joining():
        pixels = torch.cat([torch.rand(5, LARGE // 16 + number, generator=generator) for _ in range(2)], dim=-1)
    inputs = {
        "input_ids": torch.arange(number * 7 + 1).view(1, -1),
        "pixel_values": pixels,
        "halves": torch.rand(3, 5, generator=generator).bfloat16().T,  # not contiguous
        "mask": torch.rand(9, generator=generator) > 0.5,
    }
    own = {"labels_N": torch.zeros(0, dtype=torch.long), "number": torch.tensor(number)}
    return PairedBatch(student=inputs, teacher=inputs, **own, refused=["a row"], num_rows=number)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return one == other


def collate(numbers: list[int]) -> PairedBatch:
    return made(numbers[0])


def loader(workers: int) -> DataLoader:
    rows: Any = list(range(24))
    return DataLoader(rows, 1, collate_fn=collate, num_workers=workers, multiprocessing_context=DeafContext())


@pytest.mark.parametrize("keep", [0, 1, 24])
def test_batches_arrive_as_they_are_and_stay_so_as_long_as_they_are_held(keep: int):
    held: list[PairedBatch] = []
    for number, batch in enumerate(loader(2)):
        held = [*held, batch][-keep:] if keep else []
        assert equal(batch, made(number))
        assert batch["student"] is batch["teacher"]
        assert type(batch) is PairedBatch
    assert all(equal(batch, made(batch["num_rows"])) for batch in held)


def test_a_tensor_outlives_its_batch():
    kept = [batch["student"]["pixel_values"][1:] for batch in loader(1)]
    assert all(equal(pixels, made(number)["student"]["pixel_values"][1:]) for number, pixels in enumerate(kept))


def sent(own: Blocks, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors as the other process has them."""
    messages, places = own.send(tensors)
    arrived = received(messages)
    return [arrived(places[id(tensor)]) for tensor in tensors]


def test_a_block_is_free_when_both_sides_have_dropped_its_tensors():
    own = Blocks()
    here = own.empty((3, 50), torch.float32).fill_(1.0)
    address = here.data_ptr()
    (there,) = sent(own, here)
    assert there.data_ptr() == address  # not copied
    del here
    assert own.empty((3, 50), torch.float32).data_ptr() != address
    part = there[1]
    del there
    assert own.empty((3, 50), torch.float32).data_ptr() != address
    del part
    assert own.empty((3, 50), torch.float32).data_ptr() == address


def test_nothing_waits_for_the_garbage_collector(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_module, "BLOCKS", own := Blocks())
    gc.disable()
    try:
        for number in range(4):
            arrive, arguments = made(number)._sent()
            assert equal(arrive(*arguments), made(number))
            del arguments
            assert not any(block[:2].any() for block in own._blocks)
    finally:
        gc.enable()
    assert len(own._blocks) == 1


def test_a_write_to_one_tensor_is_no_write_to_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_module, "BLOCKS", Blocks())
    arrive, arguments = made(1)._sent()
    inputs = arrive(*arguments)["student"]
    weight = torch.ones(inputs["pixel_values"].shape[1], requires_grad=True)
    loss = (inputs["pixel_values"] @ weight).sum()
    inputs["input_ids"][0, 0] = 5
    loss.backward()  # autograd has saved the pixels


def test_blocks_do_not_mind_the_mode_in_which_they_are_made_and_left():
    own = Blocks()
    with torch.inference_mode():
        here = own.empty((40,), torch.float32)
    there = sent(own, here)
    del here
    with FakeTensorMode():
        del there
    assert not own._blocks[0][:2].any()


def test_a_tensor_that_is_sent_twice_is_copied_the_second_time():
    own = Blocks()
    here = own.empty((40,), torch.float32).fill_(2.0)
    (first,), (second,) = sent(own, here), sent(own, here)
    assert first.data_ptr() == here.data_ptr() != second.data_ptr()
    address = second.data_ptr()
    del second
    assert own._take(40, 0).data_ptr() + ALIGNED == address  # the copy's block alone came back
    assert torch.equal(first, torch.full((40,), 2.0))


def test_a_block_that_is_too_small_makes_room():
    own = Blocks()
    for size in range(100, 5000, 100):
        own.empty((size,), torch.uint8)
    assert len(own._blocks) == 1


def test_a_fork_frees_nothing():
    own = Blocks()
    here = own.empty((40,), torch.float32)
    child = os.fork()
    if child == 0:
        del here
        os._exit(0)
    os.waitpid(child, 0)
    assert own._blocks[0][0] == 1
    assert here.data_ptr() != own.empty((40,), torch.float32).data_ptr()


def test_joined_tensors_are_what_torch_makes_of_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "get_worker_info", lambda: "a worker's")
    monkeypatch.setattr(blocks, "BLOCKS", own := Blocks())
    one, other = torch.rand(2, 3, LARGE // 16), torch.rand(2, 4, LARGE // 16)
    plain = [torch.cat([one, other], 1), torch.stack([one, one], dim=-1), torch.cat((one, one), dim=-2)]
    with joining():
        joined = [torch.cat([one, other], 1), torch.stack([one, one], dim=-1), torch.cat((one, one), dim=-2)]
        torch.cat([one[:, :, :9], one[:, :, :9]])  # small
        torch.stack([one.to(torch.uint8)] * 8)  # not of a floating type
        torch.cat([one, one.double()])  # of two types
        torch.cat(tensors=[one, one])
    assert all(map(torch.equal, plain, joined))
    assert len(own._blocks) == 3
    assert all(block[0] for block in own._blocks)
