"""Operators that the models and losses are built on: log-probabilities from hidden states, RMSNorm, SwiGLU and RoPE.

Each operator has its own module and a plain PyTorch definition in `reference.py`. Imports torch only; holds no model,
no config and no collective. Import from the modules: `from kernels.linear_logps import linear_logps`.
"""
