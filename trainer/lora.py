"""Low-rank adapters on a frozen base: y = W x + s B A x in place of chosen linear layers (Hu et al. 2021).

A layer keeps its weight under its old name and gains `lora_A` and `lora_B`; with DoRA (Liu et al. 2024, section 4)
also a length for each row of W + s B A. Only these train. A layer computes with the adapter as it is, as it was when
this run started, or not at all (`adapters`): that is how one model in memory is policy and reference. Files are
`trainer.lora_files`, packed bases `trainer.quantised`.
Letters: T tokens, I inner width (columns of W), O outer width (rows of W), r rank, s scaling.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.reference import compute_dtype
from trainer.errors import ConfigError
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import hf_name
from trainer.parts import is_sharded, part_of
from trainer.quantised import PackedWeight, QuantisedLinear, packed_linear

ALL_LINEAR = "all-linear"
State = Literal["trained", "start", "off"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What an adapter is, besides its numbers. Names are those of PEFT's `LoraConfig`."""

    r: int
    alpha: float
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Endings of layer names, or one text: `all-linear`, else a regular expression for the whole name."""
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scaling(self) -> float:
        """s: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Dropout:
    """Which numbers every layer drops in this micro-batch; a pure function of what `begin` was given last.

    So a resumed run drops the same ones, and a block that is computed again in the backward pass as well.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.key = ""

    def begin(self, *key: int) -> None:
        """key: seed, step, micro-batch and rank."""
        self.key = " ".join(map(str, key))


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter. `weight`, or `packed` in its place, is the frozen part."""

    def __init__(
        self, base: nn.Linear, name: str, settings: LoraSettings, dropout: Dropout, dtype: torch.dtype
    ) -> None:
        """base: the layer to replace, whose parameters are taken over. name: its own, for random numbers."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.name, self.settings, self.dropout = name, settings, dropout
        self.state: State = "trained"
        self.in_place = True
        """Add the adapter to the base's product in its memory. Not allowed where that product is kept for later."""
        self.weight, self.bias = base.weight, base.bias
        self.packed: PackedWeight | None = base.packed if isinstance(base, QuantisedLinear) else None
        self.requires_grad_(False)
        device = base.bias.device if base.weight is None and base.bias is not None else "meta"
        device = device if base.weight is None else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(settings.r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, settings.r, dtype=dtype, device=device))
        if settings.use_dora:
            # the trained length is start_lengths + this: rounded to bf16, a length itself would be off by 0.4 %
            self.lora_magnitude_change = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        # DoRA: (O,) float32 lengths that this run started from (of the base's rows, where the adapter is new), and the
        # squares of the base's row lengths; buffers, so that they move with the model
        self.register_buffer("start_lengths", None, persistent=False)
        self.register_buffer("row_squares", None, persistent=False)

    def keep_start(self, dtype: torch.dtype) -> None:
        """Make room for frozen copies of A and B as the run starts from them, for the state "start"."""
        self.start_A = nn.Parameter(torch.empty_like(self.lora_A, dtype=dtype), requires_grad=False)
        self.start_B = nn.Parameter(torch.empty_like(self.lora_B, dtype=dtype), requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        if self.state == "off":
            return self._base(x_TI, self.bias)
        s, dora = self.settings.scaling, self.settings.use_dora
        start = self.state == "start"
        A_rI, B_Or = (self.start_A, self.start_B) if start else (self.lora_A, self.lora_B)
        low_Tr = self._low(x_TI, A_rI) * s
        y_TO = self._base(x_TI, None if dora else self.bias)
        y_TO = y_TO.addmm_(low_Tr, B_Or.T) if self.in_place else torch.addmm(y_TO, low_Tr, B_Or.T)
        if not dora:
            return y_TO
        now_O = self._lengths(A_rI, B_Or)
        wanted_O = self.start_lengths if start else self.start_lengths + self.lora_magnitude_change.to(now_O.dtype)
        y_TO = y_TO * (wanted_O / now_O).to(y_TO.dtype)
        return y_TO if self.bias is None else y_TO + self.bias

    def _base(self, x_TI: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is not None:
            return packed_linear(x_TI, self.packed, bias)
        return F.linear(x_TI, self.weight, bias)

    def _low(self, x_TI: Tensor, A_rI: Tensor) -> Tensor:
        """A x, with x's numbers dropped while training."""
        if self.dropout.rate == 0 or not self.dropout.key or not torch.is_grad_enabled() or self.state != "trained":
            return x_TI @ A_rI.T
        return _DroppedProduct.apply(x_TI, A_rI, self.dropout.rate, _seed(self.dropout.key, self.name))

    @torch.no_grad()
    def _lengths(self, A_rI: Tensor, B_Or: Tensor) -> Tensor:
        """(O,) float32 (float64) lengths of the rows of W + s B A, a constant to the gradient (section 4.3).

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) . b + s^2 b A A^T b, so no second (O, I) matrix is made.
        """
        s, weight, wide = self.settings.scaling, self._whole_weight(), compute_dtype(A_rI.dtype)
        if self.row_squares is None:  # whole rows are there in a forward pass only
            self.row_squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        if self.start_lengths is None:
            self.start_lengths = self.row_squares.sqrt()
        A, B = A_rI.to(wide), B_Or.to(wide)
        mixed_O = ((weight @ A_rI.T).to(wide) * B).sum(1)
        own_O = ((B @ (A @ A.T)) * B).sum(1)
        return (self.row_squares + 2 * s * mixed_O + s * s * own_O).clamp_min(0).sqrt()

    def _whole_weight(self) -> Tensor:
        return self.weight.detach() if self.packed is None else self.packed.dequantise(self.lora_A.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.settings.r}"


class _DroppedProduct(torch.autograd.Function):
    """(x (T, I), A (r, I), rate, seed) -> dropout(x) @ A.T. The dropped x is made again in the backward: layers that
    share an input keep it once, not once each beside their masks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, rate: float, seed: int) -> Tensor:
        ctx.save_for_backward(x, A)
        ctx.rate, ctx.seed = rate, seed
        return (x * _kept(x, rate, seed)) @ A.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A = ctx.saved_tensors
        kept = _kept(x, ctx.rate, ctx.seed)
        by_x = (grad @ A) * kept if ctx.needs_input_grad[0] else None
        return by_x, grad.T @ (x * kept) if ctx.needs_input_grad[1] else None, None, None


def _kept(x: Tensor, rate: float, seed: int) -> Tensor:
    """0 where dropped, else 1 / (1 - rate); shape and dtype of x."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - rate, generator=generator).mul_(1 / (1 - rate))


def _seed(*parts: object) -> int:
    """63 bits that follow from `parts`."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def layer_name(model: Decoder, name: str) -> str:
    """A module's name as Hugging Face writes it."""
    return hf_name(f"{name}.weight").removesuffix(".weight")


def block_linears(model: Decoder) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by their names in the decoder; the head is none of them."""
    return {name: module for name, module in model.named_modules() if _is_block_linear(name, module)}


def _is_block_linear(name: str, module: nn.Module) -> bool:
    return name.startswith("layers.") and isinstance(module, nn.Linear)


def chosen_layers(model: Decoder, target_modules: str | tuple[str, ...]) -> list[str]:
    """Names in the decoder of the layers that `target_modules` means. Raises ConfigError where one means none."""
    key, known = "lora.target_modules", list(block_linears(model))
    if target_modules in (ALL_LINEAR, (ALL_LINEAR,)):
        return known
    if isinstance(target_modules, str):
        try:
            found = [name for name in known if re.fullmatch(target_modules, layer_name(model, name))]
        except re.error as error:
            raise ConfigError(key, target_modules, f"is not a regular expression ({error})") from None
        if not found:
            raise ConfigError(key, target_modules, f"fits no linear layer; there are {_endings(known)}")
        return found
    for target in target_modules:
        if not any(_ends_with(layer_name(model, name), target) for name in known):
            problem = f"'{target}' is no linear layer of a block; there are {_endings(known)}, or {ALL_LINEAR}"
            raise ConfigError(key, target_modules, problem)
    return [name for name in known if any(_ends_with(layer_name(model, name), target) for target in target_modules)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _endings(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def add_lora(
    model: Decoder,
    settings: LoraSettings,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    keep_start: torch.dtype | None = None,
) -> list[str]:
    """Freeze `model` and put adapters without values on the layers that the settings choose; their names.

    dtype: of A and B. keep_start: the state "start" will be asked for and is not "off"; its copies have this dtype. The
    model may be on the meta device or loaded. Values come from `init_new` or `lora_files.load_adapter`. Raises
    ConfigError.
    """
    names = chosen_layers(model, settings.target_modules)
    model.requires_grad_(False)
    shared = Dropout(dropout)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = LoRALinear(getattr(owner, leaf), layer_name(model, name), settings, shared, dtype)
        if keep_start is not None:
            layer.keep_start(keep_start)
        setattr(owner, leaf, layer)
    return names


@torch.no_grad()
def init_new(model: nn.Module, seed: int, device: torch.device | str = "cpu") -> None:
    """Values of a new adapter: A uniform in +-1/sqrt(I) (as PEFT and nn.Linear have it), B zero, so that nothing is
    added yet. They follow from the seed and the layer's name alone, on any number of ranks."""
    for layer in lora_layers(model):
        generator = torch.Generator().manual_seed(_seed("lora_A", seed, layer.name))
        bound = layer.in_features**-0.5
        values = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        put(layer, "lora_A", values, device)
        put(layer, "lora_B", torch.zeros(layer.lora_B.shape), device)
        if layer.settings.use_dora:
            put(layer, "lora_magnitude_change", torch.zeros(layer.out_features), device)


def put(layer: nn.Module, name: str, values: Tensor, device: torch.device | str = "cpu") -> None:
    """Write whole `values` into a parameter: this rank's rows of a sharded one, a new one where it has no memory."""
    parameter = getattr(layer, name)
    assert parameter.shape == values.shape, f"{name}: {tuple(values.shape)} for {tuple(parameter.shape)}"
    if is_sharded(parameter):
        part = part_of(name, parameter)
        part.tensor.copy_(values[part.start : part.start + len(part.tensor)])
    elif parameter.is_meta:
        values = values.to(device=device, dtype=parameter.dtype, copy=True)
        setattr(layer, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
    else:
        parameter.copy_(values)


@contextmanager
def adapters(model: nn.Module, state: State) -> Iterator[None]:
    """Compute with the adapters in this state meanwhile: as trained, as the run started from them, or off."""
    layers = lora_layers(model)
    before = [layer.state for layer in layers]
    try:
        for layer in layers:
            layer.state = state
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.state = old


def merged_weight(
    weight: Tensor, A_rI: Tensor, B_Or: Tensor, lengths_O: Tensor | None, settings: LoraSettings
) -> Tensor:
    """The one weight, float32 (O, I), that computes what base and adapter do; lengths_O: DoRA's, of the merged rows."""
    merged = torch.addmm(weight.float(), B_Or.float(), A_rI.float(), alpha=settings.scaling)
    if lengths_O is None:
        return merged
    return merged * (lengths_O.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
