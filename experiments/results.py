"""What each part of the RL stage does: arms that differ in one thing, three seeds each, compared with intervals.

    mindjax results

is `mindjax results --config=experiments/results.py`. It writes `docs/results.md`; `:debug` runs all of it, with one
seed and two steps, in well under a minute and writes into its run directory alone. What there is to say about the
numbers stands beside this file, in `results.md`.
"""

from ml_collections import ConfigDict

SIZES = ("debug",)
DEBUG_ARMS = ("base", "two_phase", "diverse", "int8_sequence", "think", "think_stop", "dpo")


def get_config(size: str = "") -> ConfigDict:
    """The recipe; the debug size changes widths and counts alone."""
    debug = size == "debug"
    config = ConfigDict()
    config.kind = "results"
    config.seeds = (0,) if debug else (0, 1, 2)
    config.workers = 1 if debug else 2
    config.max_pixels = 96 * 96
    config.families = ("shape", "colour", "locate", "digit_read")
    config.several = ("shape_any",)
    config.samples = 8
    config.max_new_tokens = 8
    config.model = _model(debug)

    config.data = data = ConfigDict()
    data.plain = 20 if debug else 3600
    data.think = 10 if debug else 400
    data.ablated = 4 if debug else 100
    data.prompts = 8 if debug else 512
    data.pairs = 8 if debug else 200
    data.held_out = 4 if debug else 100

    config.sft = _sft(debug)
    config.base = _base(debug)
    config.dpo = _dpo(debug)
    config.arms = _arms(debug)
    config.comparisons = _comparisons()
    if debug:  # one of each kind: most of the time goes into compiling
        config.arms = tuple(arm for arm in config.arms if arm["name"] in DEBUG_ARMS)
        shown = [{**c, "arms": tuple(a for a in c["arms"] if a in (*DEBUG_ARMS, "start"))} for c in config.comparisons]
        config.comparisons = tuple(comparison for comparison in shown if len(comparison["arms"]) > 1)
    config.analysis = "experiments/results.md"
    config.publish = "" if debug else "docs"
    return config


def _arms(debug: bool) -> tuple:
    """Each is the base recipe with these changes and no others."""
    think = {"max_new_tokens": 8 if debug else 48}
    two_phase = {"pass_at_k": 0.5, "k": 4}
    # Replies are two words: whether they are the same is plain to see.
    diverse = {"estimator": "diversity", "distance": {"kind": "exact"}}

    def weights(kind: str, level: str) -> dict:
        return {"rollout": {"weights": kind}, "off_policy": {"level": level}}

    return (
        {"name": "base", "title": "Pass@1"},
        {"name": "two_phase", "title": "Pass@k, then Pass@1", "changes": {"advantage": two_phase}},
        {"name": "diverse", "title": "Pass@k, then diversity", "changes": {"advantage": two_phase | diverse}},
        {"name": "oversample", "title": "Ratio-EMA", "changes": {"oversample": {"largest": 3.0}}},
        {"name": "int8", "title": "int8, no correction", "changes": weights("int8", "none")},
        {"name": "int8_sequence", "title": "int8, sequence TIS", "changes": weights("int8", "sequence")},
        {"name": "fp8", "title": "fp8, no correction", "changes": weights("fp8", "none")},
        {"name": "fp8_sequence", "title": "fp8, sequence TIS", "changes": weights("fp8", "sequence")},
        # Weights of tokens go with the token form of the loss, so they have a full-precision arm of their own.
        {"name": "token", "title": "full precision, token form", "changes": {"level": "token"}},
        {"name": "int8_token", "title": "int8, token TIS", "changes": weights("int8", "token") | {"level": "token"}},
        {"name": "fp8_token", "title": "fp8, token TIS", "changes": weights("fp8", "token") | {"level": "token"}},
        {"name": "think", "title": "neither", "prompts": "think", "changes": think},
        {
            "name": "think_length",
            "title": "length reward",
            "prompts": "think",
            "changes": think | {"reward": {"length": 0.3, "soft_length": 8 if debug else 40}},
        },
        {
            "name": "think_stop",
            "title": "redundancy detection",
            "prompts": "think",
            "changes": think | {"rollout": {"repeat_window": 8, "repeat_count": 5}},
        },
        {"name": "dpo", "title": "DPO after Pass@1", "after": "base"},
    )


