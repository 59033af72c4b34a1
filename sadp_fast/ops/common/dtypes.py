"""The floating types that kernels read and write; their arithmetic is float32.

One of another size than 2 or 4 bytes needs entries in ``ops/lif/configuration.py``, too.
"""

import torch

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
