"""How far our model is from transformers and vLLM, operation by operation and end to end: `mindjax parity`.

Each operation is judged alone, on the other implementation's input, so that the first row past its bound names where
the two depart; beside it stands the error that the whole way up to there has carried. The truth is transformers in
float64 (which keeps its norms in float32). Bounds are the tiers of the design:

  tier 1  an 8-bit product against float64 of the same quantised values: 5e-4
  tier 2  the same against float64 of the unquantised: 4.5e-2, and calc_diff below 1e-3
  tier 3  16 bits against float64: 3e-3. It is meant for one product; an operation that rounds several times may
          instead be 1.5 times as far from the truth as torch is: one rounding more than torch has costs a factor of
          sqrt(2) at most
  tier 4  KL of the next token <= 0.003 nats, between implementations and between 8 bits and the trainer
  float32 alone 1e-5, logits 1e-4

All errors but max and mean are ||difference|| / ||reference||.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from mindjax.config import ModelConfig
from mindjax.data.packing import collate_prompts
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, render
from mindjax.inference.sampler import SamplingConfig, generate
from mindjax.interop import layerwise, torch_trace
from mindjax.interop.layerwise import Trace
from mindjax.interop.parity_8bit import EIGHT_BITS, products, quantize_projections, with_weights
from mindjax.interop.parity_rows import (
    FLOAT32,
    LOGITS,
    ROUNDINGS,
    TIER_3,
    TIER_4,
    Bound,
    Report,
    Row,
    kl,
    log_softmax,
    relative,
    same_experts,
)
from mindjax.interop.random_checkpoint import TEXTS
from mindjax.interop.torch_baseline import model_inputs
from mindjax.models import catalog, hf_weights

DTYPES = ("float32", "bfloat16", "int8", "fp8")

Params = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A checkpoint here and in transformers, and the same conversations for both.

    Attributes:
      params: float32.
      reference: float32.
      batch, inputs: the rendered conversations for us and for transformers, padded on the right.
      random: whether the weights are drawn, not trained. Such a model has two things that no trained one has, so two
        rows judge it otherwise: its experts have nothing in common, so a near tie of the router that falls the other
        way changes a token altogether, and KL is judged over tokens before any such flip; and its weights are noise
        that 8 bits change by their own size (e4m3 by 2.6 % each), so the KL between 8 bits and trainer is told, not
        judged.
    """

    name: str
    folder: Path
    config: ModelConfig
    params: Params
    reference: Any
    conversations: list[list[dict[str, Any]]]
    rendered: list[Rendered]
    batch: Any
    inputs: dict[str, torch.Tensor]
    random: bool

    @cached_property
    def trainer(self) -> Trace:
        """The unquantised checkpoint in float64."""
        return torch_trace.trace(torch_trace.in_dtype(self.reference, torch.float64), self.inputs)


def open_case(folder: Path, name: str, *, pictures: Path, random: bool = False, backend: str = "cpu") -> Case:
    """Opens a Hugging Face folder for both sides.

    Args:
      pictures: where to draw the conversations' images.
      random: see `Case`.
      backend: "cpu" or "cuda", for both sides.

    Raises:
      ValueError: where the folder holds no model and processor of Qwen3-VL, or the backend is not there.
    """
    if backend == "cuda" and not torch.cuda.is_available():
        raise ValueError("--backend cuda needs a GPU that torch sees; there is none here")
    transformers_logging.disable_progress_bar()  # seconds of bars between the tables
    config, params = catalog.load(folder, dtype="float32")
    processor = Processor.from_pretrained(folder)
    conversations = _conversations(processor, pictures)
    rendered = [render(messages, processor, add_generation_prompt=True) for messages in conversations]
    batch = collate_prompts(rendered, merge_size=config.vision.spatial_merge_size)
    reference = torch_trace.load(folder, config).to(backend)
    return Case(
        name, folder, config, params, reference, conversations, rendered, jax.tree.map(jnp.asarray, batch),
        model_inputs(rendered), random,
    )  # fmt: skip


