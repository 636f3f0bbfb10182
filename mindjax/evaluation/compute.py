"""Counting the arithmetic of training, so that two ways of training can be given an equal budget.

Counted are the multiplications and additions of all matrix products on the shapes that are executed, padding
included, for that is what the machine works on. A backward pass counts as two forward passes where it reaches the
parameters and inputs, and as nothing where it is not run (the frozen vision encoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape, SampleSize
from mindjax.inference.sampler import prompt_shape


@dataclass(frozen=True)
class Compute:
    """FLOPs of one model, per forward pass.

    Attributes:
      model: shapes.
    """

    model: ModelConfig

    def text(self, rows: int, queries: int, keys: int) -> float:
        """The language model and its head on `rows` x `queries` places that attend to `keys` places each."""
        c = self.model.text
        attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        if c.num_experts:
            mlp = 3 * c.num_experts_per_tok * c.hidden_size * c.moe_intermediate_size + c.hidden_size * c.num_experts
        else:
            mlp = 3 * c.hidden_size * c.intermediate_size
        scores = 2 * keys * c.num_attention_heads * c.head_dim
        per_place = c.num_hidden_layers * (attention + mlp + scores) + c.hidden_size * c.vocab_size
        return 2.0 * rows * queries * per_place

    def vision(self, rows: int, length: int) -> float:
        """The vision encoder on `rows` patch rows of `length` patches."""
        c = self.model.vision
        merged = c.hidden_size * c.merge_unit
        block = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size + 2 * length * c.hidden_size
        mergers = (1 + len(c.deepstack_visual_indexes)) * (merged**2 + merged * c.out_hidden_size) / c.merge_unit
        return 2.0 * rows * length * (c.patch_dim * c.hidden_size + c.depth * block + mergers)

    def sft_step(self, shape: BatchShape, *, micro_batches: int = 1) -> float:
        """One update of all parameters: forward and backward of everything."""
        forward = self.text(shape.rows, shape.length, shape.length) + self.vision(
            shape.vision_rows, shape.vision_length
        )
        return 3.0 * micro_batches * forward

    def gspo_step(
        self,
        prompts: Sequence[SampleSize],
        policy: BatchShape,
        *,
        prompts_per_step: int,
        samples_per_prompt: int,
        updates: int,
        micro_batches: int,
        new_tokens: int,
    ) -> float:
        """One rollout and its updates, with the vision encoder frozen.

        Args:
          prompts: sizes of all prompts, which decide the shape of the prefill.
          policy: of a micro-batch of an update.
          prompts_per_step, samples_per_prompt: of the rollout.
          updates: per rollout; with more than one, the old log-probabilities take a forward pass more.
          micro_batches: of an update.
          new_tokens: decoded per answer; the longest possible answer counts each as if it were sampled to its end.
        """
        prefill = prompt_shape(prompts, prompts_per_step, self.model)
        total = self.text(prefill.rows, prefill.length, prefill.length)
        total += self.vision(prefill.vision_rows, prefill.vision_length)
        total += self.text(prompts_per_step * samples_per_prompt, new_tokens, prefill.length + new_tokens)
        text = self.text(policy.rows, policy.length, policy.length)
        vision = self.vision(policy.vision_rows, policy.vision_length)
        passes = 3 * text + vision + (text + vision if updates > 1 else 0.0)
        return total + updates * micro_batches * passes
