import gc

import numpy as np
import pytest

from pretrain.data.loader import ReusedMemory


def test_memory_comes_again_when_the_tensor_is_gone() -> None:
    memory = ReusedMemory()
    one = memory.tensor((4, 5), np.float32)
    place = one.data_ptr()
    del one
    gc.collect()
    other = memory.tensor((2, 10), np.float32)
    assert other.data_ptr() == place
    assert other.shape == (2, 10)
    assert memory.tensor((20,), np.float32).data_ptr() != place


@pytest.mark.parametrize("kind", ["row", "transposed", "array", "reshaped array", "detached"])
def test_whoever_holds_a_part_holds_it_all(kind: str) -> None:
    memory = ReusedMemory()
    tensor = memory.tensor((6, 4), np.uint8).fill_(7)
    part = {
        "row": lambda: tensor[2],
        "transposed": lambda: tensor.t(),
        "array": lambda: tensor.numpy(),
        "reshaped array": lambda: tensor.numpy().reshape(3, 8)[1:],
        "detached": lambda: tensor.detach().view(-1)[3:],
    }[kind]()
    del tensor
    gc.collect()
    memory.tensor((6, 4), np.uint8).fill_(9)
    assert (np.asarray(part) == 7).all()


def test_other_sizes_get_other_memory_and_little_is_kept() -> None:
    memory = ReusedMemory()
    tensors = [memory.tensor((size,), np.uint8).fill_(size) for size in range(1, 20)]
    for size, tensor in enumerate(tensors, start=1):
        assert tensor.tolist() == [size] * size
    del tensors, tensor
    gc.collect()
    assert len(memory._idle) == 4