def _conversations(processor: Processor, folder: Path) -> list[list[dict[str, Any]]]:
    """An image, two images, text alone; sizes that are not resized, so that no interpolation is compared."""
    from PIL import Image

    image = processor.image
    step = image.patch_size * image.merge_size
    side = step * int(np.ceil(image.min_pixels**0.5 / step))

    def draw(name: str, width: int, height: int, seed: int) -> dict[str, str]:
        coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
        return {"type": "image", "image": str(folder / name)}

    wide, tall = draw("wide.png", side + 3 * step, side, 0), draw("tall.png", side, side + 2 * step, 1)
    return [
        [{"role": "user", "content": [wide, {"type": "text", "text": TEXTS[0]}]}],
        [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}, tall, wide]}],
        [{"role": "user", "content": TEXTS[2]}],
    ]


# ---- against transformers


def against_torch(case: Case, dtype: str, *, params: Params | None = None) -> Report:
    """Operation by operation and end to end.

    8 bits: the projections of the language model (not router, embedding, head, vision) hold quantised values, in
    bfloat16 for the layers, which is what an 8-bit rollout reads; the 8-bit products themselves, activations quantised
    too, are judged one by one.

    Args:
      dtype: one of DTYPES.
      params: ours, where they shall not be those of the checkpoint.
    """
    compute = "float32" if dtype == "float32" else "bfloat16"
    params, reference = case.params if params is None else params, case.reference
    if dtype in EIGHT_BITS:
        weights = quantize_projections(params, EIGHT_BITS[dtype][1])
        # What torch quantises are its own weights; where ours differ from them, its rows will show it.
        theirs = quantize_projections(case.params, EIGHT_BITS[dtype][1])
        params, reference = with_weights(params, weights), torch_trace.with_weights(reference, theirs)
    params = jax.tree.map(lambda leaf: leaf.astype(compute), params)
    rounded = torch_trace.in_dtype(reference, getattr(torch, compute))

    their = torch_trace.trace(rounded, case.inputs)
    alone_truth = torch_trace.trace(torch_trace.in_dtype(rounded, torch.float64), case.inputs, given=their)
    eight_bits = dtype in EIGHT_BITS
    truth = (
        torch_trace.trace(torch_trace.in_dtype(reference, torch.float64), case.inputs) if eight_bits else case.trainer
    )
    own = layerwise.trace(params, case.config, case.batch)
    alone = layerwise.trace(params, case.config, case.batch, given=their)
    logits = layerwise.logits(params, case.config, case.batch)

    report = Report(case.name, dtype, "torch")
    for name in alone.outputs:
        report.layers.append(_operation(name, dtype, own, alone, their, alone_truth, truth))
    if dtype in EIGHT_BITS:
        report.layers.extend(products(case, their, dtype))
    report.ends.extend(_ends(case, dtype, logits, own, their, truth))
    if dtype in EIGHT_BITS:
        metrics = {"kl": float(np.mean(kl(case.trainer.outputs["head"], logits)))}
        bounds = () if case.random else (Bound("kl", TIER_4, "tier 4"),)
        report.ends.append(Row("8 bits and trainer", metrics, bounds))
    return report


def _operation(name: str, dtype: str, own: Trace, alone: Trace, their: Trace, alone_truth: Trace, truth: Trace) -> Row:
    a, b, t = alone.outputs[name], their.outputs[name], alone_truth.outputs[name]
    metrics: dict[str, float] = {}
    layer = int(name.split(".")[1]) if name.startswith("text.") and name.endswith(".mlp") else -1
    if layer in alone.choices:
        metrics["experts"] = same_experts(own.choices[layer], their.choices[layer])
        metrics["experts_alone"] = same_experts(alone.choices[layer], their.choices[layer])
        # Where a near tie falls the other way, the answers differ for that and not for the product's sake.
        choices = [np.sort(x.choices[layer], -1) for x in (alone, their, alone_truth)]
        same = (choices[0] == choices[1]).all(-1) & (choices[0] == choices[2]).all(-1)
        a, b, t = a[same], b[same], t[same]
    metrics["alone"] = relative(a, b)
    # The stream itself is fed by torch's own results: there only the sum, or the placing of tokens, can be wrong.
    judged_by_truth = name not in ("text.embed",) and not name.endswith(".hidden")
    if judged_by_truth:
        metrics["alone_truth"], metrics["torch_alone_truth"] = relative(a, t), relative(b, t)
    metrics |= _carried(own.outputs[name], their.outputs[name], truth.outputs[name])
    if dtype == "float32":
        return Row(name, metrics, (Bound("alone", FLOAT32, "float32"),))
    if not judged_by_truth:
        return Row(name, metrics, (Bound("alone", TIER_3, "tier 3"),))
    limit = max(TIER_3, ROUNDINGS * metrics["torch_alone_truth"])
    source = "tier 3" if limit == TIER_3 else f"tier 3, {ROUNDINGS} x torch"
    return Row(name, metrics, (Bound("alone_truth", limit, source),))