def _comparisons() -> tuple:
    def on(name: str, *measures: str, **options: str) -> tuple:
        return tuple({"measure": measure, "on": name, **options} for measure in measures)

    quantized = (
        *on("training", "rollout_kl", "rollout_pearson", "rollout_max", "reward"),
        *on("plain", "greedy", "pass@1"),
    )
    return (
        {
            "name": "pass_at_k",
            "title": "A Pass@k phase first",
            "question": "Half the steps with the advantage of Pass@4, the other half with that of Pass@1, "
            "against Pass@1 all the way. Hoped for: at the end of the phase, the middle of the run, a higher "
            "pass@8 and entropy; at the end an accuracy no worse, and more different right replies where there "
            "are several.",
            "arms": ("base", "two_phase"),
            "columns": (
                *on("plain", "pass@n", "entropy", "pass@1", at="middle"),
                *on("plain", "greedy", "pass@1", "pass@n"),
                *on("plain", "distinct", families="several"),
            ),
            "curves": ("reward", "entropy", "informative"),
        },
        {
            "name": "diversity",
            "title": "The diversity advantage",
            "question": "After the Pass@k phase, rewards of right replies weighted by how different they are, "
            "against plain Pass@1. Hoped for: more different right replies where there are several, at equal "
            "accuracy, and no harm where there is one.",
            "arms": ("two_phase", "diverse"),
            "columns": (
                *on("plain", "distinct", "pass@1", "entropy", "greedy", families="several"),
                *on("plain", "greedy", "pass@1", "entropy", families="single"),
            ),
            "curves": ("reward", "entropy", "pass@1"),
        },
        {
            "name": "length",
            "title": "The length reward and redundancy detection",
            "question": "Prompts that ask to think first, which the SFT model answers with phrases that say "
            "nothing and often go in circles, 48 tokens at most. The length reward falls from 8 tokens on; "
            "redundancy detection stops a rollout that says the same five times in a row. Hoped for: shorter "
            "replies at equal accuracy; rollouts that take less time.",
            "arms": ("think", "think_length", "think_stop"),
            "columns": (
                *on("think", "length", "greedy", "pass@1", "not stopped"),
                *on("training", "length", "cut", "redundant", "rollout_seconds"),
            ),
            "curves": ("length", "pass@1", "rollout_seconds", "cut", "redundant"),
        },
        {
            "name": "quantized",
            "title": "8-bit rollouts, sequence form",
            "question": "Rollouts sampled from int8 or fp8 weights, without correction and with truncated "
            "importance sampling (C = 2), against full precision. Hoped for: a divergence that is seen, and a "
            "reward that the correction keeps.",
            "arms": ("base", "int8", "int8_sequence", "fp8", "fp8_sequence"),
            "columns": quantized,
            "curves": ("reward", "rollout_kl", "entropy"),
        },
        {
            "name": "quantized_token",
            "title": "8-bit rollouts, token form",
            "question": "The same with a weight for every token, which goes with the token form of the loss.",
            "arms": ("token", "int8_token", "fp8_token"),
            "columns": quantized,
            "curves": ("reward", "rollout_kl", "entropy"),
        },
        {
            "name": "oversample",
            "title": "Ratio-EMA oversampling",
            "question": "As many prompts are asked as the share of groups without a lesson makes necessary, at "
            "most three for each that is trained, and the most balanced are kept. It costs rollouts. Hoped for: "
            "a larger share of groups with a lesson, and a reward that grows faster by the step.",
            "arms": ("base", "oversample"),
            "columns": (
                *on("training", "trained_informative", "informative", "oversample", "rollout_seconds", "reward"),
                *on("plain", "greedy", "pass@1"),
            ),
            "curves": ("trained_informative", "oversample", "reward"),
        },
        {
            "name": "dpo",
            "title": "DPO after RL",
            "question": "Pairs of the reference and the model's own wrong reply, half of them to questions "
            "without their picture. Hoped for: fewer replies that are invented where there is no picture, at "
            "equal accuracy where there is one. DPO comes on top of the run it starts from; it is no comparison "
            "at equal compute.",
            "arms": ("base", "dpo", "start"),
            "columns": (
                *on("ablated", "invented", "invented, T = 1"),
                *on("plain", "greedy", "pass@1", "pass@n", "entropy"),
            ),
        },
    )


