"""What a model is wrapped in: activation checkpointing, then compilation, then FSDP2 sharding. Set up here and nowhere
else.

Sharding happens on the meta device, before there are weights: `hf_weights.load_weights` then reads each rank's rows
from the files, so no rank ever holds the whole model. Everything enters through the root's `forward`, where the head's
weight is gathered like any other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.errors import ConfigError
from trainer.models.decoder import Decoder

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def recompute_activations(model: Decoder, how: str) -> None:
    """Let blocks forget their activations and compute them again in the backward pass.

    how: "none"; "full", every block; "every_K", each K-th block; "selective", every block, but the results of matrix
    products at most as wide as the model are kept (queries, keys, values, both projections back), so that attention,
    norms and the wide products of the MLP are done again.
    """
    each = {"none": 0, "full": 1, "selective": 1}.get(how) if not how.startswith("every_") else int(how[6:])
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "selective":
        keep = partial(_keep_narrow_products, width=model.config.hidden_size)
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, keep))
    for index, block in enumerate(model.layers):
        block.recompute = again if each and index % each == 0 else None


def _keep_narrow_products(context: object, operator: object, *args: Tensor, width: int, **options: object):
    narrow = operator in PRODUCTS and args[-1].shape[-1] <= width
    return CheckpointPolicy.MUST_SAVE if narrow else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: Decoder) -> None:
    """Let torch.compile fuse what a block does beside attention: the same programs for all blocks and any length.

    Attention runs as it is: each stream has other products in it, and each would be compiled anew. With activation
    checkpointing, compiled code is what runs again.
    """

    class Uncompiled:  # always the same code to the compiler, whatever the stream
        def __init__(self, function: Callable[..., Tensor]) -> None:
            self.function = function

        @torch.compiler.disable
        def __call__(self, *arguments: Tensor) -> Tensor:
            return self.function(*arguments)

    def leave_attention_alone(block: Module, arguments: tuple[Any, ...]) -> None:
        shared = arguments[-1]  # what all blocks have in common, made for this stream
        shared.attend = {window: Uncompiled(attend) for window, attend in shared.attend.items()}

    for block in model.layers:
        block._run = torch.compile(block._run, dynamic=True)
    model.layers[0].register_forward_pre_hook(leave_attention_alone)


def check_compiler(device: torch.device) -> None:
    """Compile something small. Raises ConfigError where this machine has nothing to do it with."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler's absence is to PyTorch, to Triton or to Python's headers
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ConfigError("train.compile", True, f"nothing can be compiled here ({reason}); leave it out") from None


def shard(
    model: Decoder,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    cpu_offload: bool = False,
) -> None:
    """Shard every block, and the embedding, last norm and heads with the root, by rows over the mesh's last dimension.

    Weights are gathered in `compute_dtype`; gradients are reduced in float32 and averaged over the ranks. Embedding and
    head stay in one group, because they may be one tensor.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    if cpu_offload:  # FSDP2 wants them there from the start
        model.to_empty(device="cpu")
