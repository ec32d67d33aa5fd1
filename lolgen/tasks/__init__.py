"""Reading tasks and generation tasks: the models, their baselines, and the evaluations that write the reports."""