def _model(debug: bool) -> ConfigDict:
    """That of the main job: narrow, so that a step takes tens of milliseconds on two cores."""
    model = ConfigDict()
    model.tie_word_embeddings = True
    model.initializer_range = 0.08
    model.text = text = ConfigDict()
    text.vocab_size = 768
    text.hidden_size = 48 if debug else 96
    text.intermediate_size = 96 if debug else 288
    text.num_hidden_layers = 2 if debug else 3
    text.num_attention_heads = 4
    text.num_key_value_heads = 2
    text.head_dim = 24
    text.mrope_section = (4, 4, 4)
    text.rope_theta = 10_000.0
    model.vision = vision = ConfigDict()
    vision.depth = 2
    vision.hidden_size = 32 if debug else 64
    vision.intermediate_size = 64 if debug else 256
    vision.num_heads = 4
    vision.out_hidden_size = text.hidden_size
    vision.deepstack_visual_indexes = (0,)
    vision.num_position_embeddings = 64
    vision.patch_size = 16
    vision.temporal_patch_size = 1
    return model


def _sft(debug: bool) -> ConfigDict:
    sft = ConfigDict()
    sft.steps = 3 if debug else 2400
    sft.rows = 4 if debug else 8
    sft.length = 128
    sft.vision_rows = 4 if debug else 8
    sft.vision_length = 96
    sft.checkpoint_every = 0 if debug else 600
    sft.keep_checkpoints = 1
    sft.optimizer = _optimizer(6e-3)
    sft.optimizer.warmup_steps = 1 if debug else 30
    return sft


def _base(debug: bool) -> ConfigDict:
    """Plain GSPO, as the main job has it."""
    rl = ConfigDict()
    rl.steps = 2 if debug else 160
    rl.prompts_per_step = 4 if debug else 16
    rl.samples_per_prompt = 8
    rl.updates_per_rollout = 2
    rl.max_new_tokens = 8
    # Answers have a few tokens: the 3e-4 of long answers would clip nearly all of the second update.
    rl.eps_low = 0.03
    rl.eps_high = 0.04
    rl.checkpoint_every = 0 if debug else 40
    rl.keep_checkpoints = 1
    # At twice this rate `colour` fell by 11 points and `locate` stood still; at this one -4 and +9 (seed 0, 120 steps).
    rl.optimizer = _optimizer(1e-3)
    rl.optimizer.warmup_steps = 1 if debug else 5
    rl.optimizer.schedule = "linear"
    rl.optimizer.final_fraction = 0.1
    rl.optimizer.weight_decay = 0.0
    rl.optimizer.multipliers = (("^vision", 0.0), (".*", 1.0))
    return rl


def _dpo(debug: bool) -> ConfigDict:
    dpo = ConfigDict()
    dpo.epochs = 1
    dpo.beta = 0.3
    dpo.reference = True
    dpo.rows = 4 if debug else 8
    dpo.length = 128
    dpo.keep_checkpoints = 1
    dpo.optimizer = _optimizer(2e-4)
    dpo.optimizer.weight_decay = 0.0
    return dpo


def _optimizer(learning_rate: float) -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "muon"
    optimizer.learning_rate = learning_rate
    optimizer.warmup_steps = 0
    optimizer.schedule = "cosine"
    optimizer.final_fraction = 0.05
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.05
    optimizer.clip_norm = 1.0
    optimizer.multipliers = ((".*", 1.0),)
    return optimizer
