"""The model of the study, and the loss that all settings share.

Arithmetic is the same for every setting: fp32 activations and norms, matrix products on bf16
operands (autocast), as people train. What differs is what the optimizer stores. Its parameters are
those of `owned`: the working model's own where weights are fp32; where they are bf16, those of a
bf16 twin, from which the working model's are copied before every step (exactly: bf16 fits into
fp32) and to which the gradients go back, rounded to bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from amsf_dist import cast_model

__all__ = ["BATCH_SIZE", "SEQUENCE_LENGTH", "Trainee", "Working"]

SEQUENCE_LENGTH, BATCH_SIZE = 128, 16
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 320,  # 256 bytes, the end of a page, rounded up to a multiple of 64
    "max_position_embeddings": SEQUENCE_LENGTH,
    # bf16 products in plain sight: on a CPU several times faster than torch's fused attention
    "attn_implementation": "eager",
}


class Working:
    """The model that computes; built once a process, so that it is compiled once."""

    def __init__(self, device: str, compiled: bool) -> None:
        """Build it; its weights are drawn by `Trainee`."""
        self.device = device
        self.model = LlamaForCausalLM(LlamaConfig(**_SHAPE)).to(device)
        self.losses: Callable[[Tensor], Tensor] = self._losses
        if compiled:
            self.losses = torch.compile(self._losses)

    def _losses(self, windows: Tensor) -> Tensor:
        """[batch, length + 1] token numbers -> [batch, length] nats per byte."""
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none"
        )
        return losses.view(windows.shape[0], -1)


class Trainee:
    """The weights of one run."""

    def __init__(self, working: Working, weights: str, seed: int) -> None:
        """Draw the weights of a seed, the same for every setting.

        Args:
            working: its weights are overwritten.
            weights: "fp32" or "bf16", of the parameters that the optimizer sees.
            seed: of the weights.

        Raises:
            ValueError: for other weights.
        """
        if weights not in ("fp32", "bf16"):
            raise ValueError(f"weights must be 'fp32' or 'bf16', got {weights!r}")
        self._working = working
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = LlamaForCausalLM(LlamaConfig(**_SHAPE))
        working.model.load_state_dict(drawn.state_dict())
        self.owned: nn.Module = working.model
        if weights == "bf16":
            self.owned = cast_model(copy.deepcopy(working.model), torch.bfloat16)
        for model in (working.model, self.owned):
            model.zero_grad(set_to_none=True)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(param.numel() for param in self.owned.parameters())

    def losses(self, windows: Tensor) -> Tensor:
        """[batch, length + 1] -> [batch, length] nats per byte at the owned weights."""
        if self.owned is not self._working.model:
            with torch.no_grad():
                for here, there in self._pairs():
                    there.copy_(here)
        return self._working.losses(windows.to(self._working.device))

    def backward(self, windows: Tensor) -> float:
        """Give the owned parameters the gradient of the mean loss, and return that loss."""
        loss = self.losses(windows).mean()
        loss.backward()
        if self.owned is not self._working.model:
            for here, there in self._pairs():
                here.grad = there.grad.to(here.dtype)
                there.grad = None
        return float(loss.detach())

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.owned.parameters(), self._working.model.parameters(), strict=True))
