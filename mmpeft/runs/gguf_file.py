"""The end of every GGUF file that is written here: its tensors, in float32."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def finish_gguf(writer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Adds the tensors to a `GGUFWriter` that has its fields, writes the file and closes it."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
