"""The main job: a tiny vision-language model from random weights through SFT, GSPO and DPO on real images.

    mindjax run --config=experiments/quickstart.py

`:moe` does the same with a mixture of experts; `:debug` and `:moe-debug` run all of it in well under a minute, and
show that everything works, not that it learns.
"""

from ml_collections import ConfigDict

SIZES = ("debug", "moe", "moe-debug")


def get_config(size: str = "") -> ConfigDict:
    """The recipe; the debug sizes change widths and counts alone."""
    debug, moe = "debug" in size, "moe" in size
    config = ConfigDict()
    config.kind = "pipeline"
    config.seed = 0
    config.max_pixels = 96 * 96
    config.knowledge = ("digit_read", "letters_read", "shape", "quadrant")
    config.ability = ("colour", "digit_largest", "digit_count", "digit_any", "locate")
    # Several replies are right, and a demonstration is one of them at random: here exploring can help.
    config.explore = ("digit_any", "locate")
    config.levels = 1  # easy items first gained nothing: docs/decisions.md
    config.max_new_tokens = 16
    config.eval_rows = 64
    config.model = _model(debug, moe)

    config.data = data = ConfigDict()
    data.knowledge = 20 if debug else 5000
    data.ability = 20 if debug else 4000
    data.replay = 10 if debug else 2000
    data.preference = 4 if debug else 300
    data.explore = 8 if debug else 2500
    data.rehearse = 1 if debug else 200
    data.pairs = 2 if debug else 60
    data.probe = 2 if debug else 100
    data.held_out = 4 if debug else 200
    data.variants = 1 if debug else 40

    config.sft_knowledge = _sft(debug, steps=1400)
    config.sft_ability = _sft(debug, steps=2600)
    config.sft_preference = _sft(debug, steps=1000, learning_rate=4e-3)
    config.sft_continued = _sft(debug, steps=1915, learning_rate=2e-3)  # the arithmetic of GSPO's steps
    config.gspo = _gspo(debug)
    config.dpo = _dpo(debug)
    return config


def _model(debug: bool, moe: bool) -> ConfigDict:
    """Narrow, so that a step takes tens of milliseconds on two cores; the initial weights are larger for it."""
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
    if moe:
        text.num_experts = 4 if debug else 8
        text.num_experts_per_tok = 2
        text.moe_intermediate_size = 32 if debug else 144
        text.router_aux_loss_coef = 0.01
    model.vision = vision = ConfigDict()
    vision.depth = 2
    vision.hidden_size = 32 if debug else 64
    vision.intermediate_size = 64 if debug else 256
    vision.num_heads = 4
    vision.out_hidden_size = text.hidden_size
    vision.deepstack_visual_indexes = (0,)
    vision.num_position_embeddings = 64
    # With merging a token shows 32 x 32 pixels, the cell that a digit, a letter or a shape stands in.
    vision.patch_size = 16
    # Still pictures only: a second frame would show every pixel twice.
    vision.temporal_patch_size = 1
    return model


def _sft(debug: bool, steps: int, learning_rate: float = 6e-3) -> ConfigDict:
    """One stage. All stages have one batch shape, so that they share one compiled step."""
    sft = ConfigDict()
    sft.dtype = "bfloat16"
    sft.steps = 3 if debug else steps
    # About 36 questions a step.
    sft.rows = 4 if debug else 8
    sft.length = 128
    sft.vision_rows = 4 if debug else 8
    sft.vision_length = 96
    sft.checkpoint_every = 0 if debug else 500
    sft.keep_checkpoints = 1
    sft.optimizer = _optimizer(learning_rate)
    sft.optimizer.warmup_steps = 1 if debug else 30
    return sft


def _gspo(debug: bool) -> ConfigDict:
    gspo = ConfigDict()
    gspo.dtype = "bfloat16"
    gspo.steps = 2 if debug else 450
    gspo.prompts_per_step = 4 if debug else 16
    gspo.samples_per_prompt = 4 if debug else 8
    gspo.updates_per_rollout = 2
    gspo.responses_per_row = 1
    gspo.max_new_tokens = 8
    # Answers have three or four tokens: the second update of a rollout moves a ratio by half a percent on average, by
    # several now and then. The 3e-4 of long answers would clip nearly all of it, these clip the tail.
    gspo.eps_low = 0.03
    gspo.eps_high = 0.04
    gspo.checkpoint_every = 0 if debug else 100
    gspo.keep_checkpoints = 1
    gspo.optimizer = _optimizer(1.5e-3)
    gspo.optimizer.schedule = "linear"
    gspo.optimizer.final_fraction = 0.1
    gspo.optimizer.weight_decay = 0.0
    gspo.optimizer.multipliers = (("^vision", 0.0), (".*", 1.0))
    return gspo


def _dpo(debug: bool) -> ConfigDict:
    dpo = ConfigDict()
    dpo.dtype = "bfloat16"
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
    # Muon leaves the plateau, on which a model that cannot see yet stays, several times sooner than AdamW here.
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
