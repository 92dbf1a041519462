"""Hand a trained model to transformers: the same weights, the same logits, the same text."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossus import RunDirectory, export_run, load_model

run = RunDirectory.open("scratch-001")
export_run(run, "scratch-for-others")

theirs = AutoModelForCausalLM.from_pretrained("scratch-for-others")
tokens = AutoTokenizer.from_pretrained("scratch-for-others")("def main(", return_tensors="pt").input_ids
ours = load_model(run.path).model
with torch.no_grad():
    difference = (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max()
print(f"{type(theirs).__name__}, {theirs.num_parameters():,} parameters")
print(f"largest difference of a logit: below 1e-4: {bool(difference < 1e-4)}")
