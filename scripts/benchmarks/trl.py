"""The same work in TRL's DistillationTrainer, which waits for its turn before each step (see
scripts.benchmarks.turns): python -m scripts.benchmarks.trl SPEC, in JSON"""

from __future__ import annotations

import json
import sys
from typing import Any

from scripts.benchmarks.turns import wait_for_turn


def main(spec: dict[str, Any]) -> None:
    """``spec``: student, teacher, prompts (messages), batch, steps, tokens, lr, bf16, onednn."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    from actors.cpu_matmul import use_onednn

    torch.set_num_threads(spec["threads"])
    if spec["onednn"]:
        use_onednn()

    class Turn(TrainerCallback):
        """From the beginning of one step to that of the next, or to the end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            wait_for_turn()

    dtype = "bfloat16" if spec["bf16"] else "float32"
    arguments = DistillationConfig(
        output_dir=spec["directory"],
        per_device_train_batch_size=spec["batch"],
        max_steps=spec["steps"],
        max_completion_length=spec["tokens"],
        learning_rate=spec["lr"],
        beta=1.0,
        bf16=spec["bf16"],
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        model_init_kwargs={"dtype": dtype},
        teacher_model_init_kwargs={"dtype": dtype},
    )
    trainer = DistillationTrainer(
        model=spec["student"],
        teacher_model=spec["teacher"],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": m} for m in spec["prompts"]]),
        processing_class=AutoTokenizer.from_pretrained(spec["teacher"]),
        callbacks=[Turn()],
    )
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
