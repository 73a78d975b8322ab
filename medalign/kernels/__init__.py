"""The two tensor operations of the distillation losses, each with a readable reference and faster implementations.

Each operation is a folder. `reference.py` is the specification; `chunked.py` computes the same on any device, in memory
linear in the tokens; `triton.py` launches the GPU kernels of `triton_kernels.py`, with the tile sizes of
`tile_table.json`. `dispatch.py` selects the implementation. Benchmarks and tuning are in `medalign.benchmark.kernels`.
"""

from medalign.kernels.attention_map import attention_map
from medalign.kernels.token_similarity import token_similarity

__all__ = ["attention_map", "token_similarity"]
