"""Train on from published weights: here from the directory that example 02 wrote, just as well from another's."""

from pathlib import Path

from colossus import Duration, continued, import_run, open_directory, resume

source = open_directory("scratch-for-others")
config = continued(source.model).model_copy(update={"budget": Duration.parse("10 steps")})
run = import_run(source, config, runs_directory=Path("runs"), name="continued")
summary = resume(run)
print(f"{source.architecture.name}: {summary.num_params:,} parameters")
print(f"{summary.tokens:,} tokens later: {summary.heldout_bits_per_byte:.2f} bits per byte")
