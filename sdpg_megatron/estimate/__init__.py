"""What a run needs of a machine, before there is one: memory, communication, time. Arithmetic alone; docs/plan.md."""
