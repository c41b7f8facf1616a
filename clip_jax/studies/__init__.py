"""Studies: what they are, their runs, their statistics, their figure and pages. The command is `clip_jax.study`."""
