"""FlashAttention of others on CUDA, each on request: `torch_varlen` (2, in PyTorch), `fa3`, `fa4`.

They keep less than the contract. A row's bits may depend on its batch and, in the backward, differ between two runs;
what a neighbour holds, NaN say, may reach a row where tiles cross its border; offsets that are wrong may make them leave
their buffers; and they need the longest length on the host, which waits for the device where it is not known. So none is
ever chosen: ``implementation="fa4"`` is how to have it.
"""
