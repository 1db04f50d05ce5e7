"""What of a tensor is copied, and whether it was written to since."""

from __future__ import annotations

import pytest
import torch

from ds_activation.copy_state import TOUCHED, dense_part, untouched, version_of
from ds_core.errors import EngineError


@pytest.mark.parametrize(
    ("tensor", "shape", "stride"),
    [
        (torch.empty(2, 3), (2, 3), (3, 1)),
        (torch.empty(2, 3).t(), (3, 2), (1, 3)),
        (torch.empty(4, 6)[:, ::2], (4, 3), (3, 1)),
        (torch.empty(3, 1).expand(2, 3, 4), (1, 3, 1), None),
        (torch.empty(()), (), ()),
    ],
)
def test_what_is_copied_has_no_gaps_and_no_repeats(
    tensor: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None
) -> None:
    found = dense_part(tensor)
    assert found.shape == shape
    assert stride is None or found.stride() == stride
    assert found.stride() == torch.empty_like(found, device="meta").stride()


def test_memory_without_gaps_is_not_copied_for_it() -> None:
    given = torch.empty(2, 3).t()
    assert dense_part(given).data_ptr() == given.data_ptr()


def test_writing_to_it_or_to_a_view_of_it_is_noticed() -> None:
    tensor = torch.zeros(4)
    kept, version = tensor.detach(), version_of(tensor)
    assert untouched(kept, version).data_ptr() == tensor.data_ptr()
    tensor[1:].add_(1)
    with pytest.raises(EngineError, match="modified in place"):
        untouched(kept, version)
    assert version_of(kept) != TOUCHED


def test_in_inference_mode_writing_is_not_counted() -> None:
    with torch.inference_mode():
        assert version_of(torch.zeros(1)) is None
