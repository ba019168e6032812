"""Where prompts come from and how an answer is read. One small file a task."""
