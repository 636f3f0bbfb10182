"""GSPO with verifiable rewards on task families, from a fine-tuned model.

    mindjax rl --config=experiments/gspo.py --config.model=runs/quickstart/model

`:debug` starts from random weights and ends within a minute; it shows that everything runs, not that it learns.
"""

from ml_collections import ConfigDict

SIZES = ("debug",)


def get_config(size: str = "") -> ConfigDict:
    """The recipe; the debug size changes counts alone."""
    debug = size == "debug"
    config = ConfigDict()
    config.kind = "rl"
    config.model = "tiny" if debug else "runs/quickstart/model"
    config.max_pixels = 96 * 96

    config.data = data = ConfigDict()
    data.families = ("digit_read", "colour", "quadrant", "digit_any", "locate")
    data.variant = "cloze"
    data.split = "train"
    data.count = 8 if debug else 500
    data.seed = 1

    config.train = train = ConfigDict()
    train.steps = 2 if debug else 60
    train.prompts_per_step = 4 if debug else 16
    train.samples_per_prompt = 4 if debug else 8
    train.updates_per_rollout = 2
    train.micro_batches = 1 if debug else 4
    train.responses_per_row = 1
    train.temperature = 1.0
    train.max_new_tokens = 8 if debug else 16
    train.level = "sequence"
    # Answers are a few tokens long: the ratio of a whole answer moves by percents in an update. The 3e-4 and 4e-4 of
    # long answers would clip nearly all of them.
    train.eps_low = 0.2
    train.eps_high = 0.28
    train.dtype = "float32"
    train.remat = "none"
    train.seed = 0
    train.checkpoint_every = 1 if debug else 20
    train.evaluate_every = 0

    # Every part of the method has its switch here; all but plain GSPO are off.
    train.dual_clip = 0.0
    train.kl = "none"
    train.kl_coefficient = 0.0
    train.exclude_cut = "none"
    train.show_every = 0 if debug else 10

    train.layout = layout = ConfigDict()  # docs/parallelism.md
    layout.data = 1
    layout.fsdp = 1
    layout.stage = 1
    layout.sequence = 1
    layout.expert = 1
    layout.tensor = 1
    layout.pipeline_microbatches = 0
    layout.pipeline_rounds = 1
    layout.context = "ulysses"
    layout.dispatch = "auto"

    train.reward = reward = ConfigDict()
    reward.correct = 1.0
    reward.length = 0.0
    reward.max_length = 0
    reward.soft_length = 0
    reward.redundant = 0.0

    train.advantage = advantage = ConfigDict()
    advantage.pass_at_k = 0.0  # share of the steps, e.g. 0.4
    advantage.k = 2 if debug else 4
    advantage.entropy_switch = 0.0
    advantage.estimator = "group"  # rloo, batch, diversity
    advantage.normalize_deviation = True
    advantage.diversity_mode = "pairwise"

    train.off_policy = off_policy = ConfigDict()
    off_policy.level = "none"  # sequence or geometric; token with train.level = "token"
    off_policy.mode = "truncate"
    off_policy.cap = 2.0

    train.rollout = rollout = ConfigDict()
    rollout.engine = "native"  # or vllm
    rollout.weights = "full"  # int8, fp8
    rollout.overlap = False
    rollout.repeat_window = 0
    rollout.repeat_count = 0
    rollout.repeat_length = 0

    train.oversample = oversample = ConfigDict()
    oversample.largest = 1.0  # 3.0: up to three times the prompts, the most balanced groups are trained

    train.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"
    optimizer.learning_rate = 2e-4
    optimizer.warmup_steps = 0 if debug else 4
    optimizer.schedule = "constant"
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 1.0
    # The vision encoder stays as it is, the projectors into the language model too.
    optimizer.multipliers = (("^vision", 0.0), (".*", 1.0))
    return config
