"""LoRA or all weights? CoT-SFT of the tiny model with a given rank (0: all weights of the language part) and
learning rate, judged by greedy answers to held-out referring expressions.

    python tests/benchmark_lora.py --rank 32 --learning-rate 3e-3 [--steps 350 --batch-size 16
    --seed 0 --count 512 --model tiny]

Replaces its row in tests/benchmark_lora.csv. Several may run at the same time, one on each core.
"""
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmark_learning import HELD_OUT, add_rows, judged, referring
from rsground_nb.data import to_dataset
from rsground_nb.evaluate import predict
from rsground_nb.model import REASON, codec_of, load_vlm
from rsground_nb.scale import get_scale, start
from rsground_nb.scenes import scene_records
from rsground_nb.sft import sft_trainer
from rsground_nb.synthesis import synthesise

TABLE = Path(__file__).parent / "benchmark_lora.csv"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind, default in (("rank", int, 0), ("learning-rate", float, 1e-3), ("steps", int, 350),
                                ("batch-size", int, 16), ("seed", int, 0), ("count", int, 512),
                                ("train", int, 4096), ("model", str, "tiny")):
        parser.add_argument(f"--{name}", type=kind, default=default)
    o = parser.parse_args()
    start(o.seed)
    model, processor = load_vlm(o.model)
    chains, _ = synthesise(to_dataset(list(scene_records(o.train, o.seed))),
                           codec_of(model.config.model_type, processor))
    size = replace(get_scale("workshop"), lora_rank=o.rank, sft_steps=o.steps, sft_batch_size=o.batch_size,
                   sft_learning_rate=o.learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(model, processor, chains, size, o.seed, folder)
        moving, began = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad), time.time()
        trainer.train()
    minutes = (time.time() - began) / 60
    model = trainer.model.merge_and_unload() if o.rank else trainer.model
    found = predict(model, processor, referring(o.count, HELD_OUT, "test"), size.max_completion_length, 64,
                    template=REASON)
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    row = (judged("referring", "CoT-SFT", o.seed, found, minutes=minutes)
           | dict(rank=o.rank, learning_rate=o.learning_rate, steps=o.steps, batch_size=o.batch_size,
                  moving=moving, loss=losses[-1]))
    add_rows([row], TABLE, ["seed", "rank", "learning_rate", "steps", "batch_size"])
    print(pd.read_csv(TABLE).to_string(index=False))


if __name__ == "__main__": main()
