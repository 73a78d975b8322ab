"""The two tensor operations of the distillation losses, each with a readable specification and faster paths.

Each operation is a folder: `reference.py` is the specification, `chunked.py` does the same in linear memory on any
device, `triton.py` on a GPU. `dispatch.py` decides which one runs; `cases.py` tells the benchmark about it.
"""

from medalign.kernels.attention_map import attention_map
from medalign.kernels.token_similarity import token_similarity

__all__ = ["attention_map", "token_similarity"]