def _carried(own: np.ndarray, their: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Errors of a value that the whole way up to it has gone into."""
    return {
        "max": float(np.abs(own - their).max()),
        "mean": float(np.abs(own - their).mean()),
        "relative": relative(own, their),
        "truth_max": float(np.abs(own - truth).max()),
        "truth_mean": float(np.abs(own - truth).mean()),
        "truth": relative(own, truth),
        "torch_truth": relative(their, truth),
    }


def _ends(case: Case, dtype: str, logits: np.ndarray, own: Trace, their: Trace, truth: Trace) -> list[Row]:
    """Logits of the model itself, [N, V], not of the walk through its layers."""
    reference, exact = their.outputs["head"], dtype == "float32"
    divergence, same = kl(reference, logits), float(np.mean(logits.argmax(-1) == reference.argmax(-1)))
    metrics = {"kl": float(divergence.mean()), "kl_max": float(divergence.max())}
    rows = [
        Row("logits", _carried(logits, reference, truth.outputs["head"]), (Bound("max", LOGITS, "float32"),) * exact),
        Row("next token", metrics, (Bound("kl", TIER_4, "tier 4"),)),
        Row("greedy", {"share": same}, (Bound("share", 1.0, "float32", at_least=True),) * exact),
    ]
    if own.choices:
        shares = [same_experts(own.choices[layer], their.choices[layer]) for layer in own.choices]
        rows.append(Row("experts", {"share": float(np.mean(shares))}))
        # Of the walk, whose choices are known; the model itself is compiled as one and may round a near tie otherwise.
        alike = _routed_alike(case, own, their)
        walked = kl(reference, own.outputs["head"])[alike]
        metrics |= {"kl_routed_alike": float(walked.mean()), "routed_alike": float(alike.mean())}
        if case.random:
            rows[1] = Row("next token", metrics, (Bound("kl_routed_alike", TIER_4, "tier 4"),))
    return rows


def _routed_alike(case: Case, own: Trace, their: Trace) -> np.ndarray:
    """[N], whether a token and all before it in its row met the same experts in all layers."""
    same = np.ones(sum(len(rendered.tokens) for rendered in case.rendered), bool)
    for layer, choices in own.choices.items():
        same &= (np.sort(choices, -1) == np.sort(their.choices[layer], -1)).all(-1)
    ends = np.cumsum([len(rendered.tokens) for rendered in case.rendered])[:-1]
    return np.concatenate([np.logical_and.accumulate(row) for row in np.split(same, ends)])


# ---- against vLLM


def against_vllm(case: Case, dtype: str, *, kv_cache: str = "auto", new_tokens: int = 16) -> Report:
    """End to end alone, for vLLM's layers cannot be watched simply: log-probs of the prompts, and greedy tokens.

    KL is estimated from the log-probs of the prompts' tokens, mean of exp(d) - 1 - d with d = theirs - ours, as between
    rollout and trainer. A random mixture in bfloat16 is told and not judged: vLLM does not say which experts it chose,
    see `Case`.

    Args:
      dtype: float32 or bfloat16.
      kv_cache: "fp8" keeps keys and values in e4m3 with scale 1; judged against our model with its keys and values
        rounded as vLLM 0.32 rounds on a CPU, toward zero; told against ours as it is.
    """
    from mindjax.interop import vllm

    config, exact = case.config, dtype == "float32" and kv_cache == "auto"
    forbidden = [
        config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        hf_weights.convert(case.folder, Path(folder) / "published", dtype=dtype)
        [answers] = vllm.greedy(
            [(Path(folder) / "published", case.conversations)],
            max_new_tokens=new_tokens, forbidden_tokens=forbidden, dtype=dtype,
            engine={} if kv_cache == "auto" else {"kv_cache_dtype": kv_cache},
        )  # fmt: skip
    for row, (rendered, answer) in enumerate(zip(case.rendered, answers, strict=True)):
        if rendered.tokens.tolist() != answer["prompt_token_ids"]:
            raise ValueError(f"vLLM reads conversation {row} as other tokens than we do; the processor's files differ")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), case.params)
    theirs = np.concatenate([answer["prompt_logprobs"][1:] for answer in answers])
    metrics = _between(theirs, _prompt_logprobs(case, layerwise.logits(params, config, case.batch)))
    judged = () if case.random and config.text.num_experts and not exact else (Bound("kl", TIER_4, "tier 4"),)
    report = Report(case.name, dtype if kv_cache == "auto" else f"{dtype}, {kv_cache} cache", "vllm")
    if kv_cache == "auto":
        bounds = (*judged, *((Bound("max", LOGITS, "float32"),) * exact))
        report.ends.append(Row("prompt log-probs", metrics, bounds))
    else:
        rounded = layerwise.trace(params, config, case.batch, kv=e4m3_toward_zero).outputs["head"]
        metrics_of_rounded = _between(theirs, _prompt_logprobs(case, rounded))
        report.ends.append(Row("prompt log-probs, rounded", metrics_of_rounded, judged))
        report.ends.append(Row("prompt log-probs", metrics))
    sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    ours = [completions[0].token_ids for completions in generate(params, config, case.rendered, sampling=sampling)]
    share = float(np.mean([np.equal(a, b["token_ids"]) for a, b in zip(ours, answers, strict=True)]))
    report.ends.append(Row("greedy", {"share": share}, (Bound("share", 1.0, "float32", at_least=True),) * exact))
    return report


def e4m3_toward_zero(x: jax.Array) -> jax.Array:
    """The nearest e4m3 number that is not farther from zero, in the dtype of x."""
    near = jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn)
    past = jnp.abs(near.astype(jnp.float32)) > jnp.abs(x.astype(jnp.float32))
    # The bits of a magnitude count up with it.
    bits = jax.lax.bitcast_convert_type(near, jnp.uint8) - past.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(x.dtype)


def _prompt_logprobs(case: Case, logits: np.ndarray) -> np.ndarray:
    """Of every prompt token but the first, row after row, from logits [N, V]."""
    ends = np.cumsum([len(rendered.tokens) for rendered in case.rendered])[:-1]
    rows = np.split(log_softmax(logits.astype(np.float64)), ends)
    pairs = zip(rows, case.rendered, strict=True)
    return np.concatenate([row[np.arange(len(row) - 1), rendered.tokens[1:]] for row, rendered in pairs])


def _between(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    d = theirs - ours
    return {"kl": float(np.mean(np.expm1(d) - d)), "max": float(np.abs(d).max()), "mean": float(np.abs(d).mean())}


Compare = Callable[[Case], Report]


def comparisons(against: Sequence[str], dtypes: Sequence[str]) -> list[Compare]:
    """What to run on each model; vLLM knows float32 and bfloat16, and keys and values in fp8 stand for "fp8"."""
    found: list[Compare] = []
    if "torch" in against:
        found += [partial(against_torch, dtype=dtype) for dtype in dtypes]
    if "vllm" in against:
        found += [partial(against_vllm, dtype=dtype) for dtype in dtypes if dtype in ("float32", "bfloat16")]
        if "fp8" in dtypes:
            found.append(partial(against_vllm, dtype="bfloat16", kv_cache="fp8"))
    return found
