"""The floating types that kernels read and write; their arithmetic is float32."""

import torch

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
