"""What safetensors' floating-point dtype codes are in torch."""

from __future__ import annotations

import torch

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
