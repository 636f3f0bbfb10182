"""Direct Preference Optimization of one model on one file of preference pairs.

mindjax dpo --config experiments/dpo.py --config.model=MODEL_DIR --config.data.path=pairs.jsonl
mindjax dpo --config experiments/dpo.py:debug      random weights on drawn task images, a minute on a laptop
"""

from __future__ import annotations

from ml_collections import ConfigDict

SIZES = ("debug",)


def get_config(size: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "kind": "dpo",
            "model": "",  # a model folder
            "max_pixels": 0,  # of an image; 0: the folder's own limit
            "data": {"path": "", "families": (), "variant": "preference", "split": "train", "count": 0, "seed": 0},
            "train": {
                "beta": 0.1,
                "reference": False,  # the paper's eq. 13 has none
                "epochs": 1,
                "rows": 4,
                "length": 4096,
                "micro_batches": 8,
                "remat": "full",
                "layout": {  # docs/parallelism.md
                    "data": 1,
                    "fsdp": 1,
                    "stage": 1,
                    "sequence": 1,
                    "expert": 1,
                    "tensor": 1,
                    "pipeline_microbatches": 0,
                    "pipeline_rounds": 1,
                    "context": "ulysses",
                    "dispatch": "auto",
                },
                "spikes": {
                    "policy": "stop",  # skip, rewind
                    "loss": 0.0,
                    "grad_norm": 0.0,
                    "window": 64,
                    "allowed": 8,
                    "keep_batches": 4,
                },
                "check_replicas_every": 0,
                "dtype": "bfloat16",
                "seed": 0,
                "drop_too_long": True,
                "checkpoint_every": 100,
                "keep_checkpoints": 2,
                "optimizer": {
                    "name": "adamw",
                    "learning_rate": 1e-6,
                    "warmup_steps": 20,
                    "schedule": "cosine",
                    "final_fraction": 0.1,
                    "b1": 0.9,
                    "b2": 0.95,
                    "weight_decay": 0.0,
                    "clip_norm": 1.0,
                    "multipliers": (("^vision", 0.0), (".*", 1.0)),
                },
            },
        }
    )
    if size == "debug":
        config.update(
            {
                "model": "tiny",
                "max_pixels": 96 * 96,
                "data": {"families": ("digit_read", "colour"), "count": 16},
                "train": {
                    "epochs": 4,
                    "rows": 4,
                    "length": 256,
                    "micro_batches": 1,
                    "remat": "none",
                    "dtype": "float32",
                    "checkpoint_every": 10,
                    "optimizer": {"learning_rate": 3e-4, "warmup_steps": 2},
                },
            }
        )
    return config
