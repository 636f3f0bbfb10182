"""The experts of Qwen3-VL-MoE for torch, over the kernels that JAX calls too: a module that replaces transformers'."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from kernels_cuda import library, torch_binding


class KernelExperts(nn.Module):
    """SwiGLU experts: each token's chosen ones, weighted and added, no token dropped.

    Rows go in order of experts, gate and up are one grouped product, the weights join the SwiGLU (what follows is
    linear), down is the second. Sizes of groups stay on the device. CPU tensors run on the CPU library, CUDA tensors
    on the CUDA one; float32 or bfloat16.

    Attributes:
      gate_up_proj: [experts, 2 intermediate, hidden], gate first: transformers' layout, read as it lies.
      down_proj: [experts, hidden, intermediate].

    Raises:
      RuntimeError: when called where the library of the tensors' device is missing; it says how to build it.
    """

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter):
        super().__init__()
        experts, twice, hidden = gate_up_proj.shape
        if twice % 2 or tuple(down_proj.shape) != (experts, hidden, twice // 2):
            raise ValueError(
                "KernelExperts takes gate_up_proj [E, 2 I, H] and down_proj [E, H, I]; got "
                f"{list(gate_up_proj.shape)} and {list(down_proj.shape)}"
            )
        self.num_experts = experts
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] give [T, H].

        An index of `num_experts` means none, as in transformers' expert parallelism.
        """
        tokens, choices = top_k_index.shape
        expert = top_k_index.reshape(-1)
        order = torch.argsort(expert, stable=True)
        back = torch.argsort(order).to(torch.int32).reshape(tokens, choices)
        # Not bincount, which waits for the GPU.
        sizes = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=expert.device)
        sizes = sizes.index_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))[: self.num_experts]
        rows = torch_binding.permute(hidden_states, (order // choices).to(torch.int32), back)
        gate_up = torch_binding.gmm_t(rows, self.gate_up_proj, sizes)
        weighed = torch_binding.swiglu(gate_up, top_k_weights.reshape(-1)[order].float())
        return torch_binding.unpermute(torch_binding.gmm_t(weighed, self.down_proj, sizes), back)


def use_kernels(model: nn.Module) -> int:
    """Puts `KernelExperts` in place of transformers' experts, all through a loaded model.

    Parameters stay the same objects under the same names: optimizers, state dicts and `save_pretrained` see no change.

    Returns:
      how many modules were replaced.

    Raises:
      ValueError: where the model has none, or an activation other than SiLU.
      RuntimeError: where the library of the model's device is missing; it says how to build it.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Qwen3VLMoeTextExperts)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no Qwen3VLMoeTextExperts; load a Qwen3-VL-MoE with transformers")
    if any(not isinstance(child.act_fn, type(ACT2FN["silu"])) for _, _, child in found):
        raise ValueError("the experts' activation is not SiLU, which is what the kernels compute")
    backend = "cuda" if found[0][2].gate_up_proj.is_cuda else "cpu"
    if problem := library.load(backend).problem:
        raise RuntimeError(f"the kernels of {backend!r} are {problem}")
    for parent, name, child in found:
        setattr(parent, name, KernelExperts(child.gate_up_proj, child.down_proj))
    return len(found)
