"""Turn a dense model into a mixture of experts that starts where it stopped, and train on."""

from pathlib import Path

from colossus import Duration, RunDirectory, continued, resume, upcycle_run, upcycled

dense = RunDirectory.open("scratch-001")
model = upcycled(dense.config().model, num_experts=4, top_k=2)
config = continued(model).model_copy(
    update={
        "data": dense.config().data,
        "batch": dense.config().batch,
        "budget": Duration.parse("10 steps"),
    }
)
summary = resume(upcycle_run(dense, config, runs_directory=Path("runs"), name="experts"))
print(f"{model.num_params():,} parameters, of which a token uses {model.num_active_params():,}")
print(f"held-out text: {summary.heldout_bits_per_byte:.2f} bits per byte")
