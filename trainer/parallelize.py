"""What a model is wrapped in: activation checkpointing first, then FSDP2 sharding. Set up here and nowhere else.

Sharding happens on the meta device, before there are weights: `hf_weights.load_weights` then reads each rank's rows
from the files, so no rank ever holds the whole model. Everything enters through the root's `forward`, where the head's
weight is gathered like any other.
"""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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


def shard(
    model: Decoder,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    cpu_offload: bool = False,
) -> None:
    """Shard every block, and the embedding, last norm and head with the root, by rows over the mesh's last dimension.

    Weights are gathered in `compute_dtype`; gradients are reduced in float32 and averaged over the ranks. Embedding and
    head stay in one group, because they may be one tensor.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
