"""Is the memory plan right? A Qwen2.5-VL and a Qwen3-VL of the real widths and reduced depth, random weights,
on the CPU: planned against really allocated, part by part.

    python tests/benchmark_memory.py [--layers 2] [--rows 2]

Writes tests/benchmark_memory.csv. Needs about 8 GiB of memory. "kept" is what autograd holds during a whole
forward pass; "resident" the growth of the process.
"""
import argparse
import gc
from pathlib import Path

import pandas as pd
import psutil
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, DynamicCache, Qwen2_5_VLConfig, Qwen3VLConfig

from rsground_nb.memory import kept_bytes, memory_plan
from rsground_nb.model import adapt

HERE = Path(__file__).parent
SIDE, PROMPT, COMPLETION = 224, 32, 32  # pixels, tokens


def shapes(layers):
    """Widths of Qwen2.5-VL-3B and Qwen3-VL-4B from their published configurations, `layers` text
    layers and one of the tower."""
    yield "qwen2_5_vl 3B", Qwen2_5_VLConfig(
        text_config=dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=layers,
                         num_attention_heads=16, num_key_value_heads=2, vocab_size=151936,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                                          "mrope_section": [16, 24, 24]}),
        vision_config=dict(depth=1, hidden_size=1280, intermediate_size=3420, num_heads=16,
                           out_hidden_size=2048, fullatt_block_indexes=[0]), tie_word_embeddings=True)
    yield "qwen3_vl 4B", Qwen3VLConfig(
        text_config=dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
                         rope_parameters={"rope_type": "default", "rope_theta": 5e6,
                                          "mrope_section": [24, 20, 20], "mrope_interleaved": True}),
        vision_config=dict(depth=1, hidden_size=1024, intermediate_size=4096, num_heads=16,
                           out_hidden_size=2560, deepstack_visual_indexes=[]), tie_word_embeddings=True)


def resident(): gc.collect(); return psutil.Process().memory_info().rss


def one_pass(model, config, rows):
    """(kept bytes, bytes of keys and values, cells) of a real forward pass over `rows` pictures with text."""
    vision = config.vision_config
    side, cells = SIDE // vision.patch_size, (SIDE // (vision.patch_size * vision.spatial_merge_size)) ** 2
    ids = torch.full((rows, cells + PROMPT + COMPLETION), 5)
    ids[:, 4:4 + cells] = config.image_token_id
    ids[:, 3] = config.vision_start_token_id
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                  mm_token_type_ids=(ids == config.image_token_id).int(),
                  image_grid_thw=torch.tensor([[1, side, side]] * rows),
                  pixel_values=torch.zeros(rows * side * side, 3 * 2 * vision.patch_size ** 2))
    body = (model.get_base_model() if isinstance(model, PeftModel) else model).model
    states = {}
    def run(): states["out"] = body(**inputs, use_cache=False).last_hidden_state; return states["out"]
    kept = kept_bytes(run, model)
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad(): body(**inputs, past_key_values=cache, use_cache=True)
    return (kept, sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)), cells,
            states["out"])


def measure(name, config, rank, rows):
    began = resident()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.train()
    loaded = resident()
    found = {"weights": sum(p.nbytes for p in model.parameters())}
    peft = adapt(model, rank)
    if peft: model = get_peft_model(model, peft)
    kept, cache, cells, states = one_pass(model, config, rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5)
    model.get_output_embeddings()(states[:, -COMPLETION:]).log_softmax(-1).mean().backward()
    optimizer.step()
    found |= {"LoRA weights": sum(p.nbytes for p in trained) * bool(rank),
              "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
              "Adam": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.numel() > 1),
              "keys and values": cache, "activations": kept}
    plan = memory_plan(config, rank, rows, rows, SIDE, SIDE, prompt_tokens=PROMPT,
                       completion_tokens=COMPLETION, dtype=torch.float32, checkpointing=False) * 2 ** 30
    for part, real in found.items():
        yield dict(model=name, layers=config.text_config.num_hidden_layers, rank=rank, rows=rows, part=part,
                   planned_mib=plan[part] / 2 ** 20, allocated_mib=real / 2 ** 20,
                   ratio=plan[part] / real if real else float("nan"),
                   resident_after_loading_mib=(loaded - began) / 2 ** 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = pd.DataFrame([row for name, config in shapes(options.layers) for rank in (64, 0)
                          for row in measure(name, config, rank, options.rows)])
    table.round(3).to_csv(HERE / "benchmark_memory.csv", index=False)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__": main()
