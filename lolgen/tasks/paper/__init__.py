"""`lolgen eval paper`: every prediction task of the paper, one file a task, every model of `lolgen.tasks.models`."""
